//! The participants' sessions: how they are started, and how they are asked to leave.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::dues::Dues;
use super::threads::Home;
use super::{Clips, Test};
use crate::engine::{ShardCommand, ShardConfig};
use crate::measure::Kind;
use crate::path::Routes;
use crate::plan::{ConnectionMode, ParticipantPlan, Plan, Span, Subscribers};
use crate::preflight;
use crate::signal::session::{
    self, GroupContext, Media, Notice, Request, Sections, SessionContext, ShardPlace, Strangers,
    TakingTurns,
};
use crate::signal::turn::TurnServer;
use crate::signal::{Endpoint, JoinAccess};
use crate::units::{Epoch, Time};

/// Time between the end of a visit in the books and the next one, so that they do not touch.
const REPLACE_DELAY: Duration = Duration::from_millis(5);

pub(super) struct Crew {
    /// Set as long as anybody may still join. After that only the sessions share it.
    context: Option<Arc<SessionContext>>,
    pub notices: mpsc::UnboundedReceiver<Notice>,
    /// Publishers that are not of this run, where their media is judged.
    pub strangers: Arc<Strangers>,
    leave: watch::Sender<bool>,
    requests: BTreeMap<u32, mpsc::UnboundedSender<Request>>,
}

/// Pace at which a row of participants joins or leaves.
#[derive(Clone, Copy)]
struct JoinPace {
    first_at: Time,
    /// Time between two joins or leaves, in seconds.
    interval: f64,
}

impl JoinPace {
    fn moment(self, place: u32) -> Time {
        self.first_at + Duration::from_secs_f64(f64::from(place) * self.interval)
    }
}

/// A participant that will join.
struct Entrance {
    intended: Time,
    participant: ParticipantPlan,
    room: String,
    place: ShardPlace,
    tracks_ahead: Sections,
    requests: mpsc::UnboundedReceiver<Request>,
}

/// A participant that will leave.
struct Exit {
    at: Time,
    requests: mpsc::UnboundedSender<Request>,
    home: Home,
}

impl Crew {
    pub fn muster(
        plan: &Plan,
        shard: &ShardConfig,
        shards: Vec<Sender<ShardCommand>>,
        (endpoint, access): (Endpoint, JoinAccess),
        (clips, turn): (Clips, Vec<TurnServer>),
    ) -> Crew {
        let (notice_sender, notices) = mpsc::unbounded_channel();
        let (leave, leaving) = watch::channel(false);
        let strangers = Arc::new(if plan.is_audience() {
            Strangers::in_rooms(plan.scenario.rooms.count)
        } else {
            Strangers::default()
        });
        let context = SessionContext {
            strangers: strangers.clone(),
            endpoint,
            access,
            epoch: shard.epoch,
            roster: shard.roster.clone(),
            fingerprint: shard.identity.fingerprint(),
            groups: groups(plan, &clips),
            video_layers: plan.media_of(Kind::Video).video_layers(),
            single_connection: plan.connection == ConnectionMode::Single,
            join_retries: plan.scenario.join_retries,
            turn,
            routes: Routes::default(),
            receive_buffer_bytes: preflight::receive_buffer_bytes(plan) as usize,
            shards,
            notices: notice_sender,
            leave: leaving,
        };
        Crew {
            context: Some(Arc::new(context)),
            notices,
            strangers,
            leave,
            requests: BTreeMap::new(),
        }
    }

    /// Returns the identity and the room that a participant's token names, where it was given.
    pub fn seat(&self, position: u32) -> Option<(String, String)> {
        let (identity, room) = self.context.as_ref()?.access.seat(position)?;
        Some((identity.to_owned(), room.to_owned()))
    }

    /// Asks every participant to leave, and starts no more sessions.
    pub fn dismiss_all(&mut self) {
        self.context = None;
        // The send fails if every session has ended already.
        let _ = self.leave.send(true);
    }
}

impl Test<'_> {
    /// Changes the number of participants to that many subscribers and all publishers. Each joins
    /// at its intended moment, whatever became of earlier ones. Leaving goes in the reverse order.
    /// The first join or leave is not before `start`, and all of them lie within `spread`, or
    /// follow the plan's pace.
    pub(super) fn admit(
        &mut self,
        subscribers: Subscribers,
        start: Option<Time>,
        spread: Option<Duration>,
    ) {
        let before = self.books.presence.due_count();
        let wanted = self.plan.participants_with(subscribers);
        let moves = wanted.abs_diff(before);
        let interval = match spread {
            Some(spread) => spread.as_secs_f64() / f64::from(moves.max(1)),
            None => 1.0 / self.plan.scenario.joins_per_second,
        };
        // Only the first tier joins in one row with the publishers.
        let after = if self.books.tiers.is_empty() {
            self.stages.next_join_at
        } else {
            Time::ZERO
        };
        let first_at = start.unwrap_or_else(|| self.epoch.now()).max(after);
        let pace = JoinPace { first_at, interval };
        self.stages.next_join_at = pace.moment(moves);
        if wanted < before {
            self.dismiss(wanted, pace);
        } else {
            self.invite(&(before..wanted).collect::<Vec<_>>(), pace);
        }
    }

    /// Starts the sessions of joining participants, each at its moment.
    fn invite(&mut self, joining: &[u32], pace: JoinPace) {
        let Some(context) = self.crew.context.clone() else {
            return;
        };
        let joining = (0..).zip(joining);
        let joining: Vec<(u32, Time)> = joining
            .map(|(place, position)| (*position, pace.moment(place)))
            .collect();
        for (position, intended) in &joining {
            let participant = self.plan.participant(*position);
            self.books.presence.invite(&participant, *intended);
        }
        // The tracks owed to each participant depend on when all of them are to be present.
        self.expect(&joining);
        let entrances = joining.into_iter();
        let entrances: Vec<Entrance> = entrances
            .map(|(position, intended)| self.entrance(position, intended))
            .collect();
        let leave = self.crew.leave.subscribe();
        tokio::spawn(let_in(context, entrances, leave));
    }

    /// Lets those join again that have ended though they are due. So a participant that the server
    /// sent away in one point of a search is not missing in all later ones.
    pub(super) fn replace_gone(&mut self, spread: Option<Duration>) {
        let now = self.epoch.now();
        let ended = &self.books.sessions.ended;
        let due = self.books.presence.due();
        let gone: Vec<(u32, u32)> = self
            .plan
            .participants()
            .filter(|one| due.contains(&one.index) && ended.contains_key(&one.index))
            .map(|one| (one.position, one.index))
            .collect();
        for (position, index) in &gone {
            self.books.presence.dismiss(*index, now);
            // The session has ended. The shard has to be told that nothing is owed any more.
            self.threads.home(*position).leave();
        }
        let interval = match spread {
            Some(spread) => spread.as_secs_f64() / (gone.len().max(1) as f64),
            None => 1.0 / self.plan.scenario.joins_per_second,
        };
        let first_at = self.stages.next_join_at.max(now) + REPLACE_DELAY;
        let positions: Vec<u32> = gone.iter().map(|(position, _)| *position).collect();
        self.invite(&positions, JoinPace { first_at, interval });
    }

    /// Notes the tracks that the joins at these positions should bring.
    fn expect(&mut self, joining: &[(u32, Time)]) {
        let books = &mut self.books;
        let window = Span::since(Time::ZERO);
        let dues = Dues::within(self.plan, &books.presence.book, window);
        for (position, intended) in joining {
            let participant = self.plan.participant(*position);
            books.joins_new.add(&dues, &participant, *intended);
            books.joins_all.add(&dues, &participant, *intended);
        }
    }

    /// Notes a participant as joining, and returns what its session needs.
    fn entrance(&mut self, position: u32, intended: Time) -> Entrance {
        let participant = self.plan.participant(position);
        let books = &mut self.books;
        books.sessions.come(participant.index);
        let (sender, requests) = mpsc::unbounded_channel();
        self.crew.requests.insert(participant.index, sender);
        let [audio, video] =
            [Kind::Audio, Kind::Video].map(|kind| self.plan.tracks_ahead(&participant, kind));
        Entrance {
            intended,
            room: self.plan.room_name(participant.room),
            participant,
            place: self.threads.place(position),
            tracks_ahead: Sections { audio, video },
            requests,
        }
    }

    /// Makes all but the first `stayers` participants leave, each at its moment, the last one
    /// first.
    fn dismiss(&mut self, stayers: u32, pace: JoinPace) {
        let first = self.plan.participant(stayers).index;
        let leaving = self.crew.requests.split_off(&first);
        let sessions = &mut self.books.sessions;
        // Do not wait for participants that have ended on their own.
        let here = leaving
            .keys()
            .filter(|index| !sessions.ended.contains_key(index));
        sessions.leaving.extend(here);
        let positions = (stayers..stayers + leaving.len() as u32).rev();
        let leavers = leaving.into_iter().rev().zip(positions);
        let mut exits = Vec::new();
        for (place, ((index, requests), position)) in (0..).zip(leavers) {
            let at = pace.moment(place);
            self.books.presence.dismiss(index, at);
            exits.push(Exit {
                at,
                requests,
                home: self.threads.home(position),
            });
        }
        let leave = self.crew.leave.subscribe();
        tokio::spawn(see_out(self.epoch, exits, leave));
    }
}

async fn let_in(
    context: Arc<SessionContext>,
    entrances: Vec<Entrance>,
    mut leave: watch::Receiver<bool>,
) {
    for entrance in entrances {
        let at = tokio::time::Instant::from_std(context.epoch.instant(entrance.intended));
        tokio::select! {
            () = tokio::time::sleep_until(at) => {}
            () = session::leaving(&mut leave) => return,
        }
        tokio::spawn(session::run(
            context.clone(),
            entrance.participant,
            entrance.room,
            entrance.place,
            entrance.intended,
            entrance.tracks_ahead,
            entrance.requests,
        ));
    }
}

async fn see_out(epoch: Epoch, exits: Vec<Exit>, mut leave: watch::Receiver<bool>) {
    for Exit { at, requests, home } in exits {
        let at = tokio::time::Instant::from_std(epoch.instant(at));
        tokio::select! {
            () = tokio::time::sleep_until(at) => {}
            () = session::leaving(&mut leave) => return,
        }
        // The send fails if the session has ended already. Then the shard has to be told that
        // nothing is owed from now on.
        if requests.send(Request::Leave).is_err() {
            home.leave();
        }
    }
}

fn groups(plan: &Plan, clips: &Clips) -> Vec<GroupContext> {
    let groups = plan.scenario.groups.iter();
    groups
        .map(|group| {
            let spec = plan.scenario.media_of(group);
            let identity = &spec.client.defaults().identity;
            let silence = clips.silence(&spec.audio);
            GroupContext {
                media: Media {
                    audio: clips.speech(&spec.audio),
                    audio_redundancy: spec.audio.redundancy,
                    states_no_dtx: identity.states_dtx && !spec.audio.dtx,
                    video: clips.video(spec),
                    taking_turns: silence.map(|silence| TakingTurns {
                        seed: plan.scenario.seed,
                        speakers: plan.scenario.publishers_of(Kind::Audio),
                        silence,
                    }),
                    pacing: spec.pacing,
                },
                client: identity,
                dynacast: spec.dynacast,
                layout: spec.layout,
                adaptive_stream: spec.adaptive_stream,
                obey_bandwidth: spec.obey_bandwidth,
            }
        })
        .collect()
}
