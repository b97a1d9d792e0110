//! Pages for Prometheus (text format 0.0.4), written by the `prometheus` crate. There is no
//! registry: each request builds the page from the values known at that moment.

use prometheus::proto::{
    Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType, Quantile, Summary,
};
use prometheus::{TEXT_FORMAT, TextEncoder};

pub const CONTENT_TYPE: &str = TEXT_FORMAT;

/// Metric type of all samples of one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FigureKind {
    Counter,
    Gauge,
    /// Some samples only ever grow and some do not. Only the code that counts them knows which.
    Untyped,
}

/// Quantiles, sum and count of one histogram, with its labels.
#[derive(Clone, Copy, Debug)]
pub struct PageSummary<'a, const N: usize> {
    pub labels: [(&'a str, &'a str); N],
    /// Pairs of a share (0..=1) and its value.
    pub quantiles: [(f64, f64); 3],
    pub sum: f64,
    pub count: u64,
}

/// A page that is built one metric name at a time.
#[derive(Debug, Default)]
pub struct FiguresPage {
    text: String,
}

impl FiguresPage {
    /// Adds all samples of one name. Without samples the page does not mention the name. `help` may
    /// be empty.
    pub fn add<'a, const N: usize>(
        &mut self,
        kind: FigureKind,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([(&'a str, &'a str); N], f64)>,
    ) {
        let metrics = samples.into_iter().map(|(labels, value)| {
            let mut metric = Metric::from_label(labels.map(label).into());
            if kind == FigureKind::Counter {
                let mut counter = Counter::default();
                counter.set_value(value);
                metric.set_counter(counter);
            } else {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                metric.set_gauge(gauge);
            }
            metric
        });
        let metrics = metrics.collect();
        match kind {
            FigureKind::Counter => self.write(MetricType::COUNTER, name, help, metrics),
            FigureKind::Gauge => self.write(MetricType::GAUGE, name, help, metrics),
            FigureKind::Untyped => {
                // The library panics at this type. Its samples are written like a gauge's.
                let mut page = FiguresPage::default();
                page.write(MetricType::GAUGE, name, help, metrics);
                let [gauge, untyped] =
                    ["gauge", "untyped"].map(|kind| format!("# TYPE {name} {kind}\n"));
                self.text.push_str(&page.text.replacen(&gauge, &untyped, 1));
            }
        }
    }

    /// Adds all summaries of one name. Without summaries the page does not mention the name. `help`
    /// may be empty.
    pub fn add_summaries<'a, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        summaries: impl IntoIterator<Item = PageSummary<'a, N>>,
    ) {
        let metrics = summaries.into_iter().map(|one| {
            let quantiles = one.quantiles.map(|(share, value)| {
                let mut quantile = Quantile::default();
                quantile.set_quantile(share);
                quantile.set_value(value);
                quantile
            });
            let mut summary = Summary::default();
            summary.set_quantile(quantiles.into());
            summary.set_sample_sum(one.sum);
            summary.set_sample_count(one.count);
            let mut metric = Metric::from_label(one.labels.map(label).into());
            metric.set_summary(summary);
            metric
        });
        self.write(MetricType::SUMMARY, name, help, metrics.collect());
    }

    pub fn into_text(self) -> String {
        self.text
    }

    fn write(&mut self, kind: MetricType, name: &str, help: &str, metrics: Vec<Metric>) {
        if metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        TextEncoder::new()
            .encode_utf8(&[family], &mut self.text)
            .expect("a family with a name and samples can be written");
    }
}

fn label((name, value): (&str, &str)) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_the_format_says() {
        let mut page = FiguresPage::default();
        let labels = [("a", "x\\y\"z\n"), ("b", "")];
        page.add(FigureKind::Counter, "c_total", "So many.", [(labels, 3.0)]);
        page.add(FigureKind::Gauge, "g", "", [([], 0.25)]);
        page.add(FigureKind::Untyped, "u", "", [([], 7.0)]);
        page.add(FigureKind::Gauge, "unknown", "", None::<([_; 0], f64)>);
        page.add_summaries(
            "s_seconds",
            "",
            [PageSummary {
                labels: [("a", "b")],
                quantiles: [(0.5, 0.002), (0.95, 1.5), (0.99, f64::INFINITY)],
                sum: 4.5,
                count: 3,
            }],
        );
        assert_eq!(
            page.into_text(),
            "# HELP c_total So many.\n\
             # TYPE c_total counter\n\
             c_total{a=\"x\\\\y\\\"z\\n\",b=\"\"} 3\n\
             # TYPE g gauge\n\
             g 0.25\n\
             # TYPE u untyped\n\
             u 7\n\
             # TYPE s_seconds summary\n\
             s_seconds{a=\"b\",quantile=\"0.5\"} 0.002\n\
             s_seconds{a=\"b\",quantile=\"0.95\"} 1.5\n\
             s_seconds{a=\"b\",quantile=\"0.99\"} inf\n\
             s_seconds_sum{a=\"b\"} 4.5\n\
             s_seconds_count{a=\"b\"} 3\n"
        );
    }
}
