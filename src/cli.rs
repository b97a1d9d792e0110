//! The command line: turns arguments and the environment into a [`CliCommand`] or a [`UsageError`].
//!
//! Nothing is clamped or guessed. Input that makes no sense is refused, with what to write instead.
//! Values that may hold secrets (`--url`, `--api-secret`) are never given to the parser to check,
//! because its messages repeat what they refuse.

mod coordinate;
mod hosts;
mod logs;

use std::ffi::OsString;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

pub use crate::coordinator::Coordinate;
use crate::plan::scenario::{
    MediaSpec, PhaseTimes, RoomPeople, RoomSet, SEED_MAX, Scenario, ScenarioError, spread_must_fit,
};
use crate::plan::{
    AudioSpec, ClientKind, ConnectionMode, Pacing, Plan, ServerUrl, Target, TargetOrigin,
    TransportChoice, TransportMix, VideoSpec, ViewLayout,
};
pub use crate::prober::Membership;
use crate::report::{Destinations, Judging, Threshold};
pub use crate::run::{Credentials, RunSpec};
use crate::secrets::{Secret, cleaned};
use crate::server_metrics::PageUrl;
use crate::sfu::SendMode;
use crate::signal::trust::TrustSpec;
use crate::signal::turn::{TurnServer, TurnUrl};
use crate::signal::{Gateway, GivenHeader, GivenToken, Seats, TokenPlace};
use crate::units::{Bitrate, NoDuration, read_duration};
use coordinate::CoordinateArgs;
use hosts::HostsArgs;
pub use logs::LogFilter;

/// Command that the user asked for, and the log that is written while it runs.
#[derive(Debug)]
pub struct Invocation {
    pub command: CliCommand,
    pub log: LogFilter,
}

/// Command that the user asked for.
#[derive(Debug)]
pub enum CliCommand {
    Run(Box<RunSpec>),
    Probe(Box<Probe>),
    Coordinate(Box<Coordinate>),
    Sfu(Box<Sfu>),
    Calibrate(Calibrate),
    /// Help or version: for standard output, exit code 0.
    Show(String),
}

/// One host of a run that a coordinator leads.
#[derive(Debug)]
pub struct Probe {
    pub config: Membership,
    /// Run from this host's own flags. The coordinator decides what is played. Here the embedded
    /// SFU as the target means that no server is named.
    pub run: RunSpec,
    /// Whether flags say who publishes what, for a coordinator that leaves that to its probers.
    pub shape_given: bool,
}

/// The embedded SFU alone, for real clients and for other processes of ours.
#[derive(Debug)]
pub struct Sfu {
    pub listen: SocketAddr,
    pub send: SendMode,
    /// Number of media threads. `None`: one a CPU, less the one for signalling.
    pub threads: Option<usize>,
    /// `None`: the well-known pair, on loopback only.
    pub credentials: Option<Credentials>,
    pub seed: u64,
}

/// Measurement of this host's own ceiling.
#[derive(Debug)]
pub struct Calibrate {
    /// Number of engine threads. `None`: as in a run.
    pub threads: Option<usize>,
    /// `-` is standard output.
    pub json: Option<PathBuf>,
    pub quiet: bool,
}

impl RunSpec {
    /// Gives every participant a token. The tokens also name the rooms.
    fn take_tokens(&mut self, given: Vec<GivenToken>, names_room: bool) -> Result<(), RefusedFlag> {
        if names_room {
            return Err("--room names a room, and so do the tokens: leave --room out".into());
        }
        let seats = Seats::assign(given, &self.plan).map_err(|why| format!("--token: {why}"))?;
        if self.plan.scenario.rooms.count == 1 {
            self.plan.scenario.rooms.name = seats.first_room().map(str::to_owned);
        }
        self.tokens = Some(seats);
        Ok(())
    }
}

impl Calibrate {
    pub fn destinations(&self) -> Destinations {
        Destinations {
            json: self.json.clone(),
            ..Destinations::default()
        }
    }
}

/// Error for a flag's value, or for flags that do not go together. The text says what to write
/// instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
struct RefusedFlag(String);

impl From<String> for RefusedFlag {
    fn from(sentence: String) -> RefusedFlag {
        RefusedFlag(sentence)
    }
}

impl From<&str> for RefusedFlag {
    fn from(sentence: &str) -> RefusedFlag {
        RefusedFlag(sentence.to_owned())
    }
}

/// Error returned when the command line is refused. It goes to standard error, with
/// [`UsageError::EXIT_CODE`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl UsageError {
    pub const EXIT_CODE: u8 = 2;

    /// Makes the error for flags that only later turn out to ask for something impossible.
    pub fn new(why: &impl fmt::Display) -> UsageError {
        UsageError(format!("error: {why}"))
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Reads arguments (the program's name first) and the environment, and draws the number that makes
/// this run differ from every other. `cpus` is how many CPUs this process may keep busy. It sizes a
/// run that asks for nothing.
///
/// # Errors
/// A text for the user, which ends without a newline.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: &dyn Fn(&str) -> Option<String>,
    cpus: usize,
) -> Result<Invocation, UsageError> {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    read(args, env, cpus, hasher.finish())
}

/// Reads a run from flags alone, with nothing from the environment. Its target is the embedded SFU,
/// whatever the user tests otherwise.
///
/// # Errors
/// As [`parse`], and if the flags ask for something else than a run.
pub fn parse_run(
    flags: impl IntoIterator<Item = String>,
    cpus: usize,
) -> Result<Box<RunSpec>, UsageError> {
    let line = std::iter::once("throng".to_owned()).chain(flags);
    match parse(line.map(Into::into), &|_| None, cpus)?.command {
        CliCommand::Run(run) => Ok(run),
        other => Err(UsageError(format!("not a run: {other:?}"))),
    }
}

/// As [`parse`], but without chance: `fresh` gives the run's tag (upper half), and the seed if none
/// is asked for (lower half).
///
/// # Errors
/// As [`parse`].
pub fn parse_with(
    args: impl IntoIterator<Item = OsString>,
    env: &dyn Fn(&str) -> Option<String>,
    cpus: usize,
    fresh: u64,
) -> Result<CliCommand, UsageError> {
    read(args, env, cpus, fresh).map(|invocation| invocation.command)
}

fn read(
    args: impl IntoIterator<Item = OsString>,
    env: &dyn Fn(&str) -> Option<String>,
    cpus: usize,
    fresh: u64,
) -> Result<Invocation, UsageError> {
    let cli = match Cli::try_parse_from(subcommand_first(args)) {
        Ok(cli) => cli,
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            return Ok(Invocation {
                command: CliCommand::Show(error.to_string()),
                log: LogFilter::default(),
            });
        }
        Err(error) => return Err(UsageError(error.to_string().trim_end().to_owned())),
    };
    let log = LogFilter::of(cli.verbose, env).map_err(|why| UsageError::new(&why.to_string()))?;
    let command = match cli.command {
        Some(Sub::Run(args)) => args.into_command(env, cpus, fresh),
        Some(Sub::Calibrate(args)) => Ok(CliCommand::Calibrate(Calibrate {
            threads: args.threads.map(usize::from),
            json: args.json,
            quiet: args.quiet,
        })),
        Some(Sub::Sfu(args)) => args
            .into_sfu(env, fresh)
            .map(|sfu| CliCommand::Sfu(Box::new(sfu))),
        None => cli.run.into_command(env, cpus, fresh),
    };
    command
        .map(|command| Invocation { command, log })
        .map_err(|why| UsageError::new(&why))
}

/// Turns `throng -v sfu` into `throng sfu -v`. After flags of a run clap accepts no subcommand, and
/// `-v` is a flag of all subcommands.
fn subcommand_first(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let is_flag = |arg: &OsString| {
        let text = arg.to_string_lossy();
        let letters = text.strip_prefix('-').unwrap_or_default();
        text == "--verbose" || !letters.is_empty() && letters.bytes().all(|b| b == b'v')
    };
    let mut args: Vec<OsString> = args.into_iter().collect();
    let flags = args.iter().skip(1).take_while(|arg| is_flag(arg)).count();
    if let Some(next) = args.get(1 + flags)
        && !next.to_string_lossy().starts_with('-')
    {
        args[1..=1 + flags].rotate_right(1);
    }
    args
}

const EXAMPLES: &str = "\
Examples:
  throng                                  nothing to install: 15 s against the embedded SFU
  throng --url ws://127.0.0.1:7880 --api-key devkey --api-secret ... --publishers 2 --subscribers 50
  throng --room-count 10 --publishers 1 --video-publishers 1 --subscribers 100 --duration 5m \\
         --threshold 'audio.one_way_latency.p95<150ms' --json run.json

Exit codes: 0 PASS, 1 could not run or PARTIAL, 2 usage, 98 INVALID (the generator was the limit), 99 FAIL.";

/// A synthetic-media load engine for WebRTC SFUs, LiveKit first.
#[derive(Debug, Parser)]
#[command(name = "throng", version, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Sub>,
    /// Log what goes on, a line an event on standard error: joins, leaves, refusals, stages; -vv:
    /// each detail [env: RUST_LOG, as in throng=info]
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Sub {
    /// A load test; what throng does without a subcommand
    #[command(after_help = EXAMPLES)]
    Run(Box<RunArgs>),
    /// The embedded SFU alone: LiveKit's signalling, for real clients and for a second throng
    Sfu(SfuArgs),
    /// What this host can generate, in under two minutes; later runs say how near they come to it
    Calibrate(CalibrateArgs),
}

#[derive(Debug, Args)]
struct CalibrateArgs {
    /// Engine threads [default: as in a run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// The result as JSON; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// No progress
    #[arg(long)]
    quiet: bool,
}

#[derive(Debug, Args)]
struct SfuArgs {
    /// Signalling, room service and metrics; media comes in at the same address, on a port of its
    /// own
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7880")]
    listen: SocketAddr,
    /// Datagrams one by one, as real SFUs send them, or those of a burst in one call
    #[arg(long, value_name = "HOW", default_value = "plain")]
    send: SendArg,
    /// Media threads; a room lives on one [default: one a CPU, less one for signalling]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// [env: LIVEKIT_API_KEY; default: devkey, on loopback only]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// 32 characters or more. Others on this host see what stands on a command line: rather
    /// --api-secret-file [env: LIVEKIT_API_SECRET]
    #[arg(long, value_name = "SECRET", conflicts_with = "api_secret_file")]
    api_secret: Option<String>,
    /// A file with nothing but the secret in it
    #[arg(long, value_name = "FILE")]
    api_secret_file: Option<PathBuf>,
    /// Ids and first sequence numbers come from this number, secrets never do; on loopback only
    /// [default: drawn]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=SEED_MAX))]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    media: MediaArgs,
    #[command(flatten)]
    pace: PaceArgs,
    #[command(flatten)]
    judging: JudgingArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    coordinate: CoordinateArgs,
    #[command(flatten)]
    hosts: HostsArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Target")]
struct TargetArgs {
    /// LiveKit server, ws(s):// or http(s):// [env: LIVEKIT_URL]
    #[arg(long)]
    url: Option<String>,
    /// [env: LIVEKIT_API_KEY]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Others on this host see what stands on a command line: rather --api-secret-file
    /// [env: LIVEKIT_API_SECRET]
    #[arg(long, value_name = "SECRET", conflicts_with = "api_secret_file")]
    api_secret: Option<String>,
    /// A file with nothing but the API secret in it
    #[arg(long, value_name = "FILE")]
    api_secret_file: Option<PathBuf>,
    /// A token for one participant, instead of an API key; repeatable. @FILE: one a line. Others
    /// on this host see what stands on a command line
    #[arg(long, value_name = "TOKEN")]
    token: Vec<String>,
    /// Trust the certificates in this file (PEM), too, also as the server's own; repeatable
    #[arg(long, value_name = "FILE", conflicts_with = "insecure")]
    ca_cert: Vec<PathBuf>,
    /// Trust whoever answers: no certificate is checked
    #[arg(long)]
    insecure: bool,
    /// A header for each request to the server, for a gateway in front of it; repeatable. Others on
    /// this host see what stands on a command line
    #[arg(long, value_name = "NAME:VALUE")]
    header: Vec<String>,
    /// Where the access token travels: in the Authorization header, or in the query where a gateway
    /// keeps that header for itself [default: header]
    #[arg(long, value_name = "WHERE")]
    token_in: Option<TokenInArg>,
    /// Media goes through this TURN server with --transport turn-udp, turn-tcp or turn-tls:
    /// turn:HOST:PORT, or turns:HOST:PORT for TLS; repeatable, one a way [default: those that the
    /// server names]
    #[arg(long, value_name = "URL")]
    turn: Vec<TurnUrl>,
    /// Who it is that uses it
    #[arg(long, value_name = "NAME")]
    turn_user: Option<String>,
    /// Others on this host see what stands on a command line: rather --turn-password-file
    #[arg(long, value_name = "PASSWORD", conflicts_with = "turn_password_file")]
    turn_password: Option<String>,
    /// A file with nothing but that password in it
    #[arg(long, value_name = "FILE")]
    turn_password_file: Option<PathBuf>,
    /// How the embedded SFU sends: a call a packet, as real ones do, or segmented by the kernel
    /// [default: plain]
    #[arg(long, value_name = "HOW")]
    sfu_send: Option<SendArg>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Shape, per room")]
struct ShapeArgs {
    /// Room; NAME-1, NAME-2.. for several [default: made for this run]
    #[arg(long, value_name = "NAME")]
    room: Option<String>,
    /// Rooms [default: 1]
    #[arg(long, value_name = "N", value_parser = whole_number)]
    room_count: Option<u32>,
    /// Publishers of audio
    #[arg(long, visible_alias = "audio-publishers", value_name = "N", value_parser = whole_number)]
    publishers: Option<u32>,
    /// Publishers of video: the same people as far as the numbers allow
    #[arg(long, value_name = "V", value_parser = whole_number)]
    video_publishers: Option<u32>,
    /// Participants who only subscribe
    #[arg(long, value_name = "N", value_parser = whole_number)]
    subscribers: Option<u32>,
    /// Publishers subscribe to each other, too
    #[arg(long)]
    meeting: bool,
    /// What identities begin with
    #[arg(long, value_name = "PREFIX", default_value = "throng")]
    identity_prefix: String,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Media")]
struct MediaArgs {
    /// Clients whose defaults the run has: js, rust, swift, android (LiveKit's SDKs), agent (a
    /// voice agent) or lk; a flag that is given wins. See docs/clients.md [default: lk]
    #[arg(long, value_name = "WHO", value_parser = client)]
    client: Option<ClientKind>,
    /// high (1280x720), medium (640x360), low (320x180) or WxH [default: high]
    #[arg(long, value_name = "SIZE", value_parser = resolution)]
    video_resolution: Option<Resolution>,
    /// Bitrate of a video track, as 1.5M [default: 2M, 600k, 150k by resolution, or what --client
    /// sends]
    #[arg(long, value_name = "RATE")]
    video_bitrate: Option<Bitrate>,
    /// Frames per second [default: 30, 20, 15 by resolution, or what --client sends]
    #[arg(long, value_name = "FPS", value_parser = whole_number)]
    video_fps: Option<u32>,
    #[arg(long, value_name = "CODEC", default_value = "vp8")]
    video_codec: VideoCodec,
    /// One layer a video track, not also smaller ones
    #[arg(long)]
    no_simulcast: bool,
    /// Publishers rest the layers that nobody watches [default: on, or what --client does]
    #[arg(long, value_name = "SWITCH")]
    dynacast: Option<SwitchArg>,
    /// Subscribers announce that they will say what they show, and start with the smallest layer;
    /// with --layout
    #[arg(long)]
    adaptive_stream: bool,
    /// What subscribers see: speaker, 3x3, 4x4 or 5x5 [default: every track as large as it comes]
    #[arg(long, value_name = "LAYOUT", value_parser = layout)]
    layout: Option<ViewLayout>,
    /// Bitrate of an audio track, as 24k or 48000 [default: 24k, or what --client sends]
    #[arg(long, value_name = "RATE")]
    audio_bitrate: Option<Bitrate>,
    /// Audio in one packet: 2.5ms, 5ms, 10ms .. 120ms [default: 20ms]
    #[arg(long, value_name = "TIME", value_parser = audio_frame)]
    audio_frame: Option<Duration>,
    /// Do not send the pauses of speech
    #[arg(long)]
    audio_dtx: bool,
    /// Send the pauses of speech, whatever --client does
    #[arg(long, conflicts_with = "audio_dtx")]
    no_audio_dtx: bool,
    /// Repeat the last packet of audio in each (RED, payload type 63), as browsers do
    #[arg(long)]
    audio_red: bool,
    /// Send each packet of audio once, whatever --client does
    #[arg(long, conflicts_with = "audio_red")]
    no_audio_red: bool,
    /// Audio publishers of a room take turns in speaking; the others are silent
    #[arg(long)]
    simulate_speakers: bool,
    /// Send a video frame's packets spread, as libwebrtc does, or at once
    #[arg(long, value_name = "HOW", default_value = "paced")]
    pacing: PacingArg,
    /// Publishers obey their bandwidth estimate: layers that do not fit are not sent until they do
    #[arg(long)]
    obey_bwe: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Pace")]
struct PaceArgs {
    /// Joins per second, whatever becomes of earlier ones [default: 50]
    #[arg(long, value_name = "R", value_parser = join_rate)]
    num_per_second: Option<f64>,
    /// Try a failed join again so often; its times count from when the first try was intended
    #[arg(long, value_name = "N", default_value = "0", value_parser = whole_number)]
    join_retries: u32,
    /// From the end of joining, of each tier: 20, 20s, 30m or 1h [default: 15s, 5s with
    /// --find-knee]
    #[arg(long, value_name = "TIME", value_parser = time_span)]
    duration: Option<Duration>,
    /// Tiers, one after the other: subscribers per room of this host, as 2,10,25,50; a smaller
    /// one: the last to join leave
    #[arg(long, value_name = "LIST", value_parser = ramp)]
    ramp: Option<Ramp>,
    /// Look for the most subscribers per room with which the run passes: grows, then halves, each
    /// point held for --duration or longer, until its verdict is settled
    #[arg(long)]
    find_knee: bool,
    /// With --find-knee: the most subscribers per room to try
    #[arg(long, value_name = "N", value_parser = whole_number)]
    max: Option<u32>,
    /// Spread the joins of each tier (without --ramp: all joins) over this, instead of
    /// --num-per-second
    #[arg(long, value_name = "TIME", value_parser = time_span)]
    ramp_time: Option<Duration>,
    /// Between joining and measuring, of each tier [default: 2s with --ramp or --find-knee, else
    /// 0]
    #[arg(long, value_name = "TIME", value_parser = time_span)]
    warmup: Option<Duration>,
}

/// Subscribers per room, tier by tier.
#[derive(Clone, Debug)]
struct Ramp(Vec<u32>);

#[derive(Debug, Args)]
#[command(next_help_heading = "Judging")]
struct JudgingArgs {
    /// Most loss of audio and of video: the worse of residual RTP loss and undelivered frames
    #[arg(long, value_name = "PCT", default_value = "1", value_parser = per_cent)]
    max_loss: f64,
    /// Most round-trip time: the 95th percentile of session.rtt_rtcp [default: not judged]
    #[arg(long, value_name = "MS", value_parser = target_rtt)]
    target_rtt_ms: Option<Duration>,
    /// Lets a run pass in which nothing came that could be judged: nobody publishes, and nobody
    /// else does
    #[arg(long)]
    allow_unjudged: bool,
    /// A limit on any figure of the report, as 'audio.one_way_latency.p95<150ms'; repeatable.
    /// Behind it 'for 2m': over every stretch of that length; ':abort': ends the run as failed
    /// as soon as it does not hold
    #[arg(long, value_name = "LIMIT")]
    threshold: Vec<Threshold>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
struct OutputArgs {
    /// JSON report; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// One JSON line a participant: its timeline and its quality
    #[arg(long, value_name = "FILE")]
    participants: Option<PathBuf>,
    /// Percentile files, one a histogram
    #[arg(long, value_name = "DIR")]
    hgrm: Option<PathBuf>,
    /// What the first subscriber of each room receives: Ogg and IVF files, one a track
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// The server's own Prometheus page, read beside ours for what a participant costs it; one a
    /// node, repeatable
    #[arg(long, value_name = "URL")]
    server_metrics: Vec<String>,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Progress as plain lines, not redrawn
    #[arg(long)]
    no_live: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Engine")]
struct EngineArgs {
    /// Engine threads [default: as many as this host bears]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Peer connections per participant: one (/rtc/v1), two (/rtc), or one where the server can
    /// [default: auto, or what --client does]
    #[arg(long, value_name = "MODE")]
    connection: Option<ConnectionArg>,
    /// What carries media: udp, tcp (the server's TCP port for media), turn-udp, turn-tcp or
    /// turn-tls (a relay that is reached so), or auto: udp and, where that does not come up within
    /// a second, tcp, and then a relay, as clients do. A mix by percent: udp:75,turn-tls:25
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    transport: TransportMix,
    /// So much of --transport goes through a TURN server instead: the one of --turn, or one that
    /// the server names and that is reached over UDP
    #[arg(long, value_name = "PCT%", value_parser = whole_percent)]
    turn_share: Option<u8>,
    /// Everything random comes from this number [default: drawn]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print the plan and connect to nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum VideoCodec {
    Vp8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PacingArg {
    Paced,
    Burst,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SendArg {
    Plain,
    Gso,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TokenInArg {
    Query,
    Header,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SwitchArg {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ConnectionArg {
    Auto,
    Single,
    Dual,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resolution {
    High,
    Medium,
    Low,
    Size(u16, u16),
}

impl RunArgs {
    fn into_command(
        self,
        env: &dyn Fn(&str) -> Option<String>,
        cpus: usize,
        fresh: u64,
    ) -> Result<CliCommand, RefusedFlag> {
        let is_one_of_many = self.coordinate.coordinator || self.hosts.coordinator(env).is_some();
        if is_one_of_many && !self.target.token.is_empty() {
            return Err(
                "--token is for a run on one host: hosts of a run over several get tokens from the coordinator, which takes --api-key and --api-secret"
                    .into(),
            );
        }
        if self.coordinate.coordinator {
            return self
                .into_coordinate(env, cpus, fresh)
                .map(|coordinate| CliCommand::Coordinate(Box::new(coordinate)));
        }
        self.coordinate.must_have_a_coordinator()?;
        if let Some(coordinator) = self.hosts.coordinator(env) {
            return self
                .into_probe(coordinator, env, cpus, fresh)
                .map(|probe| CliCommand::Probe(Box::new(probe)));
        }
        self.hosts.must_have_a_coordinator()?;
        self.into_run(env, cpus, fresh)
            .map(|run| CliCommand::Run(Box::new(run)))
    }

    fn into_run(
        self,
        env: &dyn Fn(&str) -> Option<String>,
        cpus: usize,
        fresh: u64,
    ) -> Result<RunSpec, RefusedFlag> {
        let target = self.target.resolve(env)?;
        if self.pace.most_subscribers().is_none() {
            self.shape.must_be_asked_for(&target)?;
        }
        let is_dry = self.engine.dry_run;
        let given = self.target.tokens()?;
        let credentials = if target.is_embedded() || !given.is_empty() {
            Ok(None)
        } else {
            self.target.credentials(env).map(Some)
        };
        let names_room = self.shape.room.is_some();
        let mut run = self.into_run_against(target, cpus, fresh)?;
        if !given.is_empty() {
            run.take_tokens(given, names_room)?;
        }
        Ok(RunSpec {
            credentials: if is_dry {
                credentials.ok().flatten()
            } else {
                credentials?
            },
            ..run
        })
    }

    /// Returns the run against `target`, without credentials.
    fn into_run_against(
        self,
        target: Target,
        cpus: usize,
        fresh: u64,
    ) -> Result<RunSpec, RefusedFlag> {
        let most = self.pace.most_subscribers();
        self.must_agree()?;
        let warnings = self.warnings();
        let transport = self.transport()?;
        let turn = self.target.turn_servers(&transport, target.is_embedded())?;
        if target.is_embedded()
            && transport
                .choices()
                .any(|choice| choice == TransportChoice::Tcp)
        {
            return Err("--transport tcp needs a server that takes media over TCP: the embedded SFU takes UDP alone (give --url)".into());
        }
        let is_tour = target.is_embedded() && !self.shape.is_given() && most.is_none();
        let unasked = if is_tour {
            tour_people(cpus)
        } else {
            DEFAULT_PEOPLE
        };
        let people = self.shape.resolve(self.media.usual(unasked), most)?;
        self.output.must_have_subscribers(&people)?;
        let server_metrics = self.output.server_metrics(&target)?;
        let (gateway, trust) = (self.target.gateway()?, self.target.trust());
        let scenario = self.scenario(people, is_tour, fresh & 0xFFFF_FFFF)?;
        self.judging.must_fit(scenario.times().hold)?;
        let plan = Plan::new(scenario, target, (fresh >> 32) as u32);
        Ok(RunSpec {
            plan,
            credentials: None,
            tokens: None,
            gateway,
            trust,
            turn,
            judging: Judging {
                max_loss_pct: self.judging.max_loss,
                target_rtt: self.judging.target_rtt_ms,
                thresholds: self.judging.threshold,
                allow_unjudged: self.judging.allow_unjudged,
            },
            destinations: self.output.destinations()?,
            server_metrics,
            threads: self.engine.threads.map(usize::from),
            dry_run: self.engine.dry_run,
            is_tour,
            quiet: self.output.quiet,
            no_live: self.output.no_live,
            warnings,
        })
    }

    /// Returns the scenario that the flags describe.
    fn scenario(
        &self,
        people: RoomPeople,
        is_tour: bool,
        fresh_seed: u64,
    ) -> Result<Scenario, RefusedFlag> {
        let times = self.pace.times(is_tour);
        let scenario = Scenario {
            seed: self.engine.seed.unwrap_or(fresh_seed),
            connection: self.connection(),
            identity_prefix: self.shape.identity_prefix.clone(),
            joins_per_second: self.joins_per_second(&people, is_tour)?,
            join_retries: self.pace.join_retries,
            rooms: self.shape.rooms(self.media.simulate_speakers),
            media: self.media.spec(),
            ..Scenario::of_people(people).over(&self.transport()?)
        };
        let scenario = match &self.pace.ramp {
            _ if self.pace.find_knee => scenario.capacity_search(times),
            Some(Ramp(tiers)) => scenario.ramp(tiers, times),
            None => scenario.single(times),
        };
        match scenario.validate() {
            Ok(()) => Ok(scenario),
            Err(ScenarioError { field, fault }) => {
                Err(format!("{} {fault}", self.flag_of(&field)).into())
            }
        }
    }

    /// Returns the flag that sets a field of the scenario.
    fn flag_of<'f>(&self, field: &'f str) -> &'f str {
        match field {
            "seed" => "--seed",
            "identity_prefix" => "--identity-prefix",
            "joins_per_second" if self.pace.ramp_time.is_some() => "--ramp-time: a rate of",
            "joins_per_second" => "--num-per-second",
            "rooms.name" => "--room",
            "rooms.count" => "--room-count",
            "media.audio.bitrate" => "--audio-bitrate",
            "media.audio.frame" => "--audio-frame",
            "media.adaptive_stream" => "--adaptive-stream",
            "media.video.size" => "--video-resolution",
            "media.video.frames_per_second" => "--video-fps",
            "media.video.bitrate" => "--video-bitrate",
            "groups" => "--publishers, --video-publishers and --subscribers",
            "phases" => "--ramp",
            "search.max_subscribers" => "--max",
            _ if field.ends_with(".hold") => "--duration",
            _ if field.ends_with(".warmup") => "--warmup",
            _ if field.ends_with(".spread") => "--ramp-time",
            _ if field.ends_with(".subscribers") => "--ramp",
            _ => field,
        }
    }

    fn connection(&self) -> ConnectionMode {
        let of_client = self.media.client().defaults().connection;
        self.engine.connection.map_or(of_client, Into::into)
    }

    fn joins_per_second(&self, people: &RoomPeople, is_tour: bool) -> Result<f64, RefusedFlag> {
        let unasked = if is_tour {
            tour_join_rate(people)
        } else {
            DEFAULT_JOIN_RATE
        };
        // Without tiers the time is for all joins together.
        let spread = self.pace.ramp_time;
        let Some(spread) = spread.filter(|_| self.pace.most_subscribers().is_none()) else {
            return Ok(self.pace.num_per_second.unwrap_or(unasked));
        };
        spread_must_fit(spread).map_err(|fault| format!("--ramp-time {fault}"))?;
        let participants = people.participants() as f64 * f64::from(self.shape.room_count());
        Ok(participants / spread.as_secs_f64())
    }

    /// Refuses flags that say the same thing twice, or that do not go together.
    fn must_agree(&self) -> Result<(), RefusedFlag> {
        if self.pace.ramp.is_some() && self.shape.subscribers.is_some() {
            return Err(
                "--ramp says how many subscribers there are, tier by tier: leave out --subscribers"
                    .into(),
            );
        }
        match (self.pace.find_knee, self.pace.max) {
            (true, None) => {
                return Err(
                    "--find-knee needs an end: add --max N, the most subscribers per room to try"
                        .into(),
                );
            }
            (false, Some(_)) => {
                return Err("--max is for --find-knee: add that, or write --subscribers".into());
            }
            (true, Some(_)) if self.pace.ramp.is_some() => {
                return Err("--find-knee chooses its own tiers: leave out --ramp".into());
            }
            (true, Some(_)) if self.shape.subscribers.is_some() => {
                return Err("--find-knee chooses how many subscribers there are, up to --max: leave out --subscribers".into());
            }
            _ => {}
        }
        if self.pace.find_knee
            && let Some(threshold) = self
                .judging
                .threshold
                .iter()
                .find(|threshold| threshold.aborts)
        {
            return Err(format!(
                "--threshold '{threshold}' would end the search at its first point that fails: leave out :abort"
            ).into());
        }
        if self.pace.ramp_time.is_some() && self.pace.num_per_second.is_some() {
            return Err(
                "--ramp-time and --num-per-second both say how fast people join: give one of them"
                    .into(),
            );
        }
        Ok(())
    }

    /// Returns a warning for each flag that changes nothing in the requested run.
    fn warnings(&self) -> Vec<String> {
        let (shape, media) = (&self.shape, &self.media);
        let mut warnings = Vec::new();
        let mut useless = |flag: &str, given: bool, why: &str| {
            if given {
                warnings.push(format!("{flag} has no effect: {why}"));
            }
        };
        if shape.is_given() && shape.video_publishers.unwrap_or(0) == 0 {
            let why = "nobody publishes video (--video-publishers)";
            useless("--video-resolution", media.video_resolution.is_some(), why);
            useless("--video-bitrate", media.video_bitrate.is_some(), why);
            useless("--video-fps", media.video_fps.is_some(), why);
            useless("--no-simulcast", media.no_simulcast, why);
            useless("--dynacast", media.dynacast.is_some(), why);
            useless("--adaptive-stream", media.adaptive_stream, why);
            useless("--layout", media.layout.is_some(), why);
            useless("--obey-bwe", media.obey_bwe, why);
        }
        if shape.is_given() && shape.publishers.unwrap_or(0) == 0 {
            let why = "nobody publishes audio (--publishers)";
            useless("--audio-bitrate", media.audio_bitrate.is_some(), why);
            useless("--audio-frame", media.audio_frame.is_some(), why);
            useless("--audio-dtx", media.audio_dtx, why);
            useless("--no-audio-dtx", media.no_audio_dtx, why);
            useless("--audio-red", media.audio_red, why);
            useless("--no-audio-red", media.no_audio_red, why);
            useless("--simulate-speakers", media.simulate_speakers, why);
        }
        warnings
    }
}

impl SfuArgs {
    fn into_sfu(
        self,
        env: &dyn Fn(&str) -> Option<String>,
        fresh: u64,
    ) -> Result<Sfu, RefusedFlag> {
        let is_local = self.listen.ip().is_loopback();
        if self.seed.is_some() && !is_local {
            return Err(format!(
                "--seed is for tests on this host: leave it out to listen on {}",
                self.listen
            )
            .into());
        }
        let credentials = self.credentials(env)?;
        if credentials.is_none() && !is_local {
            return Err(format!(
                "everybody knows the default key: to listen on {}, give --api-key and --api-secret, or set LIVEKIT_API_KEY and LIVEKIT_API_SECRET",
                self.listen
            ).into());
        }
        Ok(Sfu {
            listen: self.listen,
            send: self.send.into(),
            threads: self.threads.map(usize::from),
            credentials,
            seed: self.seed.unwrap_or(fresh),
        })
    }

    /// Returns the API key and secret from the flags, or from the environment if a flag is not
    /// given. `None` if neither names them.
    fn credentials(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Option<Credentials>, RefusedFlag> {
        /// Minimum length of a secret. HS256 is only as strong as its name says with that many
        /// characters, and many JWT libraries refuse fewer.
        const SECRET_CHARACTERS_MIN: usize = 32;
        let given = |value: Option<String>, flag, name| match value {
            Some(value) => Some((trimmed(value), flag)),
            None => set(env, name).map(|value| (trimmed(value), name)),
        };
        let key = given(self.api_key.clone(), "--api-key", "LIVEKIT_API_KEY");
        let secret = secret_given(
            &self.api_secret,
            self.api_secret_file.as_deref(),
            "--api-secret-file",
        )?;
        let secret = given(secret, "--api-secret", "LIVEKIT_API_SECRET");
        let lonely = |there: &str, flag: &str, name: &str| {
            format!(
                "an API key and its secret belong together, and only {there} is given: add {flag} or set {name}, or leave both out"
            )
        };
        let ((api_key, key_name), (api_secret, secret_name)) = match (key, secret) {
            (Some(key), Some(secret)) => (key, secret),
            (None, None) => return Ok(None),
            (Some((_, there)), None) => {
                return Err(lonely(there, "--api-secret", "LIVEKIT_API_SECRET").into());
            }
            (None, Some((_, there))) => {
                return Err(lonely(there, "--api-key", "LIVEKIT_API_KEY").into());
            }
        };
        if api_key.is_empty() || api_key.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(format!("{key_name} takes a name without spaces").into());
        }
        if api_secret.chars().count() < SECRET_CHARACTERS_MIN {
            return Err(
                format!("{secret_name} takes {SECRET_CHARACTERS_MIN} characters or more").into(),
            );
        }
        Ok(Some(Credentials {
            api_key,
            api_secret,
        }))
    }
}

impl TargetArgs {
    fn resolve(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<Target, RefusedFlag> {
        match self.server(env)? {
            Some(target) => Ok(target),
            None => self.embedded(),
        }
    }

    /// Returns the server that a flag or the environment names, if one does.
    fn server(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<Option<Target>, RefusedFlag> {
        let given = self
            .url
            .clone()
            .map(|url| (url, TargetOrigin::Flag, "--url"));
        let given = given.or_else(|| {
            set(env, "LIVEKIT_URL").map(|url| (url, TargetOrigin::Environment, "LIVEKIT_URL"))
        });
        let Some((url, origin, name)) = given else {
            return Ok(None);
        };
        if self.sfu_send.is_some() {
            return Err(format!(
                "--sfu-send is for the embedded SFU, but {name} names another server: leave one of them out"
            ).into());
        }
        let url: ServerUrl = url.trim().parse().map_err(|why| format!("{name} {why}"))?;
        Ok(Some(Target { url, origin }))
    }

    fn embedded(&self) -> Result<Target, RefusedFlag> {
        for (flag, given) in [
            ("--api-key", self.api_key.is_some()),
            ("--api-secret", self.api_secret.is_some()),
            ("--api-secret-file", self.api_secret_file.is_some()),
            ("--token", !self.token.is_empty()),
            ("--ca-cert", !self.ca_cert.is_empty()),
            ("--insecure", self.insecure),
            ("--header", !self.header.is_empty()),
            ("--token-in", self.token_in.is_some()),
        ] {
            if given {
                return Err(format!(
                    "{flag} is for a server, and none is named: add --url (or leave it out to test the embedded SFU)"
                ).into());
            }
        }
        Ok(Target::embedded(
            self.sfu_send.unwrap_or(SendArg::Plain).into(),
        ))
    }

    /// Returns the tokens that were given, read from files where files were named. No error repeats
    /// a token.
    fn tokens(&self) -> Result<Vec<GivenToken>, RefusedFlag> {
        let mut tokens = Vec::new();
        let mut read = |text: &str, place: &str| {
            let token = GivenToken::read(text).map_err(|why| format!("{place} {why}"))?;
            tokens.push(token);
            Ok::<_, RefusedFlag>(())
        };
        for (at, given) in self.token.iter().enumerate() {
            let Some(path) = cleaned(given).strip_prefix('@') else {
                read(cleaned(given), &format!("--token number {}", at + 1))?;
                continue;
            };
            let text = std::fs::read_to_string(path)
                .map_err(|error| format!("--token @{path} cannot be read: {error}"))?;
            let lines = text.lines().map(cleaned).enumerate();
            for (number, line) in
                lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
            {
                read(line, &format!("--token @{path}, line {},", number + 1))?;
            }
        }
        if tokens.is_empty() && !self.token.is_empty() {
            return Err("--token: there is no token in what was given".into());
        }
        Ok(tokens)
    }

    /// Returns whether a flag names a key or a secret.
    fn names_credentials(&self) -> bool {
        self.api_key.is_some() || self.api_secret.is_some() || self.api_secret_file.is_some()
    }

    /// Returns what a gateway in front of the server requires: headers, and the place of the token.
    fn gateway(&self) -> Result<Gateway, RefusedFlag> {
        let mut headers = Vec::new();
        for text in &self.header {
            let header: GivenHeader = text.parse().map_err(|why| format!("--header {why}"))?;
            headers.push(header);
        }
        let token_in = match self.token_in {
            Some(TokenInArg::Query) => TokenPlace::Query,
            Some(TokenInArg::Header) | None => TokenPlace::Header,
        };
        if token_in == TokenPlace::Header && headers.iter().any(GivenHeader::is_authorization) {
            return Err(
                "--header Authorization takes the place of the access token: add --token-in query"
                    .into(),
            );
        }
        Ok(Gateway { headers, token_in })
    }

    fn trust(&self) -> TrustSpec {
        TrustSpec {
            ca_files: self.ca_cert.clone(),
            insecure: self.insecure,
        }
    }

    fn credentials(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Credentials, RefusedFlag> {
        let or_env = |flag: Option<String>, name| {
            flag.map(trimmed)
                .filter(|value| !value.is_empty())
                .or_else(|| set(env, name).map(trimmed))
                .filter(|value| !value.is_empty())
        };
        let api_secret = secret_given(
            &self.api_secret,
            self.api_secret_file.as_deref(),
            "--api-secret-file",
        )?;
        let missing =
            |flag, name| format!("the server wants credentials: give {flag} or set {name}");
        Ok(Credentials {
            api_key: or_env(self.api_key.clone(), "LIVEKIT_API_KEY")
                .ok_or_else(|| missing("--api-key", "LIVEKIT_API_KEY"))?,
            api_secret: or_env(api_secret, "LIVEKIT_API_SECRET")
                .ok_or_else(|| missing("--api-secret-file, --api-secret", "LIVEKIT_API_SECRET"))?,
        })
    }
}

fn trimmed(text: String) -> String {
    cleaned(&text).to_owned()
}

/// Returns a secret from a flag, or from the file that another flag names. No error repeats it.
fn secret_given(
    flag: &Option<String>,
    file: Option<&Path>,
    name: &str,
) -> Result<Option<String>, RefusedFlag> {
    let Some(path) = file else {
        return Ok(flag.clone());
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("{name} {} cannot be read: {error}", path.display()))?;
    match trimmed(text) {
        empty if empty.is_empty() => {
            Err(format!("{name} {} is empty: it is to hold a secret", path.display()).into())
        }
        secret if secret.contains(char::is_whitespace) => Err(format!(
            "{name} {} holds more than one word: it is to hold a secret and nothing else",
            path.display()
        )
        .into()),
        secret => Ok(Some(secret)),
    }
}

/// Number of audio publishers, video publishers and subscribers if a server is named and no flag
/// gives these numbers. It is enough to see that everything works.
const DEFAULT_PEOPLE: (u32, u32, u32) = (1, 1, 10);
const DEFAULT_JOIN_RATE: f64 = 50.0;
const DEFAULT_DURATION: Duration = Duration::from_secs(15);
/// Hold of each point of a search. It is short, because a search has many points, and points in
/// doubt are held longer.
const POINT_DURATION: Duration = Duration::from_secs(5);
/// Warm-up of a tier. What is sent adapts to who is there: layers that nobody watched start, and
/// bandwidth estimates rise.
const TIER_WARMUP: Duration = Duration::from_secs(2);

/// Time for joining in a run with no flags. Such a run shows what this host can do in about 15
/// seconds, of which joining takes 3.
const TOUR_JOINING_SECONDS: f64 = 3.0;
const TOUR_DURATION: Duration = Duration::from_secs(10);

/// Returns the people of a run with no flags: publishers as in a meeting, and as many subscribers
/// as a host of that size carries with ease.
fn tour_people(cpus: usize) -> (u32, u32, u32) {
    const SUBSCRIBERS_PER_CPU: usize = 100;
    const SUBSCRIBERS_MAX: usize = 600;
    (
        3,
        1,
        (SUBSCRIBERS_PER_CPU * cpus).min(SUBSCRIBERS_MAX) as u32,
    )
}

fn tour_join_rate(people: &RoomPeople) -> f64 {
    (people.participants() as f64 / TOUR_JOINING_SECONDS).ceil()
}

/// Returns the value of a variable. An empty one counts as unset.
fn set(env: &dyn Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    env(name).filter(|value| !value.is_empty())
}

impl PaceArgs {
    /// Returns the largest number of subscribers per room, if they come tier by tier.
    fn most_subscribers(&self) -> Option<u32> {
        self.max.or_else(|| {
            self.ramp
                .as_ref()
                .and_then(|Ramp(tiers)| tiers.iter().max().copied())
        })
    }

    fn times(&self, is_tour: bool) -> PhaseTimes {
        let has_tiers = self.most_subscribers().is_some();
        let hold = if is_tour {
            TOUR_DURATION
        } else if self.find_knee {
            POINT_DURATION
        } else {
            DEFAULT_DURATION
        };
        let warmup = if has_tiers {
            TIER_WARMUP
        } else {
            Duration::ZERO
        };
        PhaseTimes {
            spread: self.ramp_time.filter(|_| has_tiers),
            warmup: self.warmup.unwrap_or(warmup),
            hold: self.duration.unwrap_or(hold),
        }
    }
}

impl ShapeArgs {
    /// Returns whether any flag says how many people there are.
    fn is_given(&self) -> bool {
        self.publishers.is_some() || self.video_publishers.is_some() || self.subscribers.is_some()
    }

    /// Refuses a run that gives no load, if its server is not this host and was not named on this
    /// command line. Such a server must not get a load that nobody asked for.
    fn must_be_asked_for(&self, target: &Target) -> Result<(), RefusedFlag> {
        if self.is_given() || target.origin == TargetOrigin::Flag || target.url.is_loopback() {
            return Ok(());
        }
        Err(format!(
            "LIVEKIT_URL names {}, which is not this host, and nothing says how much load it should get.\n\
             Add the load, for instance: --publishers 1 --video-publishers 1 --subscribers 10",
            target.url
        ).into())
    }

    /// Returns the people of a room. `unasked` is the number of audio publishers, video publishers
    /// and subscribers if no flag gives a number. `most` is the number of subscribers if other
    /// flags determine it.
    fn resolve(
        &self,
        unasked: (u32, u32, u32),
        most: Option<u32>,
    ) -> Result<RoomPeople, RefusedFlag> {
        let (audio_publishers, video_publishers, subscribers) = if self.is_given() {
            (
                self.publishers.unwrap_or(0),
                self.video_publishers.unwrap_or(0),
                self.subscribers.unwrap_or(0),
            )
        } else {
            unasked
        };
        if self.room_count.is_some() && !self.is_given() && most.is_none() {
            return Err(
                "--room-count says how many rooms, but not who is in them: add --publishers, --video-publishers or --subscribers (per room)"
                    .into(),
            );
        }
        let people = RoomPeople {
            audio_publishers,
            video_publishers,
            subscribers: most.unwrap_or(subscribers),
            meeting: self.meeting,
        };
        if people.meeting && people.publishers() == 0 {
            return Err("--meeting is for publishers who subscribe to each other: add --publishers or --video-publishers".into());
        }
        Ok(people)
    }

    fn rooms(&self, simulate_speakers: bool) -> RoomSet {
        RoomSet {
            name: self.room.clone(),
            count: self.room_count(),
            simulate_speakers,
        }
    }

    fn room_count(&self) -> u32 {
        self.room_count.unwrap_or(1)
    }
}

impl MediaArgs {
    fn client(&self) -> ClientKind {
        self.client.unwrap_or_default()
    }

    /// Returns the people of a room if no flag says how many, without publishers of video if the
    /// client publishes none.
    fn usual(&self, (audio, video, subscribers): (u32, u32, u32)) -> (u32, u32, u32) {
        if self.client().defaults().publishes_video {
            (audio, video, subscribers)
        } else {
            (audio, 0, subscribers)
        }
    }

    fn spec(&self) -> MediaSpec {
        let defaults = self.client().defaults();
        let video = self.video();
        let dynacast = self.dynacast.map(|switch| switch == SwitchArg::On);
        MediaSpec {
            client: self.client(),
            simulcast: !self.no_simulcast,
            pacing: self.pacing.into(),
            obey_bandwidth: self.obey_bwe,
            dynacast: dynacast.unwrap_or(defaults.dynacast),
            layout: self.layout,
            adaptive_stream: self.adaptive_stream || defaults.adaptive_stream,
            audio: self.audio(),
            video,
            lower_layers: defaults.lower_layers(video),
        }
    }

    fn audio(&self) -> AudioSpec {
        let standard = self.client().defaults().audio;
        let redundancy = standard.redundancy.max(u8::from(self.audio_red));
        AudioSpec {
            bitrate: self.audio_bitrate.unwrap_or(standard.bitrate),
            frame: self.audio_frame.unwrap_or(standard.frame),
            dtx: (standard.dtx || self.audio_dtx) && !self.no_audio_dtx,
            redundancy: redundancy * u8::from(!self.no_audio_red),
        }
    }

    fn video(&self) -> VideoSpec {
        let VideoCodec::Vp8 = self.video_codec;
        let standard = self.video_resolution.unwrap_or(Resolution::High).spec();
        let defaults = self.client().defaults();
        if let Some(top) = defaults.top_layer(standard.width, standard.height) {
            return VideoSpec {
                frames_per_second: self.video_fps.unwrap_or(top.frames_per_second),
                bitrate: self.video_bitrate.unwrap_or(top.bitrate),
                ..top
            };
        }
        let frames_per_second = self.video_fps.unwrap_or(standard.frames_per_second);
        // The bitrate is proportional to the frame rate.
        let scaled = standard.bitrate.bps() * u64::from(frames_per_second)
            / u64::from(standard.frames_per_second);
        VideoSpec {
            frames_per_second,
            bitrate: self.video_bitrate.unwrap_or(Bitrate::from_bps(scaled)),
            ..standard
        }
    }
}

impl Resolution {
    /// Returns one of lk's three sizes with its rates. Any other size gets 720p's bits per pixel at
    /// 30 frames a second.
    fn spec(self) -> VideoSpec {
        let (width, height, frames_per_second, bps) = match self {
            Resolution::High => (1280, 720, 30, 2_000_000),
            Resolution::Medium => (640, 360, 20, 600_000),
            Resolution::Low => (320, 180, 15, 150_000),
            Resolution::Size(width, height) => (
                width,
                height,
                30,
                u64::from(width) * u64::from(height) * 2_000_000 / (1280 * 720),
            ),
        };
        VideoSpec {
            width,
            height,
            frames_per_second,
            bitrate: Bitrate::from_bps(bps),
        }
    }
}

impl From<SendArg> for SendMode {
    fn from(send: SendArg) -> SendMode {
        match send {
            SendArg::Plain => SendMode::Plain,
            SendArg::Gso => SendMode::Gso,
        }
    }
}

impl From<PacingArg> for Pacing {
    fn from(pacing: PacingArg) -> Pacing {
        match pacing {
            PacingArg::Paced => Pacing::Paced,
            PacingArg::Burst => Pacing::Burst,
        }
    }
}

impl From<ConnectionArg> for ConnectionMode {
    fn from(connection: ConnectionArg) -> ConnectionMode {
        match connection {
            ConnectionArg::Auto => ConnectionMode::Auto,
            ConnectionArg::Single => ConnectionMode::Single,
            ConnectionArg::Dual => ConnectionMode::Dual,
        }
    }
}

/// Reads a percentage such as `25%`.
fn whole_percent(text: &str) -> Result<u8, &'static str> {
    let number = text.strip_suffix('%').and_then(|text| text.parse().ok());
    let in_range = number.filter(|percent| (1..=100).contains(percent));
    in_range.ok_or("write a whole percentage from 1% to 100%")
}

impl RunArgs {
    /// Returns the transports that carry the media of participants.
    fn transport(&self) -> Result<TransportMix, RefusedFlag> {
        let mix = &self.engine.transport;
        let Some(percent) = self.engine.turn_share else {
            return Ok(mix.clone());
        };
        let named = self.target.turn.first().map(TurnUrl::as_choice);
        let relay = named.unwrap_or(TransportChoice::TurnUdp);
        match mix.only() {
            Some(choice) if !choice.is_relay() => {
                Ok(TransportMix::with_share(choice, relay, percent))
            }
            Some(_) => Err("--turn-share is of what goes without a TURN server: --transport udp, tcp or auto".into()),
            None => Err(format!(
                "--turn-share and the mix of --transport {mix} say the same: put the share into the mix"
            )
            .into()),
        }
    }
}

impl TargetArgs {
    /// Returns the relays that the user named.
    fn turn_servers(
        &self,
        transport: &TransportMix,
        is_embedded: bool,
    ) -> Result<Vec<TurnServer>, RefusedFlag> {
        if self.turn.is_empty() {
            let flags = [
                ("--turn-user", self.turn_user.is_some()),
                ("--turn-password", self.turn_password.is_some()),
                ("--turn-password-file", self.turn_password_file.is_some()),
            ];
            if let Some((flag, _)) = flags.iter().find(|(_, given)| *given) {
                return Err(format!("{flag} belongs to --turn URL: give both, or neither").into());
            }
            let relay = transport.choices().find(|choice| choice.is_relay());
            return match relay.filter(|_| is_embedded) {
                Some(relay) => Err(format!(
                    "--transport {} needs --turn URL: the embedded SFU names no TURN server",
                    relay.name()
                )
                .into()),
                None => Ok(Vec::new()),
            };
        }
        self.turn_must_be_used(transport)?;
        let password = secret_given(
            &self.turn_password,
            self.turn_password_file.as_deref(),
            "--turn-password-file",
        )?;
        let (Some(user), Some(password)) = (self.turn_user.clone(), password) else {
            return Err(
                "--turn needs --turn-user, and --turn-password-file or --turn-password".into(),
            );
        };
        let server = |url: &TurnUrl| TurnServer {
            url: url.clone(),
            user: user.clone(),
            password: Secret::new(password.clone()),
        };
        Ok(self.turn.iter().map(server).collect())
    }

    /// Checks that each transport through a relay has a relay, and that each relay is used.
    fn turn_must_be_used(&self, transport: &TransportMix) -> Result<(), RefusedFlag> {
        if !transport.choices().any(TransportChoice::allows_relay) {
            return Err(
                "--turn needs --transport auto, turn-udp, turn-tcp or turn-tls, or --turn-share: without them nothing goes there"
                    .into(),
            );
        }
        for choice in transport.choices().filter(|choice| choice.is_relay()) {
            let fits = self.turn.iter().map(|url| url.clone().over(choice));
            let mut misfits = Vec::new();
            for fit in fits {
                match fit {
                    Ok(_) => misfits.clear(),
                    Err(why) => misfits.push(why),
                }
                if misfits.is_empty() {
                    break;
                }
            }
            if let Some(why) = misfits.first() {
                return Err(why.to_string().into());
            }
        }
        for url in &self.turn {
            let is_used = |choice: TransportChoice| {
                choice.is_auto() || choice.is_relay() && url.clone().over(choice).is_ok()
            };
            if !transport.choices().any(is_used) {
                return Err(
                    format!("--turn {url}: nothing of --transport {transport} goes there").into(),
                );
            }
        }
        Ok(())
    }
}

impl JudgingArgs {
    /// Refuses a threshold whose window is longer than what is measured, because it would say
    /// nothing.
    fn must_fit(&self, duration: Duration) -> Result<(), RefusedFlag> {
        let windows = self
            .threshold
            .iter()
            .filter_map(|threshold| Some((threshold, threshold.window?)));
        match windows.into_iter().find(|(_, window)| *window > duration) {
            None => Ok(()),
            Some((threshold, _)) => Err(format!(
                "--threshold '{threshold}' looks at longer stretches than the {} that are measured: raise --duration",
                humantime::format_duration(duration)
            ).into()),
        }
    }
}

impl OutputArgs {
    fn destinations(&self) -> Result<Destinations, RefusedFlag> {
        let dash =
            |path: &Option<PathBuf>| path.as_deref().is_some_and(|path| path.as_os_str() == "-");
        if dash(&self.participants) || dash(&self.hgrm) || dash(&self.record) {
            return Err("only --json takes - for standard output".into());
        }
        if self.json.is_some() && self.json == self.participants {
            return Err("--json and --participants name the same file".into());
        }
        Ok(Destinations {
            json: self.json.clone(),
            participants: self.participants.clone(),
            hgrm: self.hgrm.clone(),
            record: self.record.clone(),
        })
    }

    fn server_metrics(&self, target: &Target) -> Result<Vec<PageUrl>, RefusedFlag> {
        if target.is_embedded() && !self.server_metrics.is_empty() {
            return Err(
                "--server-metrics is for a server with a page of its own: the embedded SFU's account is in the report anyway. Leave it out, or name the server with --url"
                    .into(),
            );
        }
        let read = |text: &String| {
            text.parse()
                .map_err(|why| RefusedFlag(format!("--server-metrics {why}")))
        };
        self.server_metrics.iter().map(read).collect()
    }

    fn must_have_subscribers(&self, people: &RoomPeople) -> Result<(), RefusedFlag> {
        if self.record.is_some() && people.subscribers == 0 && !people.meeting {
            return Err(
                "--record writes what a subscriber receives, and nobody subscribes: add --subscribers 1, or --meeting for publishers who do"
                    .into(),
            );
        }
        Ok(())
    }
}

fn resolution(text: &str) -> Result<Resolution, RefusedFlag> {
    match text {
        "high" => return Ok(Resolution::High),
        "medium" => return Ok(Resolution::Medium),
        "low" => return Ok(Resolution::Low),
        _ => {}
    }
    let side = |text: &str| text.parse().ok();
    let sides = text
        .split_once('x')
        .and_then(|(width, height)| Some(Resolution::Size(side(width)?, side(height)?)));
    sides.ok_or_else(|| "write high, medium, low or WIDTHxHEIGHT with sides of 16 to 4096".into())
}

fn client(text: &str) -> Result<ClientKind, RefusedFlag> {
    let known = ClientKind::ALL
        .into_iter()
        .find(|client| client.name() == text);
    known.ok_or_else(|| "write js, rust, swift, android, agent or lk".into())
}

fn layout(text: &str) -> Result<ViewLayout, RefusedFlag> {
    let known = ViewLayout::ALL
        .into_iter()
        .find(|layout| layout.name() == text);
    known.ok_or_else(|| "write speaker, 3x3, 4x4 or 5x5".into())
}

/// Reads a time in milliseconds. The unit may be left out.
fn audio_frame(text: &str) -> Result<Duration, RefusedFlag> {
    let with_unit = format!("{}ms", text.strip_suffix("ms").unwrap_or(text));
    read_duration(&with_unit).map_err(|_| "write a time in milliseconds, as in 20ms".into())
}

fn time_span(text: &str) -> Result<Duration, NoDuration> {
    read_duration(text)
}

fn ramp(text: &str) -> Result<Ramp, RefusedFlag> {
    let tiers = text.split(',').map(|tier| {
        tier.trim()
            .parse()
            .ok()
            .filter(|_| tier.bytes().all(|b| b.is_ascii_digit() || b == b' '))
    });
    let tiers: Option<Vec<u32>> = tiers.collect();
    tiers
        .map(Ramp)
        .ok_or_else(|| "write whole numbers with commas between them, as in 2,10,25,50".into())
}

fn whole_number(text: &str) -> Result<u32, RefusedFlag> {
    text.parse()
        .map_err(|_| "write a whole number of 0 to 4294967295".into())
}

/// Reads a plain decimal number: no sign, no exponent, no `nan`.
fn decimal(text: &str) -> Option<f64> {
    text.parse()
        .ok()
        .filter(|_| text.bytes().all(|b| b.is_ascii_digit() || b == b'.'))
}

fn join_rate(text: &str) -> Result<f64, RefusedFlag> {
    decimal(text).ok_or_else(|| "write a rate of joins, as in 50 or 0.5".into())
}

fn per_cent(text: &str) -> Result<f64, RefusedFlag> {
    decimal(text.strip_suffix('%').unwrap_or(text))
        .filter(|pct| *pct <= 100.0)
        .ok_or_else(|| "write a percentage of 0 to 100".into())
}

fn target_rtt(text: &str) -> Result<Duration, RefusedFlag> {
    let millis = decimal(text.strip_suffix("ms").unwrap_or(text))
        .filter(|ms| (0.001..=60_000.0).contains(ms));
    millis
        .map(|ms| Duration::from_secs_f64(ms / 1e3))
        .ok_or_else(|| "write milliseconds, 0.001 to 60000".into())
}
