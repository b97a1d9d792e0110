//! Keeps docs/metrics.md true: every figure has its description and its row in the table of truths,
//! every row has a figure, and the tests that it names exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;
use throng::measure::{Bandwidth, Media, Session};

const NONE_YET: &str = "*none yet*";

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn schema() -> Value {
    serde_json::from_str(&read("fixtures/schema/throng-report-1.schema.json"))
        .expect("the schema is JSON")
}

/// Properties of the engine section that describe the run and are no figures.
const ENGINE_FACTS: &[&str] = &["threads", "valid", "reasons"];

/// Properties of a step of the server's pages that describe the step and are no figures.
const SERVER_FACTS: &[&str] = &["name", "seconds"];

/// Returns every counter, histogram and score of the report, by section. The engine's names are
/// those of the JSON.
fn figures() -> BTreeSet<String> {
    let of = |section: &str, names: &[&str]| {
        names
            .iter()
            .map(|name| format!("{section}.{name}"))
            .collect::<Vec<_>>()
    };
    let mut figures = BTreeSet::new();
    figures.extend(of("session", Session::COUNTERS));
    figures.extend(of("session", Session::HISTOGRAMS));
    figures.extend(of("media", Media::COUNTERS));
    figures.extend(of("media", Media::HISTOGRAMS));
    figures.extend(of("media", Media::SCORES));
    figures.extend(of("bandwidth", Bandwidth::COUNTERS));
    figures.extend(of("bandwidth", Bandwidth::HISTOGRAMS));
    let schema = schema();
    let engine = schema["$defs"]["engine"]["properties"]
        .as_object()
        .expect("the engine's section");
    figures.extend(
        engine
            .keys()
            .filter(|name| !ENGINE_FACTS.contains(&name.as_str()))
            .map(|name| format!("engine.{name}")),
    );
    let server = schema["$defs"]["server"]["properties"]
        .as_object()
        .expect("a step of the server's pages");
    figures.extend(
        server
            .keys()
            .filter(|name| !SERVER_FACTS.contains(&name.as_str()))
            .map(|name| format!("server.{name}")),
    );
    figures
}

/// Returns the cells of each table row below a heading, up to the next heading of its level.
fn rows(page: &str, heading: &str) -> Vec<Vec<String>> {
    let below = page
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("no heading {heading}"))
        .1;
    let section = below.split("\n## ").next().unwrap_or(below);
    let cells = |line: &str| {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect::<Vec<_>>()
    };
    section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(cells)
        .collect()
}

/// Returns the texts between backquotes.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_figure_has_its_row_of_truth_and_no_row_is_without_a_figure() {
    let page = read("docs/metrics.md");
    let mut named = BTreeMap::new();
    for row in rows(&page, "## Truth") {
        let [name, truth, error] = &row[..] else {
            panic!("three cells: {row:?}")
        };
        assert!(
            !truth.is_empty() && !error.is_empty(),
            "an empty cell: {row:?}"
        );
        for name in quoted(name) {
            assert_eq!(named.insert(name.clone(), ()), None, "two rows for {name}");
        }
    }
    let named: BTreeSet<String> = named.into_keys().collect();
    let figures = figures();
    let missing: Vec<_> = figures.difference(&named).collect();
    let superfluous: Vec<_> = named.difference(&figures).collect();
    assert!(
        missing.is_empty() && superfluous.is_empty(),
        "without a row: {missing:#?}; without a figure: {superfluous:#?}"
    );
}

#[test]
fn every_figure_has_its_sentence() {
    let page = read("docs/metrics.md");
    let before_truth = page.split("\n## Truth\n").next().expect("a page");
    let described: BTreeSet<String> = before_truth.lines().flat_map(quoted).collect();
    for figure in figures() {
        let name = figure.split('.').next_back().unwrap_or_default();
        let bare = name.strip_suffix("_us").unwrap_or(name);
        assert!(
            described.contains(name) || described.contains(bare),
            "docs/metrics.md has no sentence on {figure}"
        );
    }
}

/// Returns the sources in which a test may name a figure: its own file, and the files of its
/// modules.
fn sources(file: &str) -> String {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(file.trim_end_matches(".rs").trim_end_matches("/main"));
    let parts = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path()).ok());
    parts.fold(read(file), |all, part| all + &part)
}

#[test]
fn every_test_that_is_named_exists_and_looks_at_the_figure() {
    let page = read("docs/metrics.md");
    let mut none_yet = Vec::new();
    for row in rows(&page, "## Truth") {
        let figure = quoted(&row[0]).remove(0);
        if row[1] == NONE_YET {
            none_yet.push(figure);
            continue;
        }
        let name = figure.split('.').next_back().unwrap_or_default();
        let bare = name.strip_suffix("_us").unwrap_or(name);
        let mut looks = false;
        for test in quoted(&row[1]) {
            let (file, function) = test
                .split_once("::")
                .unwrap_or_else(|| panic!("{figure}: file::function, not {test}"));
            let text = sources(file);
            assert!(
                text.contains(&format!("fn {function}(")),
                "{figure}: there is no {test}"
            );
            looks |= file.starts_with("src/") || text.contains(bare);
        }
        assert!(looks, "{figure}: no test that its row names looks at it");
    }
    // The page says which figures nothing checks. Their number must not grow.
    assert!(none_yet.len() <= NONE_YET_MAX, "{none_yet:?}");
    eprintln!("without a ground truth: {none_yet:?}");
}

/// Limit on figures without ground truth. Lower it when one of them gets its ground truth.
const NONE_YET_MAX: usize = 19;

#[test]
fn the_schema_has_a_sentence_on_every_figure() {
    let schema = schema();
    for figure in figures() {
        let (section, name) = figure.split_once('.').expect("a section");
        let property = &schema["$defs"][section]["properties"][name];
        let said = property["description"].as_str().unwrap_or_default();
        assert!(
            said.len() > 10 || property["$ref"].is_string(),
            "the schema says nothing of {figure}: {property}"
        );
    }
}
