//! Participants in a room of a real server, without a plan. Each can be asked to do things while it
//! is in the room.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use throng::engine::publisher::Pacing;
use throng::engine::worker::{self, ShardWorkerConfig, WorkerReport};
use throng::engine::{PeerKey, PeerOutcome, Roster, ShardCommand, ShardConfig, VIDEO_TRACK};
use throng::measure::Record;
use throng::media::identity::Origin;
use throng::plan::{ClientKind, ParticipantPlan, VideoSpec};
use throng::signal::session::{
    self, GroupContext, Media, Notice, Request, Sections, SessionContext, ShardPlace,
};
use throng::transport::peer::Identity;
use throng::units::Epoch;
use tokio::sync::{mpsc, watch};

use super::pair::{audio, layers};
use super::server::Server;

/// Longest wait for any state. A state that is not reached by then never will be.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
const RUN: u32 = 0x1A7E_2500;

/// Participants of one room. The first publishes audio and three layers of video, and subscribes to
/// nothing.
pub struct People {
    pub roster: Arc<Roster>,
    requests: Vec<mpsc::UnboundedSender<Request>>,
    commands: Sender<ShardCommand>,
    reports: mpsc::UnboundedReceiver<WorkerReport>,
    notices: mpsc::UnboundedReceiver<Notice>,
    leave: watch::Sender<bool>,
    worker: JoinHandle<std::io::Result<()>>,
    record: Record,
    // Last, because everything above may still use it while it is dropped.
    _runtime: tokio::runtime::Runtime,
}

impl People {
    /// Joins a publisher and this many subscribers. Returns once all of them are in and receive the
    /// video.
    pub fn join(server: &Server, subscribers: u32, single_connection: bool) -> People {
        People::join_as(server, subscribers, single_connection, true)
    }

    /// The same with a publisher that rests layers that nobody watches (dynacast), or does not.
    pub fn join_as(
        server: &Server,
        subscribers: u32,
        single_connection: bool,
        dynacast: bool,
    ) -> People {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (epoch, identity, count) = (
            Epoch::read(),
            Identity::generate().unwrap(),
            subscribers + 1,
        );
        let roster = Arc::new(Roster::new(RUN, (0..count).map(|_| 0)));
        let (command_sender, commands) = channel();
        let (report_sender, reports) = mpsc::unbounded_channel();
        let (notice_sender, notices) = mpsc::unbounded_channel();
        let (leave, leaving) = watch::channel(false);
        let config = ShardWorkerConfig {
            index: 0,
            cpu: None,
            capacity: 2 * count as usize,
            shard: ShardConfig {
                identity: identity.clone(),
                roster: roster.clone(),
                epoch,
            },
            commands,
            reports: report_sender,
            spare_records: channel().1,
        };
        let layers = layers();
        let context = Arc::new(SessionContext {
            endpoint: server.endpoint(),
            access: server.api_key().into(),
            epoch,
            roster: roster.clone(),
            fingerprint: identity.fingerprint(),
            video_layers: layers.iter().map(video_spec).collect(),
            groups: vec![GroupContext {
                media: Media {
                    audio: Some(audio()),
                    audio_redundancy: 0,
                    states_no_dtx: false,
                    video: layers.to_vec(),
                    taking_turns: None,
                    pacing: Pacing::Paced,
                },
                client: &ClientKind::Lk.defaults().identity,
                dynacast,
                layout: None,
                adaptive_stream: false,
                obey_bandwidth: false,
            }],
            turn: Vec::new(),
            routes: throng::path::Routes::default(),
            receive_buffer_bytes: 1 << 20,
            single_connection,
            join_retries: 0,
            shards: vec![command_sender.clone()],
            notices: notice_sender,
            strangers: Arc::default(),
            leave: leaving,
        });
        let worker = std::thread::spawn(move || worker::run(config));
        let requests = (0..count).map(|index| {
            let (sender, receiver) = mpsc::unbounded_channel();
            let place = ShardPlace {
                shard: 0,
                key: PeerKey(2 * index as usize),
            };
            let ahead = Sections {
                audio: u32::from(index > 0),
                video: u32::from(index > 0),
            };
            runtime.spawn(session::run(
                context.clone(),
                participant(index),
                "people".into(),
                place,
                epoch.now(),
                ahead,
                receiver,
            ));
            sender
        });
        let mut people = People {
            requests: requests.collect(),
            roster,
            commands: command_sender,
            reports,
            notices,
            leave,
            worker,
            record: Record::default(),
            _runtime: runtime,
        };
        people.wait_until("all are in and see the publisher", |record| {
            record.session.joins_ok == u64::from(count)
                && record.video.tracks_live == u64::from(subscribers)
        });
        people
    }

    pub fn ask(&self, index: usize, request: Request) {
        self.requests[index].send(request).unwrap();
    }

    /// Returns what has been counted so far.
    pub fn record(&mut self) -> &Record {
        self.commands.send(ShardCommand::Report).unwrap();
        std::thread::sleep(POLL);
        while let Ok(report) = self.reports.try_recv() {
            self.record.merge(&report.record);
        }
        while let Ok(notice) = self.notices.try_recv() {
            match notice {
                Notice::Joined { .. } => self.record.session.joins_ok += 1,
                Notice::SpeakersChanged => self.record.session.speaker_updates += 1,
                Notice::JoinFailed { reason, .. } | Notice::Disconnected { reason, .. } => {
                    panic!("{reason}")
                }
                _ => {}
            }
        }
        &self.record
    }

    /// Waits until the record fulfils a condition. The time that it takes decides nothing.
    pub fn wait_until(&mut self, what: &str, done: impl Fn(&Record) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self.record()) {
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        }
    }

    /// Number of frames that the publisher has sent, by layer.
    pub fn frames(&self) -> [u32; 3] {
        let origin = Origin {
            publisher: 0,
            track: VIDEO_TRACK,
        };
        [0, 1, 2].map(|layer| self.roster.frames(origin, layer))
    }

    /// Waits until the publisher's frame counts fulfil a condition.
    pub fn wait_for_frames(&mut self, what: &str, done: impl Fn([u32; 3]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self.frames()) {
            assert!(
                Instant::now() < deadline,
                "not within {PATIENCE:?}: {what}, {:?}",
                self.frames()
            );
            self.record();
        }
    }

    /// Stops the media, waits until what is on its way has arrived, and returns the record and the
    /// outcomes.
    pub fn finish(mut self) -> (Record, Vec<PeerOutcome>) {
        self.commands.send(ShardCommand::StopPublishing).unwrap();
        std::thread::sleep(Duration::from_millis(1_000));
        self.record();
        self.commands.send(ShardCommand::Stop).unwrap();
        self.worker.join().unwrap().unwrap();
        let mut outcomes = Vec::new();
        while let Ok(report) = self.reports.try_recv() {
            self.record.merge(&report.record);
            outcomes.extend(report.outcomes.into_iter().flatten());
        }
        self.leave.send(true).unwrap();
        (self.record, outcomes)
    }
}

fn video_spec(source: &throng::engine::publisher::MediaSource) -> VideoSpec {
    let throng::engine::publisher::MediaSource::Video(clip) = source else {
        panic!("no video")
    };
    let spec = clip.spec();
    VideoSpec {
        width: spec.width as u16,
        height: spec.height as u16,
        frames_per_second: spec.fps,
        bitrate: spec.bitrate,
    }
}

fn participant(index: u32) -> ParticipantPlan {
    ParticipantPlan {
        group: 0,
        index,
        position: index,
        room: 0,
        place: index,
        identity: format!("person-{index}"),
        publishes_audio: index == 0,
        publishes_video: index == 0,
        subscribes: index > 0,
        transport: throng::plan::TransportChoice::Auto,
        join_offset: Duration::ZERO,
        seed: 0x5EED_0000_0000 + 0x1_0000_0000 * u64::from(index),
    }
}
