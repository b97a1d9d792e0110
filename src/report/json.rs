//! The JSON report, `throng-report/1`. Its JSON Schema is
//! `fixtures/schema/throng-report-1.schema.json`, and tests keep the two in agreement.
//!
//! Fields are in the order in which they are most useful to a reader. Fields may be added, but none
//! changes its meaning.

use std::time::{Duration, UNIX_EPOCH};

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::json;

use super::server_cost::AccountView;
use super::tiers::{self, Knee};
use super::transports::{self, TransportFigures};
use super::worst::{Ranked, concealed_share, tracks_missing, undelivered, worst};
use super::{
    Capacity, CapacityPoint, EmbeddedSfu, EngineHealth, Judgement, Judging, MediaQuality, Nearness,
    Outcome, Stall, Step, ThreadTime, Unmeasured, VERSION, judge, judge::judge_step,
};
use crate::knee::{CONFIDENCE, KneeAnswer, KneeLimit};
use crate::measure::{Bandwidth, Engine, Histogram, Kind, Media, Session, is_measured, serial};
use crate::plan::scenario::MediaSpec;
use crate::plan::{AudioSpec, ConnectionMode, Plan, Subscribers, VideoSpec};
use crate::signal::AddressUse;

pub const SCHEMA: &str = "throng-report/1";

/// Renders the report of one host.
pub fn render(outcome: &Outcome) -> String {
    let steps = outcome
        .steps
        .iter()
        .map(|step| judge_step(outcome, step))
        .collect();
    print(&ReportView::new(
        outcome,
        judge(outcome),
        steps,
        &outcome.series[..],
        &OneHost::default(),
    ))
}

/// Makes the report of a run over many hosts, judged as a whole and step by step. `series` contains
/// its rows. `hosts` contains `vantages`, `missing`, and other fields that belong beside them.
pub fn of_many<'a, S: Serialize, H: Serialize>(
    outcome: &'a Outcome,
    judgement: Judgement,
    steps: Vec<Judgement>,
    series: &'a [S],
    hosts: &'a H,
) -> impl Serialize + 'a {
    ReportView::new(outcome, judgement, steps, series, hosts)
}

/// Prints a report with indentation and a final newline.
pub fn print(report: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(report).expect("plain data serialises");
    text.push('\n');
    text
}

fn knee<'a>(outcome: &'a Outcome, steps: &[Judgement]) -> Option<Knee<'a>> {
    if outcome.plan.scenario.search.is_some() {
        return None;
    }
    let judged = outcome.steps.iter().zip(steps.iter().cloned());
    Knee::among(
        judged.filter(|(step, _)| step.tier.is_some()).collect(),
        &outcome.unmeasured,
    )
}

/// The fields about other hosts in the report of one host: all `null`.
#[derive(Default, serde::Serialize)]
struct OneHost {
    vantages: Option<()>,
    missing: Option<()>,
}

#[derive(serde::Serialize)]
struct ReportView<'a, S, H> {
    schema: &'static str,
    version: &'static str,
    started_at: String,
    finished_at: String,
    seed: u64,
    result: &'static str,
    reasons: Vec<String>,
    notes: &'a [String],
    plan: PublishedPlan<'a>,
    target: TargetView<'a>,
    knee: Option<KneeView<'a>>,
    capacity: Option<CapacityView<'a>>,
    steps: Vec<StepView<'a>>,
    /// Tiers that the run did not reach. `null` without tiers.
    unmeasured_tiers: Option<Vec<TierKeyView<'a>>>,
    totals: TotalsView<'a>,
    join_failures: Vec<FailureView<'a>>,
    /// `null` in the report of several hosts, which do not send their participants.
    transports: Option<Vec<TransportFigures>>,
    worst: Vec<WorstParticipantView<'a>>,
    series: &'a [S],
    engine: EngineView<'a>,
    server: Option<ServerView<'a>>,
    #[serde(flatten)]
    hosts: &'a H,
}

impl<'a, S: Serialize, H: Serialize> ReportView<'a, S, H> {
    fn new(
        outcome: &'a Outcome,
        judgement: Judgement,
        steps: Vec<Judgement>,
        series: &'a [S],
        hosts: &'a H,
    ) -> ReportView<'a, S, H> {
        let Judgement { verdict, reasons } = judgement;
        ReportView {
            schema: SCHEMA,
            version: VERSION,
            started_at: rfc_3339(outcome.started),
            finished_at: rfc_3339(outcome.finished),
            seed: outcome.plan.scenario.seed,
            result: verdict.name(),
            reasons,
            notes: &outcome.notes,
            plan: PublishedPlan(outcome),
            target: TargetView::new(outcome),
            knee: knee(outcome, &steps).map(KneeView::new),
            capacity: outcome
                .capacity
                .as_ref()
                .map(|capacity| CapacityView::new(&outcome.plan, capacity)),
            unmeasured_tiers: (!outcome.plan.scenario.ramp_tiers().is_empty())
                .then(|| outcome.unmeasured.iter().map(TierKeyView::from).collect()),
            steps: outcome
                .steps
                .iter()
                .zip(steps)
                .map(|(step, judgement)| StepView::new(step, judgement))
                .collect(),
            totals: TotalsView::new(&outcome.totals),
            transports: transports::by_transport(outcome),
            join_failures: outcome
                .failures
                .iter()
                .map(|(reason, count)| FailureView {
                    reason,
                    count: *count,
                })
                .collect(),
            worst: worst(&outcome.participants, outcome.judging.max_loss_pct)
                .into_iter()
                .map(WorstParticipantView::new)
                .collect(),
            series,
            engine: EngineView::new(outcome),
            server: ServerView::new(outcome),
            hosts,
        }
    }
}

/// The plan and its limits. The figures that follow from the scenario come first, under names that
/// readers know, and then the scenario itself. Durations in seconds, bitrates in bits per second.
struct PublishedPlan<'a>(&'a Outcome);

/// Most room names in a report. A run of thousands of rooms need not name each, because the first
/// ones show the pattern.
const ROOM_NAMES_MAX: u32 = 16;

impl Serialize for PublishedPlan<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let plan = &self.0.plan;
        let scenario = &plan.scenario;
        let (people, times) = (scenario.people(), scenario.times());
        // Of several kinds of media, the first: all of them are in the scenario below.
        let [audio, video] = [Kind::Audio, Kind::Video].map(|kind| plan.media_of(kind));
        let rooms = scenario.rooms.count;
        let names = (0..rooms.min(ROOM_NAMES_MAX)).map(|room| plan.room_name(room));
        let tiers = scenario.ramp_tiers();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("rooms", &rooms)?;
        map.serialize_entry("room_names", &names.collect::<Vec<_>>())?;
        map.serialize_entry("audio_publishers", &people.audio_publishers)?;
        map.serialize_entry("video_publishers", &people.video_publishers)?;
        map.serialize_entry("subscribers", &people.subscribers)?;
        map.serialize_entry("meeting", &people.meeting)?;
        map.serialize_entry("participants", &plan.total_participants())?;
        map.serialize_entry("identity_prefix", &scenario.identity_prefix)?;
        map.serialize_entry("run_tag", &format!("{:08x}", plan.run_tag))?;
        map.serialize_entry("client", &scenario.media.client)?;
        map.serialize_entry("joins_per_second", &scenario.joins_per_second)?;
        map.serialize_entry("duration_seconds", &times.hold.as_secs_f64())?;
        // Subscribers per room, tier by tier. `null` without tiers.
        map.serialize_entry("ramp", &(!tiers.is_empty()).then_some(tiers))?;
        map.serialize_entry("find_knee", &scenario.search.is_some())?;
        let spread = times.spread.map(|spread| spread.as_secs_f64());
        map.serialize_entry("ramp_time_seconds", &spread)?;
        map.serialize_entry("warmup_seconds", &times.warmup.as_secs_f64())?;
        map.serialize_entry("layout", &plan.layout())?;
        map.serialize_entry("simulate_speakers", &scenario.rooms.simulate_speakers)?;
        map.serialize_entry("pacing", &video.pacing)?;
        map.serialize_entry("obey_bwe", &video.obey_bandwidth)?;
        map.serialize_entry("audio", &published_audio(&audio.audio))?;
        map.serialize_entry("video", &published_video(video))?;
        map.serialize_entry("judging", &published_judging(&self.0.judging))?;
        map.serialize_entry("scenario", scenario)?;
        map.end()
    }
}

fn published_audio(audio: &AudioSpec) -> impl Serialize {
    json!({
        "codec": audio.codec().name(),
        "bitrate": audio.bitrate.bps(),
        "frame_ms": audio.frame.as_secs_f64() * 1e3,
        "dtx": audio.dtx,
        "redundancy": audio.redundancy,
    })
}

/// The video settings with the layers that are sent, the lowest first.
fn published_video(media: &MediaSpec) -> impl Serialize {
    let layer = |spec: &VideoSpec| {
        json!({
            "width": spec.width,
            "height": spec.height,
            "frames_per_second": spec.frames_per_second,
            "bitrate": spec.bitrate.bps(),
        })
    };
    let mut video = layer(&media.video);
    video["codec"] = media.video.codec().name().into();
    video["layers"] = media.video_layers().iter().map(layer).collect();
    video
}

fn published_judging(judging: &Judging) -> impl Serialize {
    let thresholds: Vec<String> = judging.thresholds.iter().map(ToString::to_string).collect();
    json!({
        "max_loss_pct": judging.max_loss_pct,
        "target_rtt_ms": judging.target_rtt.map(|target| target.as_secs_f64() * 1e3),
        "thresholds": thresholds,
    })
}

#[derive(serde::Serialize)]
struct TargetView<'a> {
    kind: &'static str,
    url: Option<String>,
    server_version: Option<&'a str>,
    /// `None`: each host asks its own server.
    connection: Option<&'static str>,
    connection_reason: Option<&'a str>,
    addresses: Vec<AddressView<'a>>,
}

/// One of the server's addresses.
#[derive(serde::Serialize)]
struct AddressView<'a> {
    address: String,
    connections: u32,
    fault: Option<&'a str>,
}

impl<'a> AddressView<'a> {
    fn new(used: &'a AddressUse) -> AddressView<'a> {
        AddressView {
            address: used.address.to_string(),
            connections: used.connections,
            fault: used.fault.as_deref(),
        }
    }
}

impl<'a> TargetView<'a> {
    fn new(outcome: &'a Outcome) -> TargetView<'a> {
        TargetView {
            kind: outcome.target.kind.name(),
            url: outcome.plan.target.known_url().map(ToString::to_string),
            server_version: outcome.target.server_version.as_deref(),
            connection: (outcome.plan.connection != ConnectionMode::Auto)
                .then(|| outcome.plan.connection.name()),
            connection_reason: outcome.plan.connection_reason.as_deref(),
            addresses: outcome
                .target
                .addresses
                .iter()
                .map(AddressView::new)
                .collect(),
        }
    }
}

/// Figures that the server reported about itself.
#[derive(serde::Serialize)]
struct ServerView<'a> {
    #[serde(flatten)]
    embedded: Option<EmbeddedView>,
    #[serde(flatten)]
    pages: AccountView<'a>,
}

impl<'a> ServerView<'a> {
    fn new(outcome: &'a Outcome) -> Option<ServerView<'a>> {
        let (embedded, account) = (outcome.sfu.as_ref(), outcome.server.as_ref());
        (embedded.is_some() || account.is_some()).then(|| ServerView {
            embedded: embedded.map(EmbeddedView::new),
            pages: AccountView::new(account),
        })
    }
}

/// Figures that the embedded SFU reports about itself: RTP media of all rooms, and its cost.
#[derive(serde::Serialize)]
struct EmbeddedView {
    routers: usize,
    send: &'static str,
    cpu_seconds: Option<f64>,
    us_per_packet_sent: Option<f64>,
    packets_received: u64,
    packets_sent: u64,
    packets_resent: u64,
    nacks_received: u64,
    nacks_sent: u64,
    plis_received: u64,
    plis_sent: u64,
    socket_drops: u64,
    send_errors: u64,
}

impl EmbeddedView {
    fn new(sfu: &EmbeddedSfu) -> EmbeddedView {
        let media = &sfu.statistics.media;
        EmbeddedView {
            routers: sfu.routers,
            send: sfu.send.name(),
            cpu_seconds: sfu.cpu_seconds,
            us_per_packet_sent: sfu.us_per_packet_sent(),
            packets_received: media.media_in + media.repairs_in,
            packets_sent: media.media_out,
            packets_resent: media.resends_out,
            nacks_received: media.nacks_in,
            nacks_sent: media.nacks_out,
            plis_received: media.plis_in,
            plis_sent: media.plis_out,
            socket_drops: media.socket_drops,
            send_errors: media.send_errors,
        }
    }
}

#[derive(serde::Serialize)]
struct StepView<'a> {
    name: &'a str,
    participants: u32,
    /// Subscribers per room. `null` if the step is not a tier.
    subscribers: Option<u32>,
    #[serde(flatten)]
    totals: TotalsView<'a>,
    result: &'static str,
    reasons: Vec<String>,
}

impl<'a> StepView<'a> {
    fn new(step: &'a Step, Judgement { verdict, reasons }: Judgement) -> StepView<'a> {
        StepView {
            name: &step.name,
            participants: step.participants,
            subscribers: tiers::subscribers(step),
            totals: TotalsView::new(step),
            result: verdict.name(),
            reasons,
        }
    }
}

#[derive(serde::Serialize)]
struct TierKeyView<'a> {
    tier: &'a str,
    subscribers: Option<u32>,
}

impl<'a> From<&'a Unmeasured> for TierKeyView<'a> {
    fn from(tier: &'a Unmeasured) -> TierKeyView<'a> {
        TierKeyView {
            tier: &tier.name,
            subscribers: tier.subscribers,
        }
    }
}

/// Result of a ramp: the last tier that passed before the first one that did not.
#[derive(serde::Serialize)]
struct KneeView<'a> {
    answer: &'static str,
    tier: Option<&'a str>,
    subscribers: Option<u32>,
    participants: Option<u32>,
    broke: Option<BrokeView<'a>>,
}

#[derive(serde::Serialize)]
struct BrokeView<'a> {
    tier: &'a str,
    subscribers: Option<u32>,
    participants: u32,
    result: &'static str,
    reasons: Vec<String>,
}

impl<'a> KneeView<'a> {
    fn new(knee: Knee<'a>) -> KneeView<'a> {
        KneeView {
            answer: knee.answer.name(),
            tier: knee.passed.map(|step| step.name.as_str()),
            subscribers: knee.passed.and_then(tiers::subscribers),
            participants: knee.passed.map(|step| step.participants),
            broke: knee.broke.map(|(step, judgement)| BrokeView {
                tier: &step.name,
                subscribers: tiers::subscribers(step),
                participants: step.participants,
                result: judgement.verdict.name(),
                reasons: judgement.reasons,
            }),
        }
    }
}

/// Result of a search for the most subscribers per room.
#[derive(serde::Serialize)]
struct CapacityView<'a> {
    answer: &'static str,
    subscribers: Option<u32>,
    participants: Option<u32>,
    /// Bounds of `subscribers`: it lies between them with a probability of `confidence`.
    low: Option<u32>,
    high: Option<u32>,
    confidence: Option<f64>,
    settled: Option<bool>,
    limit: Option<&'static str>,
    limit_reasons: &'a [String],
    broke_first: Option<BrokeFirstView<'a>>,
    points: &'a [CapacityPoint],
}

#[derive(serde::Serialize)]
struct BrokeFirstView<'a> {
    subscribers: u32,
    reasons: &'a [String],
}

impl<'a> CapacityView<'a> {
    /// The view of a search without an answer.
    fn nothing(capacity: &'a Capacity) -> CapacityView<'a> {
        let broke_first = capacity.broke_first.as_ref();
        CapacityView {
            answer: "none",
            subscribers: None,
            participants: None,
            low: None,
            high: None,
            confidence: None,
            settled: None,
            limit: None,
            limit_reasons: &[],
            broke_first: broke_first.map(|(subscribers, reasons)| BrokeFirstView {
                subscribers: *subscribers,
                reasons,
            }),
            points: &capacity.points,
        }
    }

    fn new(plan: &Plan, capacity: &'a Capacity) -> CapacityView<'a> {
        let participants =
            |subscribers: u32| plan.participants_with(Subscribers::PerRoom(subscribers));
        let nothing = CapacityView::nothing(capacity);
        match &capacity.answer {
            KneeAnswer::Capacity {
                participants: subscribers,
                low,
                high,
                settled,
            } => CapacityView {
                answer: "capacity",
                subscribers: Some(*subscribers),
                participants: Some(participants(*subscribers)),
                low: Some(*low),
                high: Some(*high),
                confidence: Some(CONFIDENCE),
                settled: Some(*settled),
                ..nothing
            },
            KneeAnswer::AtLeast {
                participants: subscribers,
                limit,
            } => CapacityView {
                answer: "at_least",
                subscribers: Some(*subscribers),
                participants: Some(participants(*subscribers)),
                limit: Some(match limit {
                    KneeLimit::Max => "max",
                    KneeLimit::Generator { .. } => "generator",
                }),
                limit_reasons: match limit {
                    KneeLimit::Max => &[],
                    KneeLimit::Generator { reasons, .. } => reasons,
                },
                ..nothing
            },
            KneeAnswer::None => nothing,
            KneeAnswer::NotMeasured { reasons } => CapacityView {
                answer: "not_measured",
                limit: Some("generator"),
                limit_reasons: reasons,
                ..nothing
            },
        }
    }
}

#[derive(serde::Serialize)]
struct TotalsView<'a> {
    seconds: f64,
    session: SessionView<'a>,
    audio: MediaView<'a>,
    video: MediaView<'a>,
    bandwidth: BandwidthView<'a>,
}

impl<'a> TotalsView<'a> {
    fn new(step: &'a Step) -> TotalsView<'a> {
        TotalsView {
            seconds: step.seconds,
            session: SessionView(&step.record.session),
            audio: MediaView(step.media(Kind::Audio), Kind::Audio),
            video: MediaView(step.media(Kind::Video), Kind::Video),
            bandwidth: BandwidthView(&step.record.bandwidth),
        }
    }
}

struct SessionView<'a>(&'a Session);

impl Serialize for SessionView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        stats(
            serializer,
            measured(None, self.0.counters()),
            self.0.histograms(),
            self.0.scores(),
        )
    }
}

struct MediaView<'a>(&'a Media, Kind);

impl Serialize for MediaView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        stats(
            serializer,
            measured(Some(self.1), self.0.counters()),
            self.0.histograms(),
            self.0.scores(),
        )
    }
}

struct BandwidthView<'a>(&'a Bandwidth);

impl Serialize for BandwidthView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        stats(
            serializer,
            self.0.counters().map(|(name, value)| (name, Some(value))),
            self.0.histograms(),
            self.0.scores(),
        )
    }
}

struct CountersView<'a>(&'a Engine);

impl Serialize for CountersView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let counters = self.0.counters().map(|(name, value)| (name, Some(value)));
        stats(serializer, counters, std::iter::empty(), std::iter::empty())
    }
}

/// Counters by name. Those that this version does not fill are `None`.
fn measured(
    kind: Option<Kind>,
    counters: impl Iterator<Item = (&'static str, u64)>,
) -> impl Iterator<Item = (&'static str, Option<u64>)> {
    counters.map(move |(name, value)| (name, is_measured(kind, name).then_some(value)))
}

/// Writes counters and histograms by name, in the order of their declaration.
fn stats<'a, S: Serializer>(
    serializer: S,
    counters: impl Iterator<Item = (&'static str, Option<u64>)>,
    histograms: impl Iterator<Item = (&'static str, &'a Histogram)>,
    scores: impl Iterator<Item = (&'static str, &'a Histogram)>,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    for (name, value) in counters {
        map.serialize_entry(name, &value)?;
    }
    for (name, histogram) in histograms {
        map.serialize_entry(name, &HistogramView::new(histogram))?;
    }
    for (name, scores) in scores {
        map.serialize_entry(name, &ScoresView::new(scores))?;
    }
    map.end()
}

/// A histogram in microseconds. A percentile that falls among the missing values is `null`.
#[derive(serde::Serialize)]
struct HistogramView {
    expected: u64,
    count: u64,
    min: Option<u64>,
    mean: Option<f64>,
    p50: Option<u64>,
    p90: Option<u64>,
    p95: Option<u64>,
    p99: Option<u64>,
    p999: Option<u64>,
    max: Option<u64>,
    hdr: String,
}

impl HistogramView {
    /// Returns `None` for a histogram that does not apply, because no values were expected and none
    /// came.
    fn new(histogram: &Histogram) -> Option<HistogramView> {
        (histogram.expected() > 0).then(|| HistogramView {
            expected: histogram.expected(),
            count: histogram.count(),
            min: histogram.min(),
            mean: histogram.mean(),
            p50: histogram.quantile(0.5),
            p90: histogram.quantile(0.9),
            p95: histogram.quantile(0.95),
            p99: histogram.quantile(0.99),
            p999: histogram.quantile(0.999),
            max: histogram.max(),
            hdr: serial::to_base64(histogram),
        })
    }
}

/// Scores, for which lower is worse. Percentiles count from the worst, and missing scores are
/// worst.
#[derive(serde::Serialize)]
struct ScoresView {
    expected: u64,
    count: u64,
    min: Option<f64>,
    mean: Option<f64>,
    p1: Option<f64>,
    p5: Option<f64>,
    p10: Option<f64>,
    p50: Option<f64>,
    max: Option<f64>,
    hdr: String,
}

impl ScoresView {
    fn new(scores: &Histogram) -> Option<ScoresView> {
        let score = |thousandths: Option<u64>| thousandths.map(|value| value as f64 / 1e3);
        let low = |share: f64| score(scores.low_quantile(share));
        let complete = scores.count() == scores.expected();
        (scores.expected() > 0).then(|| ScoresView {
            expected: scores.expected(),
            count: scores.count(),
            min: score(scores.min().filter(|_| complete)),
            mean: scores.mean().map(|mean| mean / 1e3),
            p1: low(0.01),
            p5: low(0.05),
            p10: low(0.1),
            p50: low(0.5),
            max: low(1.0),
            hdr: serial::to_base64(scores),
        })
    }
}

/// One of the participants that fared worst.
#[derive(serde::Serialize)]
struct WorstParticipantView<'a> {
    index: u32,
    room: &'a str,
    identity: &'a str,
    healthy: bool,
    wrong: Vec<String>,
    joined: bool,
    disconnects: u32,
    tracks_missing: u64,
    audio: WorstMediaView,
    video: WorstMediaView,
}

/// Shares of one kind of media. `null` if nothing was expected.
#[derive(serde::Serialize)]
struct WorstMediaView {
    undelivered: Option<f64>,
    concealed: Option<f64>,
    late: Option<f64>,
    one_way_us_mean: Option<u64>,
    mos: Option<f64>,
}

impl<'a> WorstParticipantView<'a> {
    fn new(ranked: Ranked<'a>) -> WorstParticipantView<'a> {
        let who = ranked.participant;
        WorstParticipantView {
            index: who.index,
            room: &who.room,
            identity: &who.identity,
            healthy: ranked.healthy,
            wrong: ranked.wrong,
            joined: who.timeline.joined.is_some(),
            disconnects: who.disconnects,
            tracks_missing: tracks_missing(&who.audio) + tracks_missing(&who.video),
            audio: WorstMediaView::new(&who.audio),
            video: WorstMediaView::new(&who.video),
        }
    }
}

impl WorstMediaView {
    fn new(quality: &MediaQuality) -> WorstMediaView {
        let share = |part: u64| {
            (quality.frames_expected > 0).then(|| part as f64 / quality.frames_expected as f64)
        };
        WorstMediaView {
            undelivered: share(undelivered(quality)),
            concealed: concealed_share(quality),
            late: share(quality.frames_late),
            one_way_us_mean: quality.one_way_us_mean,
            mos: quality.mos,
        }
    }
}

#[derive(serde::Serialize)]
struct FailureView<'a> {
    reason: &'a str,
    count: u64,
}

#[derive(serde::Serialize)]
struct EngineView<'a> {
    threads: usize,
    cpu_seconds: Option<f64>,
    us_per_packet: Option<f64>,
    bytes_per_participant: Option<u64>,
    rss_peak_bytes: Option<u64>,
    /// The engine's counters, directly by name.
    #[serde(flatten)]
    counters: CountersView<'a>,
    host_drops: Vec<DropsView>,
    softnet_squeezed: Option<u64>,
    stolen_seconds: Option<f64>,
    throttled_times: Option<u64>,
    throttled_seconds: Option<f64>,
    thread_times: &'a [ThreadTime],
    tick_late_us: Option<HistogramView>,
    floor_tick_late_us: Option<HistogramView>,
    send_lag_us: Option<HistogramView>,
    calibration: Option<CalibrationView>,
    stalls: &'a [Stall],
    valid: bool,
    reasons: &'a [String],
}

#[derive(serde::Serialize)]
struct CalibrationView {
    calibrated_at: String,
    packets_per_second_peak: f64,
    packets_per_second_ceiling: f64,
    share: f64,
}

impl From<Nearness> for CalibrationView {
    fn from(nearness: Nearness) -> CalibrationView {
        CalibrationView {
            calibrated_at: rfc_3339(nearness.calibrated_at),
            packets_per_second_peak: nearness.packets_per_second_peak,
            packets_per_second_ceiling: nearness.packets_per_second_ceiling,
            share: nearness.share(),
        }
    }
}

#[derive(serde::Serialize)]
struct DropsView {
    place: &'static str,
    packets: Option<u64>,
}

impl<'a> EngineView<'a> {
    fn new(outcome: &'a Outcome) -> EngineView<'a> {
        let (health, counted): (&EngineHealth, _) =
            (&outcome.engine, &outcome.totals.record.engine);
        EngineView {
            threads: health.threads,
            cpu_seconds: health.cpu_seconds,
            us_per_packet: health.us_per_packet,
            bytes_per_participant: health.bytes_per_participant,
            rss_peak_bytes: health.rss_peak_bytes,
            counters: CountersView(counted),
            host_drops: health
                .host_drops
                .places()
                .map(|(place, packets)| DropsView { place, packets })
                .into(),
            softnet_squeezed: health.softnet_squeezed,
            stolen_seconds: health.stolen_seconds,
            throttled_times: health.throttled_times,
            throttled_seconds: health.throttled_seconds,
            thread_times: &health.thread_times,
            tick_late_us: HistogramView::new(&counted.tick_late),
            floor_tick_late_us: health.floor_tick_late.as_ref().and_then(HistogramView::new),
            send_lag_us: HistogramView::new(&counted.send_lag),
            calibration: outcome.nearness.map(CalibrationView::from),
            stalls: &health.stalls,
            valid: health.valid,
            reasons: &health.reasons,
        }
    }
}

pub(crate) fn rfc_3339(unix: Duration) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + unix).to_string()
}
