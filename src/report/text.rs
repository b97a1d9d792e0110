//! Text on the terminal: the first line, the dry run, and the final report on one screen of 80
//! columns.
//!
//! An unknown value prints `n/a`. A percentile prints `never` if it falls among events that never
//! happened. Neither ever prints as zero.

use std::fmt::Write as _;

use super::judge::LossShares;
use super::{
    EngineHealth, Judgement, Judging, Outcome, Side, Style, TargetKind, VERSION, judge,
    server_cost, tiers, transports, worst,
};
use crate::codec::Codec;
use crate::measure::{Bandwidth, Histogram, Kind, Media, Session};
use crate::plan::{AudioSpec, Plan, Resources, VideoSpec};
use crate::sfu::SendMode;
use crate::units::Bitrate;
use crate::words::{count, duration, maybe, micros, number, percent, scaled, wrapped};

const REASONS_MAX: usize = 6;
const NOTES_MAX: usize = 4;
const FAILURES_MAX: usize = 3;
/// ITU-T G.107, Annex B: users are satisfied from R = 80 on. MOS in thousandths.
const MOS_SATISFIED: u64 = 4_024;
/// Share of concealed audio from which on it gets a line.
const CONCEALED_NOTABLE: f64 = 0.001;
/// Number of the worst participants that are named.
const WORST_MAX: usize = 10;
const QUANTILES: [(&str, f64); 5] = [
    ("p50", 0.5),
    ("p90", 0.9),
    ("p95", 0.95),
    ("p99", 0.99),
    ("p99.9", 0.999),
];

/// Text shown after a run for which the user asked for nothing.
pub const WHAT_NEXT: &str = "
Next: throng --publishers 1 --subscribers 1000
                                            more people, on this host alone
      throng --url ws://HOST:7880 --api-key KEY --api-secret SECRET
                                            the same against your own server
      throng --help                         everything else";

/// Target, its origin, connection mode and plan, on one line.
pub fn first_line(plan: &Plan) -> String {
    let target = &plan.target;
    let (shape, pace) = (shape_line(plan), pace_line(plan));
    format!(
        "throng {VERSION}: {target} ({}), {}{}; {shape}, {pace}\n",
        target.origin,
        connection(plan),
        client(plan).map_or_else(String::new, |client| format!(", {client}")),
    )
}

/// Formats the client that participants behave like, for example `as js (livekit-client 2.21.0)`.
/// `None` for the one that nobody need ask for.
fn client(plan: &Plan) -> Option<String> {
    let client = plan.scenario.media.client;
    (!client.is_lk()).then(|| format!("as {}", client.full_name()))
}

fn connection(plan: &Plan) -> String {
    let reason = plan
        .connection_reason
        .as_ref()
        .map(|reason| format!(" (auto: {reason})"))
        .unwrap_or_default();
    format!("{} connection{reason}", plan.connection.name())
}

/// Returns the description of what a run would do. No connection is made.
pub fn dry_run(plan: &Plan, judging: &Judging, resources: &Resources) -> String {
    let mut text = first_line(plan);
    text.push_str(&shape_rows(plan));
    text.push_str(&load_rows(plan));
    text.push_str(&resource_rows(plan, resources));
    text.push_str(&dry_row("Judged by", judging_line(judging)));
    text.push_str("Dry run: nothing was connected to.\n");
    text
}

fn dry_row(label: &str, value: String) -> String {
    format!("  {label:<14}{value}\n")
}

/// Rooms, participants, their media, and times.
fn shape_rows(plan: &Plan) -> String {
    let last = plan.scenario.rooms.count - 1;
    let rooms = if last == 0 {
        plan.room_name(0)
    } else {
        format!("{} .. {}", plan.room_name(0), plan.room_name(last))
    };
    let mut text = dry_row("Rooms", rooms);
    let mut row = |label: &str, value: String| text.push_str(&dry_row(label, value));
    if let Some(client) = client(plan) {
        row("Clients", client);
    }
    row("Media", media_line(plan));
    let layers = plan.media_of(Kind::Video).video_layers();
    if plan.scenario.publishers_of(Kind::Video) > 0 && layers.len() > 1 {
        for (at, layer) in layers.iter().enumerate() {
            row(if at == 0 { "Layers" } else { "" }, layer_line(layer));
        }
    }
    let habits = habits(plan);
    if !habits.is_empty() {
        row("Habits", habits.join(", "));
    }
    if plan.has_tiers() {
        row("Tiers", tiers_line(plan));
        row("", tier_line(plan));
    } else if plan.part.is_none() {
        row(
            "Joining",
            format!(
                "{} joins/s for {}, then {} of measuring",
                rate(plan.scenario.joins_per_second),
                duration(plan.joining()),
                duration(plan.scenario.times().hold)
            ),
        );
    }
    text
}

fn load_rows(plan: &Plan) -> String {
    let load = plan.load();
    let tracks =
        plan.total_published_tracks(Kind::Audio) + plan.total_published_tracks(Kind::Video);
    let subscriptions =
        plan.total_planned_tracks(Kind::Audio) + plan.total_planned_tracks(Kind::Video);
    let tracks = format!(
        "{} published, {} subscriptions",
        number(tracks),
        number(subscriptions)
    );
    let sending = rate_line(load.packets_sent_per_second, load.bits_sent_per_second);
    let receiving = rate_line(
        load.packets_received_per_second,
        load.bits_received_per_second,
    );
    [
        dry_row("Tracks", tracks),
        dry_row("Sending", sending),
        dry_row("Receiving", receiving),
    ]
    .concat()
}

fn resource_rows(plan: &Plan, resources: &Resources) -> String {
    let estimate = plan.estimate();
    let mut text = dry_row(
        "Generator",
        format!(
            "{} of {} CPUs, about {:.2} cores busy",
            count(resources.threads as u64, "thread"),
            resources.cpus,
            estimate.cores
        ),
    );
    if resources.sfu_routers > 0 {
        let routers = count(resources.sfu_routers as u64, "router");
        text.push_str(&dry_row(
            "Embedded SFU",
            format!("{routers} and a thread for signalling, on the same CPUs"),
        ));
    }
    text.push_str(&dry_row(
        "Needs",
        format!(
            "{} sockets, {} files, about {}",
            number(resources.sockets),
            number(resources.files),
            scaled(estimate.memory_bytes as f64, "B")
        ),
    ));
    text
}

/// The final report.
pub fn render(outcome: &Outcome, style: Style) -> String {
    let judgement = judge(outcome);
    let mut text = head(outcome, style);
    text.push_str(&tiers(outcome, style));
    text.push_str(&joins(outcome, style));
    text.push_str(&transports::text(outcome, style));
    text.push_str(&media(outcome, style));
    text.push_str(&times(outcome, style));
    text.push_str(&bandwidth(&outcome.totals.record.bandwidth, style));
    text.push_str(&generator(outcome, style));
    text.push_str(&embedded_sfu(outcome, style));
    text.push_str(&server_cost::text(outcome, style));
    text.push_str(&worst(outcome, style));
    text.push_str(&notes(outcome, style));
    text.push_str(&result(&judgement, style));
    text
}

fn head(outcome: &Outcome, style: Style) -> String {
    let plan = &outcome.plan;
    // If we started our own SFU it is named already.
    let version = outcome
        .target
        .server_version
        .as_deref()
        .filter(|_| !plan.target.is_embedded());
    let product = match outcome.target.kind {
        TargetKind::LiveKit => "LiveKit",
        TargetKind::Embedded => "throng sfu",
    };
    let server = version
        .map(|version| format!(", {product} {version}"))
        .unwrap_or_default();
    let title = format!(
        "{}{server}, {} connection",
        plan.target,
        plan.connection.name()
    );
    let layers = plan.media_of(Kind::Video).video_layers().len();
    let layers = (plan.scenario.publishers_of(Kind::Video) > 0 && layers > 1)
        .then(|| format!("{layers} layers"));
    let habits: Vec<String> = layers.into_iter().chain(habits(plan)).collect();
    let habits = if habits.is_empty() {
        String::new()
    } else {
        format!("  {}\n", habits.join(", "))
    };
    let pace = if plan.has_tiers() {
        format!(
            "tiers: {}\n  {}, seed {}",
            tiers_line(plan),
            tier_line(plan),
            plan.scenario.seed
        )
    } else {
        pace_line(plan)
    };
    let client = client(plan).map_or_else(String::new, |client| format!("  {client}\n"));
    format!(
        "{}\n  {}\n{client}  {}\n{habits}  {pace}\n\n",
        style.bold(&title),
        shape_line(plan),
        media_line(plan),
    )
}

fn shape_line(plan: &Plan) -> String {
    let total = u64::from(plan.total_participants());
    let rooms = u64::from(plan.scenario.rooms.count);
    let people = if rooms == 1 {
        people(plan)
    } else {
        format!("{} x ({})", count(rooms, "room"), people(plan))
    };
    let most = if plan.has_tiers() { "at most " } else { "" };
    match &plan.part {
        // In rooms that are shared with other hosts.
        Some(part) => format!(
            "{} here, of {people} on {}",
            count(total, "participant"),
            count(part.placement().vantages.len() as u64, "host")
        ),
        None => format!("{people} = {most}{}", count(total, "participant")),
    }
}

fn pace_line(plan: &Plan) -> String {
    if plan.has_tiers() {
        return format!(
            "tiers: {}, {}, seed {}",
            tiers_line(plan),
            tier_line(plan),
            plan.scenario.seed
        );
    }
    let warmup = if plan.scenario.times().warmup.is_zero() {
        String::new()
    } else {
        format!(" {} of warm-up,", duration(plan.scenario.times().warmup))
    };
    format!(
        "{} joins/s, then{warmup} {}, seed {}",
        rate(plan.scenario.joins_per_second),
        duration(plan.scenario.times().hold),
        plan.scenario.seed
    )
}

/// Formats the tiers, for example `2, 10, 25, 50 subscribers a room`.
fn tiers_line(plan: &Plan) -> String {
    if plan.scenario.search.is_some() {
        return format!(
            "as many as pass, up to {} a room",
            count(plan.scenario.subscribers().into(), "subscriber")
        );
    }
    const NAMED_MAX: usize = 6;
    let tiers: Vec<String> = plan
        .scenario
        .ramp_tiers()
        .iter()
        .take(NAMED_MAX)
        .map(ToString::to_string)
        .collect();
    let more = plan.scenario.ramp_tiers().len().saturating_sub(NAMED_MAX);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    format!("{}{more} subscribers a room", tiers.join(", "))
}

/// Formats the times of a tier, for example `each 50 joins/s, 2s to settle, 20s held`.
fn tier_line(plan: &Plan) -> String {
    let joins = match plan.scenario.times().spread {
        Some(time) => format!("{} of joining", duration(time)),
        None => format!("{} joins/s", rate(plan.scenario.joins_per_second)),
    };
    let warmup = if plan.scenario.times().warmup.is_zero() {
        String::new()
    } else {
        format!("{} of warm-up, ", duration(plan.scenario.times().warmup))
    };
    let longer = if plan.scenario.search.is_some() {
        " or longer"
    } else {
        ""
    };
    format!(
        "each {joins}, {warmup}{} held{longer}",
        duration(plan.scenario.times().hold)
    )
}

/// Formats a rate with at most three decimals, because a rate that follows from a time is seldom
/// round.
fn rate(per_second: f64) -> String {
    let rounded = (per_second * 1e3).round() / 1e3;
    if rounded > 0.0 {
        rounded.to_string()
    } else {
        per_second.to_string()
    }
}

fn tiers(outcome: &Outcome, style: Style) -> String {
    let mut table = tiers::table(
        outcome,
        |text| style.bold(text),
        |verdict, text| style.verdict(verdict, text),
    );
    if !table.is_empty() {
        let _ = writeln!(table, "{}\n", style.bold("The whole run"));
    }
    table
}

/// Formats the participants, for example `5 publishers + 45 subscribers`. If audio and video
/// publishers differ, the numbers of both are shown.
fn people(plan: &Plan) -> String {
    let people = plan.scenario.people();
    let (audio, video) = (people.audio_publishers, people.video_publishers);
    let mut parts = Vec::new();
    if people.publishers() > 0 {
        let detail = match (audio, video) {
            (audio, video) if audio == video => String::new(),
            (_, 0) => " of audio".to_owned(),
            (0, _) => " of video".to_owned(),
            (audio, video) => format!(" ({audio} audio, {video} video)"),
        };
        let role = if people.meeting {
            "member"
        } else {
            "publisher"
        };
        parts.push(format!(
            "{}{detail}",
            count(people.publishers().into(), role)
        ));
    }
    if people.subscribers > 0 {
        let most = if plan.has_tiers() { "up to " } else { "" };
        parts.push(format!(
            "{most}{}",
            count(people.subscribers.into(), "subscriber")
        ));
    }
    parts.join(" + ")
}

/// Every kind of media that somebody publishes.
fn media_line(plan: &Plan) -> String {
    let mut parts: Vec<String> = Vec::new();
    for kind in [Kind::Audio, Kind::Video] {
        let groups = plan.scenario.groups.iter();
        for group in groups.filter(|group| group.publishes(kind)) {
            let media = plan.scenario.media_of(group);
            let part = match kind {
                Kind::Audio => audio_line(&media.audio),
                Kind::Video => {
                    format!("VP8 {} {}", layer_line(&media.video), media.pacing.name())
                }
            };
            if !parts.contains(&part) {
                parts.push(part);
            }
        }
    }
    if parts.is_empty() {
        "nobody of this run publishes: what others send is judged".to_owned()
    } else {
        parts.join(", ")
    }
}

fn audio_line(audio: &AudioSpec) -> String {
    let codec = match audio.codec() {
        Codec::Red => "Opus with RED",
        _ => "Opus",
    };
    let frame = duration(audio.frame);
    format!("{codec} {} in {frame} frames", audio.bitrate)
}

fn layer_line(layer: &VideoSpec) -> String {
    format!(
        "{}x{} {} fps {}",
        layer.width, layer.height, layer.frames_per_second, layer.bitrate
    )
}

/// Behaviour of participants beyond sending and watching all the time.
fn habits(plan: &Plan) -> Vec<String> {
    let (audio, video) = (
        plan.scenario.publishers_of(Kind::Audio) > 0,
        plan.scenario.publishers_of(Kind::Video) > 0,
    );
    let layout = plan
        .layout()
        .filter(|_| video)
        .map(|layout| format!("{} layout", layout.name()));
    let turns =
        (plan.scenario.rooms.simulate_speakers && audio).then(|| "one speaks at a time".to_owned());
    let dtx = (plan.media_of(Kind::Audio).audio.dtx && audio)
        .then(|| "pauses are not sent (DTX)".to_owned());
    let restless = (!plan.media_of(Kind::Video).dynacast && video)
        .then(|| "all layers are sent, watched or not".to_owned());
    let adapts = (plan.viewers().adaptive_stream && video)
        .then(|| "subscribers say what they show".to_owned());
    let obeys = (plan.media_of(Kind::Video).obey_bandwidth && video)
        .then(|| "publishers obey their bandwidth".to_owned());
    [layout, adapts, turns, dtx, restless, obeys]
        .into_iter()
        .flatten()
        .collect()
}

fn judging_line(judging: &Judging) -> String {
    let mut parts = vec![format!("loss <= {} %", judging.max_loss_pct)];
    parts.extend(
        judging
            .target_rtt
            .map(|target| format!("session.rtt_rtcp.p95 <= {}", duration(target))),
    );
    parts.extend(judging.thresholds.iter().map(ToString::to_string));
    parts.join(", ")
}

fn rate_line(packets_per_second: f64, bits_per_second: f64) -> String {
    format!(
        "{} packets/s, {} on the wire",
        number(packets_per_second.round() as u64),
        scaled(bits_per_second, "bps")
    )
}

/// Transports of media, if it was not UDP alone.
fn transports_line(session: &Session) -> String {
    let by = [
        (session.joins_by_udp, "UDP"),
        (session.joins_by_tcp, "TCP"),
        (session.joins_by_turn_udp, "TURN by UDP"),
        (session.joins_by_turn_tcp, "TURN by TCP"),
        (session.joins_by_turn_tls, "TURN by TLS"),
    ];
    if by[1..].iter().all(|(count, _)| *count == 0) {
        return String::new();
    }
    let told = by.iter().filter(|(count, _)| *count > 0);
    let told: Vec<String> = told
        .map(|(count, name)| format!("{} over {name}", number(*count)))
        .collect();
    wrapped(&format!("media: {}", told.join(", ")), 11)
}

fn joins(outcome: &Outcome, style: Style) -> String {
    let session = &outcome.totals.record.session;
    let mut line = format!(
        "{} planned, {} ok, {} failed",
        number(session.joins_planned),
        number(session.joins_ok),
        number(session.joins_failed)
    );
    for (value, what) in [
        (session.joins_retried, "retried"),
        (session.disconnects, "disconnected later"),
    ] {
        if value > 0 {
            let _ = write!(line, ", {} {what}", number(value));
        }
    }
    let mut text = format!("{} {line}\n", style.bold("Joins     "));
    text.push_str(&transports_line(session));
    for (reason, times) in outcome.failures.iter().take(FAILURES_MAX) {
        text.push_str(&wrapped(&format!("{} x {reason}", number(*times)), 11));
    }
    if outcome.failures.len() > FAILURES_MAX {
        let _ = writeln!(
            text,
            "{:11}and {} more kinds of failure",
            "",
            outcome.failures.len() - FAILURES_MAX
        );
    }
    text.push('\n');
    text
}

type MediaCount = fn(&Media) -> u64;

/// The columns of the media table: audio, video and both. A kind that nobody publishes has no
/// column.
struct Columns<'a> {
    media: [&'a Media; 2],
    shown: [bool; 2],
    seconds: f64,
}

impl Columns<'_> {
    /// Formats a row whose total is the sum.
    fn sum(
        &self,
        label: &str,
        counter: fn(&Media) -> u64,
        print: impl Fn(u64) -> String,
    ) -> String {
        let [audio, video] = self.media.map(counter);
        self.row(label, [print(audio), print(video), print(audio + video)])
    }

    /// Formats a row whose total is computed from both kinds.
    fn loss(&self, label: &str, print: impl Fn(&LossShares) -> String) -> String {
        let [audio, video] = self.media;
        self.row(
            label,
            [
                LossShares::of(audio),
                LossShares::of(video),
                LossShares::counted([audio, video]),
            ]
            .map(|loss| print(&loss)),
        )
    }

    fn tracks_and_bytes(&self) -> String {
        let bytes = |bytes: u64| scaled(bytes as f64, "B");
        let bit_rate = |bytes: u64| self.bit_rate(bytes);
        [
            self.sum("Tracks published", |m| m.tracks_published, number),
            self.ratio(
                "Tracks live/expected",
                |m| m.tracks_live,
                |m| m.tracks_expected,
                |a, b| format!("{}/{}", number(a), number(b)),
            ),
            self.sum("Bytes Published", |m| m.bytes_sent, bytes),
            self.sum("  bit rate", |m| m.bytes_sent, bit_rate),
            self.sum("Bytes Received", |m| m.bytes_received, bytes),
            self.sum("  bit rate", |m| m.bytes_received, bit_rate),
        ]
        .concat()
    }

    fn packets(&self) -> String {
        let share =
            |part: u64, whole: u64| maybe((whole > 0).then(|| part as f64 / whole as f64), percent);
        let mut text = [
            self.sum("Packets sent", |m| m.packets_sent, number),
            self.sum("Packets received", |m| m.packets_received, number),
            self.loss("Packet Loss", |loss| maybe(loss.residual, percent)),
            self.loss("  missing on arrival", |loss| maybe(loss.network, percent)),
            self.missing_by_leg(),
            self.loss("  repaired", |loss| maybe(loss.repaired, percent)),
        ]
        .concat();
        let [audio, _] = self.media;
        text.push_str(&self.of_others());
        if audio.packets_received_red > 0 {
            text.push_str(&self.loss("  recovered (RED)", |loss| maybe(loss.recovered, percent)));
        }
        text.push_str(&self.ratio(
            "Packet Retransmission",
            |m| m.rtx_received,
            |m| m.packets_received,
            share,
        ));
        text
    }

    /// Packets that the server had missed itself, if it had missed any. The rest was lost behind
    /// it.
    fn missing_by_leg(&self) -> String {
        if self.media.iter().all(|m| m.uplink_packets_asked == 0) {
            return String::new();
        }
        let share =
            |part: u64, whole: u64| maybe((whole > 0).then(|| part as f64 / whole as f64), percent);
        let packets: MediaCount = |m| m.packets_received + m.packets_lost_network;
        let mut text = [
            self.ratio(
                "    on the uplink",
                |m| m.packets_missing_uplink,
                packets,
                share,
            ),
            self.ratio(
                "    behind the server",
                |m| {
                    m.packets_lost_network
                        .saturating_sub(m.packets_missing_uplink)
                },
                packets,
                share,
            ),
            self.ratio(
                "  asked for by the server",
                |m| m.uplink_packets_asked,
                |m| m.packets_sent,
                share,
            ),
        ]
        .concat();
        // Only a server that withdraws its requests for packets that came later tells what it never
        // got.
        let sum = |counter: MediaCount| self.media.iter().map(|m| counter(m)).sum::<u64>();
        if sum(|m| m.uplink_packets_lost) < sum(|m| m.uplink_packets_asked) {
            text.push_str(&self.ratio(
                "    and never got",
                |m| m.uplink_packets_lost,
                |m| m.packets_sent,
                share,
            ));
        }
        text
    }

    /// Rows for tracks published by nobody of this run, if any frames of them came.
    fn of_others(&self) -> String {
        if self.media.iter().all(|media| media.foreign_frames == 0) {
            return String::new();
        }
        let share =
            |part: u64, whole: u64| maybe((whole > 0).then(|| part as f64 / whole as f64), percent);
        let packets: MediaCount = |m| m.foreign_packets_received + m.foreign_packets_lost_network;
        [
            self.ratio(
                "Of others: tracks live",
                |m| m.foreign_tracks_live,
                |m| m.foreign_tracks_expected,
                |a, b| format!("{}/{}", number(a), number(b)),
            ),
            self.sum("  packets", |m| m.foreign_packets_received, number),
            self.ratio(
                "  missing on arrival",
                |m| m.foreign_packets_lost_network,
                packets,
                share,
            ),
            self.ratio("  lost", |m| m.foreign_packets_lost, packets, share),
            self.sum("  whole frames", |m| m.foreign_frames, number),
        ]
        .concat()
    }

    fn frames(&self) -> String {
        let freezes = if self.shown[0] {
            "Freezes (audio: a model's)"
        } else {
            "Freezes"
        };
        [
            self.sum("Frames expected", |m| m.frames_expected, number),
            self.sum("Frames delivered", |m| m.frames_delivered, number),
            self.loss("  undelivered", |loss| maybe(loss.undelivered, percent)),
            self.loss_places(),
            self.sum("  late", |m| m.frames_late, number),
            self.sum(freezes, |m| m.freezes, number),
        ]
        .concat()
    }

    fn subscribe_times(&self) -> String {
        let kinds = [("audio", self.media[0]), ("video", self.media[1])];
        let shown: Vec<String> = kinds
            .into_iter()
            .zip(self.shown)
            .filter(|(_, shown)| *shown)
            .map(|((kind, media), _)| format!("{kind} {}", triple(&media.track_subscribe)))
            .collect();
        if shown.is_empty() {
            "n/a".to_owned()
        } else {
            shown.join("   ")
        }
    }

    /// Places where frames were lost, if any were.
    fn loss_places(&self) -> String {
        let places: [(&str, MediaCount); 5] = [
            ("    never sent, source gone", |m| m.frames_lost_source),
            ("    on the uplink", |m| m.frames_lost_uplink),
            ("    in the SFU", |m| m.frames_lost_sfu),
            ("    on the downlink", |m| m.frames_lost_downlink),
            ("    cannot be told where", |m| m.frames_lost_unattributed),
        ];
        let lost_there = |counter: MediaCount| self.media.iter().any(|media| counter(media) > 0);
        let places = places
            .into_iter()
            .filter(|(_, counter)| lost_there(*counter));
        places
            .map(|(label, counter)| self.sum(label, counter, number))
            .collect()
    }

    /// Results of the models, if they are notable.
    fn playout(&self) -> String {
        let [audio, video] = self.media;
        let mut text = String::new();
        if audio.frames_late_for_playout + video.frames_late_for_playout > 0 {
            text.push_str(&self.sum(
                "  late for playout (model)",
                |m| m.frames_late_for_playout,
                number,
            ));
        }
        let to_play = audio.played_us + audio.concealed_us;
        let concealed = (to_play > 0).then(|| audio.concealed_us as f64 / to_play as f64);
        if let Some(concealed) = concealed.filter(|share| *share >= CONCEALED_NOTABLE) {
            text.push_str(&self.row(
                "Concealed (model)",
                [percent(concealed), "n/a".to_owned(), "n/a".to_owned()],
            ));
        }
        let poor = audio
            .mos
            .low_quantile(0.01)
            .is_none_or(|thousandths| thousandths < MOS_SATISFIED);
        if audio.mos.expected() > 0 && poor {
            let print = |thousandths: u64| format!("{:.2}", thousandths as f64 / 1e3);
            let score = |share: f64| {
                audio
                    .mos
                    .low_quantile(share)
                    .map_or_else(|| "never".to_owned(), print)
            };
            let _ = writeln!(
                text,
                "  MOS (E-model) 50/5/1 %/worst     {}",
                [0.5, 0.05, 0.01, 0.0].map(score).join("/")
            );
        }
        text
    }

    /// Formats a row of one counter by another: `part/whole`, or the share.
    fn ratio(
        &self,
        label: &str,
        part: fn(&Media) -> u64,
        whole: fn(&Media) -> u64,
        print: impl Fn(u64, u64) -> String,
    ) -> String {
        let (parts, wholes) = (self.media.map(part), self.media.map(whole));
        self.row(
            label,
            [
                print(parts[0], wholes[0]),
                print(parts[1], wholes[1]),
                print(parts.iter().sum(), wholes.iter().sum()),
            ],
        )
    }

    fn row(&self, label: &str, columns: [String; 3]) -> String {
        format!("  {label:<29}{}\n", self.cells(columns))
    }

    fn cells(&self, [audio, video, total]: [String; 3]) -> String {
        let shown = match self.shown {
            [true, false] => vec![audio],
            [false, true] => vec![video],
            _ => vec![audio, video, total],
        };
        shown.iter().map(|cell| format!(" {cell:>15}")).collect()
    }

    fn bit_rate(&self, bytes: u64) -> String {
        if self.seconds > 0.0 {
            scaled(bytes as f64 * 8.0 / self.seconds, "bps")
        } else {
            "n/a".to_owned()
        }
    }
}

fn media(outcome: &Outcome, style: Style) -> String {
    let record = &outcome.totals.record;
    let columns = Columns {
        media: [&record.audio, &record.video],
        shown: [Kind::Audio, Kind::Video].map(|kind| outcome.plan.scenario.publishers_of(kind) > 0),
        seconds: outcome.totals.seconds,
    };
    let heads = columns.cells(["audio", "video", "total"].map(str::to_owned));
    let mut text = format!("{}{heads}\n", style.bold(&format!("{:<31}", "Media")));
    text.push_str(&columns.tracks_and_bytes());
    text.push_str(&columns.packets());
    text.push_str(&columns.frames());
    text.push_str(&columns.playout());
    let _ = writeln!(
        text,
        "  Track Subscribe Time 50/90/99 %  {}",
        columns.subscribe_times()
    );
    let speaker_updates = record.session.speaker_updates;
    if speaker_updates > 0 {
        let _ = writeln!(
            text,
            "  Speaker updates received         {}",
            number(speaker_updates)
        );
    }
    text.push('\n');
    text
}

/// Formats three percentiles, for example `41/88/160 ms`.
fn triple(histogram: &Histogram) -> String {
    if histogram.expected() == 0 {
        return "n/a".to_owned();
    }
    let values = [0.5, 0.9, 0.99].map(|share| histogram.quantile(share));
    let in_seconds = values.iter().flatten().any(|us| *us >= 1_000_000);
    let print = |us: u64| match (in_seconds, us) {
        (true, us) => format!("{:.2}", us as f64 / 1e6),
        (false, us) if us < 10_000 => format!("{:.1}", us as f64 / 1e3),
        (false, us) => format!("{:.0}", us as f64 / 1e3),
    };
    let parts = values.map(|value| value.map_or_else(|| "never".to_owned(), print));
    let unit = if in_seconds { "s" } else { "ms" };
    if values[0].is_none() {
        "never".to_owned()
    } else {
        format!("{} {unit}", parts.join("/"))
    }
}

fn times(outcome: &Outcome, style: Style) -> String {
    let record = &outcome.totals.record;
    let (session, audio, video) = (&record.session, &record.audio, &record.video);
    let heads: String = QUANTILES
        .iter()
        .map(|(name, _)| *name)
        .chain(["max"])
        .map(|name| format!("{name:>9}"))
        .collect();
    let mut text = format!("{}{heads}\n", style.bold(&format!("{:<26}", "Times")));
    for (label, histogram) in [
        ("Join", &session.join),
        ("  signalling connected", &session.signal_connect),
        ("  signalling joined", &session.signal_join),
        ("  ICE connected", &session.ice),
        ("  DTLS connected", &session.dtls),
        ("  first media", &session.first_media),
        ("RTT by STUN", &session.rtt_stun),
        ("RTT by RTCP", &session.rtt_rtcp),
        ("RTT of signalling", &session.rtt_signal),
    ] {
        text.push_str(&times_row(label, histogram));
    }
    for (kind, name, media) in [(Kind::Audio, "Audio", audio), (Kind::Video, "Video", video)] {
        if media.foreign_one_way_latency.expected() > 0 {
            let label = format!("{name} latency of others");
            text.push_str(&times_row(&label, &media.foreign_one_way_latency));
        }
        if outcome.plan.scenario.publishers_of(kind) == 0 {
            continue;
        }
        text.push_str(&times_row(
            &format!("{name} one-way latency"),
            &media.one_way_latency,
        ));
        text.push_str(&times_row("  jitter", &media.jitter));
        if kind == Kind::Video {
            text.push_str(&times_row("  first frame", &media.first_frame));
        }
        // Events that need not happen are shown only if they did.
        for (label, histogram) in [
            ("  loss to repair", &media.loss_to_repair),
            ("  PLI to key frame sent", &media.pli_received_to_key_sent),
            ("  layer switch", &media.layer_switch),
        ] {
            if histogram.expected() > 0 {
                text.push_str(&times_row(label, histogram));
            }
        }
    }
    text.push('\n');
    text
}

fn times_row(label: &str, histogram: &Histogram) -> String {
    let quantiles = QUANTILES
        .iter()
        .map(|(_, share)| quantile(histogram, histogram.quantile(*share)));
    let columns: String = quantiles
        .chain([quantile(histogram, histogram.max())])
        .map(|value| format!("{value:>9}"))
        .collect();
    format!("  {label:<24}{columns}\n")
}

fn quantile(histogram: &Histogram, value: Option<u64>) -> String {
    match value {
        Some(us) => micros(us as f64),
        None if histogram.expected() == 0 => "n/a".to_owned(),
        None => "never".to_owned(),
    }
}

/// Returns what congestion control reported and did. Empty if it did neither.
fn bandwidth(counted: &Bandwidth, style: Style) -> String {
    let mut lines = Vec::new();
    if counted.transport_cc_sent + counted.transport_cc_received > 0 {
        lines.push(format!(
            "{} transport-cc sent, {} received",
            number(counted.transport_cc_sent),
            number(counted.transport_cc_received)
        ));
    }
    if counted.remb_sent + counted.remb_received > 0 {
        lines.push(format!(
            "{} REMB sent{}, {} received",
            number(counted.remb_sent),
            mean_kbps(counted.remb_sent_kbps, counted.remb_sent),
            number(counted.remb_received)
        ));
    }
    let paused = &counted.track_pause;
    if paused.expected() > 0 {
        lines.push(format!(
            "{} paused by the server, {} resumed, for {}",
            count(counted.tracks_paused, "track"),
            number(counted.tracks_resumed),
            seconds(paused.mean().unwrap_or_default() * paused.count() as f64 / 1e6)
        ));
    }
    if counted.layers_stepped_down > 0 {
        lines.push(format!(
            "{} down by the server, {} up",
            count(counted.layers_stepped_down, "layer step"),
            number(counted.layers_stepped_up)
        ));
    }
    if counted.uplink_estimates > 0 {
        lines.push(format!(
            "publishers obeyed their estimate{}, {} probes",
            mean_kbps(counted.uplink_estimate_kbps, counted.uplink_estimates),
            number(counted.probes_sent)
        ));
        lines.push(format!(
            "{} dropped, {} returned, limited for {}",
            count(counted.layers_dropped, "layer"),
            number(counted.layers_returned),
            seconds(counted.layer_limited_ms as f64 / 1e3)
        ));
    }
    let Some((first, others)) = lines.split_first() else {
        return String::new();
    };
    let mut text = format!("{} {first}\n", style.bold("Bandwidth "));
    for line in others {
        let _ = writeln!(text, "{:11}{line}", "");
    }
    text.push('\n');
    text
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.1} s")
}

/// Formats a mean, for example ` (mean 1.2 Mbps)`. Empty if there is none.
fn mean_kbps(sum: u64, count: u64) -> String {
    let mean = (sum * 1_000).checked_div(count).map(Bitrate::from_bps);
    mean.map(|mean| format!(" (mean {mean})"))
        .unwrap_or_default()
}

fn generator(outcome: &Outcome, style: Style) -> String {
    let (health, counted) = (&outcome.engine, &outcome.totals.record.engine);
    let mut text = format!("{} {}\n", style.bold("Generator "), costs(outcome));
    let pair = |histogram: &Histogram| {
        format!(
            "p50 {} p99 {}",
            quantile(histogram, histogram.quantile(0.5)),
            quantile(histogram, histogram.quantile(0.99))
        )
    };
    let floor = health
        .floor_tick_late
        .as_ref()
        .map(|floor| format!(" (a bare timer: {})", pair(floor)))
        .unwrap_or_default();
    let _ = writeln!(text, "  ticks late   {}{floor}", pair(&counted.tick_late));
    let _ = writeln!(
        text,
        "  send lag     {}, {} slots skipped",
        pair(&counted.send_lag),
        number(counted.send_slots_skipped)
    );
    text.push_str(&labelled("host drops", &drops(outcome)));
    for (label, line) in [("waits", waits(health)), ("stalls", stalls(health))] {
        if let Some(line) = line {
            text.push_str(&labelled(label, &line));
        }
    }
    if let Some(nearness) = outcome.nearness {
        let _ = writeln!(
            text,
            "  calibrated   busiest second {} of {} packets/s: {}",
            number(nearness.packets_per_second_peak as u64),
            number(nearness.packets_per_second_ceiling as u64),
            percent(nearness.share())
        );
    }
    text.push('\n');
    text
}

/// Whether the generator kept up, and its cost.
fn costs(outcome: &Outcome) -> String {
    let health = &outcome.engine;
    let wall = outcome
        .finished
        .saturating_sub(outcome.started)
        .as_secs_f64();
    let cores = if wall > 0.0 {
        maybe(health.cpu_seconds, |seconds| {
            format!("{:.2}", seconds / wall)
        })
    } else {
        "n/a".to_owned()
    };
    format!(
        "{}, {}, {cores} cores, {}/packet{}",
        if health.valid { "valid" } else { "INVALID" },
        count(health.threads as u64, "thread"),
        maybe(health.us_per_packet, |us| format!("{us:.2} us")),
        health
            .bytes_per_participant
            .map(|bytes| format!(", {}/participant", scaled(bytes as f64, "B")))
            .unwrap_or_default(),
    )
}

/// How long the engine waited for a CPU, if it is notable.
fn waits(health: &EngineHealth) -> Option<String> {
    const WORTH_A_WORD: f64 = 0.1;
    let engine = health
        .thread_times
        .iter()
        .filter(|thread| thread.name.starts_with("engine-"));
    let queued = engine
        .map(|thread| thread.run_queue_seconds)
        .reduce(f64::max);
    let parts = [
        (queued, "in the run queue (worst engine thread)"),
        (health.throttled_seconds, "throttled by a CPU quota"),
        (health.stolen_seconds, "taken by the hypervisor"),
    ];
    let parts: Vec<String> = parts
        .into_iter()
        .filter_map(|(seconds, what)| {
            Some(format!(
                "{:.2} s {what}",
                seconds.filter(|seconds| *seconds >= WORTH_A_WORD)?
            ))
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// For each side, how often and how long it stood still, and the worst standstill.
fn stalls(health: &EngineHealth) -> Option<String> {
    let of = |side: Side, name: &str| {
        let stalls: Vec<_> = health
            .stalls
            .iter()
            .filter(|stall| stall.side == side)
            .collect();
        let worst = stalls
            .iter()
            .max_by(|a, b| a.seconds.total_cmp(&b.seconds))?;
        let all: f64 = stalls.iter().map(|stall| stall.seconds).sum();
        let worst = format!("{} at {:.1} s", micros(worst.seconds * 1e6), worst.at);
        Some(if stalls.len() == 1 {
            format!("1 of {name}: {worst}")
        } else {
            format!(
                "{} of {name}: {} in all, worst {worst}",
                number(stalls.len() as u64),
                micros(all * 1e6)
            )
        })
    };
    let sides = [
        (Side::Generator, "the generator"),
        (Side::Host, "this host"),
        (Side::Server, "the server"),
    ];
    let parts: Vec<String> = sides
        .into_iter()
        .filter_map(|(side, name)| of(side, name))
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Formats a row of the generator's section, on as many lines as needed.
fn labelled(label: &str, line: &str) -> String {
    const INDENT: usize = 15;
    let lines = wrapped(line, INDENT);
    format!("  {label:<13}{}", lines.trim_start())
}

/// Returns what the embedded SFU reports about itself, if it was the target.
fn embedded_sfu(outcome: &Outcome, style: Style) -> String {
    let Some(sfu) = &outcome.sfu else {
        return String::new();
    };
    let wall = outcome
        .finished
        .saturating_sub(outcome.started)
        .as_secs_f64();
    let cores = sfu
        .cpu_seconds
        .filter(|_| wall > 0.0)
        .map(|seconds| seconds / wall);
    let sends = match sfu.send {
        SendMode::Plain => "one call a packet",
        SendMode::Gso => "segmented sends",
    };
    let media = &sfu.statistics.media;
    let mut text = format!(
        "{} {}, {} cores, {}/packet sent, {sends}\n",
        style.bold("Embedded SFU"),
        count(sfu.routers as u64, "router"),
        maybe(cores, |cores| format!("{cores:.2}")),
        maybe(sfu.us_per_packet_sent(), |us| format!("{us:.2} us")),
    );
    let _ = writeln!(
        text,
        "  packets      {} received, {} sent, {} sent again\n",
        number(media.media_in),
        number(media.media_out),
        number(media.resends_out)
    );
    text
}

fn drops(outcome: &Outcome) -> String {
    let places = outcome.engine.host_drops.places();
    let places: Vec<String> = places
        .iter()
        .filter_map(|(place, packets)| {
            Some(format!(
                "{} in {place}",
                number(packets.filter(|packets| *packets > 0)?)
            ))
        })
        .collect();
    if places.is_empty() {
        "0".to_owned()
    } else {
        places.join(", ")
    }
}

/// The participants among the worst one per cent that had a fault.
fn worst(outcome: &Outcome, style: Style) -> String {
    let ranked = worst::worst(&outcome.participants, outcome.judging.max_loss_pct);
    let unlucky: Vec<_> = ranked
        .iter()
        .filter(|ranked| !ranked.wrong.is_empty())
        .collect();
    if unlucky.is_empty() {
        return String::new();
    }
    let session = &outcome.totals.record.session;
    let mut text = format!(
        "{} {} of {} participants; the worst 1 %:\n",
        style.bold("Healthy   "),
        number(session.participants_healthy),
        number(session.participants_total)
    );
    for ranked in unlucky.iter().take(WORST_MAX) {
        text.push_str(&wrapped(
            &format!(
                "{}: {}",
                ranked.participant.identity,
                ranked.wrong.join("; ")
            ),
            2,
        ));
    }
    if unlucky.len() > WORST_MAX {
        let _ = writeln!(
            text,
            "  and {} more in the JSON report",
            number((unlucky.len() - WORST_MAX) as u64)
        );
    }
    text.push('\n');
    text
}

fn notes(outcome: &Outcome, style: Style) -> String {
    let notes = &outcome.notes;
    if notes.is_empty() {
        return String::new();
    }
    let mut text = format!("{}\n", style.bold("Notes"));
    notes
        .iter()
        .take(NOTES_MAX)
        .for_each(|note| text.push_str(&wrapped(note, 2)));
    if notes.len() > NOTES_MAX {
        let _ = writeln!(
            text,
            "  and {} more in the JSON report",
            notes.len() - NOTES_MAX
        );
    }
    text.push('\n');
    text
}

fn result(judgement: &Judgement, style: Style) -> String {
    let mut text = format!(
        "{}\n",
        style.verdict(
            judgement.verdict,
            &format!("RESULT: {}", judgement.verdict.name())
        )
    );
    judgement
        .reasons
        .iter()
        .take(REASONS_MAX)
        .for_each(|reason| text.push_str(&wrapped(reason, 2)));
    if judgement.reasons.len() > REASONS_MAX {
        let _ = writeln!(text, "  and {} more", judgement.reasons.len() - REASONS_MAX);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscribe_times_share_a_unit() {
        let mut histogram = Histogram::default();
        assert_eq!(triple(&histogram), "n/a");
        histogram.expect(10);
        assert_eq!(triple(&histogram), "never");
        (1..=9).for_each(|n| histogram.record_micros(n * 9_000));
        assert_eq!(triple(&histogram), "45/81/never ms");
    }
}
