//! Handles a participant that has lost its connection: it resumes its session, joins anew, or gives
//! up.
//!
//! It behaves as real clients do. If only signalling is lost, the media connections go on while the
//! WebSocket is reopened. If the server has forgotten the session, or a media connection has
//! failed, everything is set up anew under the same identity, and what was missed meanwhile stays
//! missed.

use std::time::Duration;

use super::failure::retry_pause;
use super::tracks::sync_state;
use super::*;
use crate::seeded::scatter;

/// Time limit of one attempt to resume. A server answers from memory.
pub(super) const RESUME_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a participant tries to come back. LiveKit forgets a participant about 20 s after its
/// media has stopped.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long media may stay away after a resume: as long as livekit-client waits for its peer
/// connections.
const MEDIA_BACK_TIMEOUT: Duration = Duration::from_secs(15);

/// Pause at a rate limit that names none, and the time over which participants with the same pause
/// spread their return.
const LIMIT_PAUSE: Duration = Duration::from_secs(1);
const LIMIT_SCATTER: Duration = Duration::from_millis(500);

/// State of a participant that was in the room, has lost its connection, and is coming back.
#[derive(Clone)]
pub(super) struct Lost {
    pub(super) at: Time,
    /// The first cause.
    pub(super) why: String,
    /// What came of the last attempt to come back.
    pub(super) last: Option<String>,
    pub(super) tries: u32,
    /// Whether the session is gone, so that only joining anew helps.
    pub(super) is_gone: bool,
}

impl Lost {
    /// `back` is when the participant last came back, and the number of tries that took. So one
    /// that is thrown out again at once does not come back ever faster.
    pub(super) fn at(at: Time, back: Option<(Time, u32)>, why: &str) -> Lost {
        Lost {
            at,
            why: why.to_owned(),
            last: None,
            tries: back
                .filter(|(back, _)| at.since(*back) < RECONNECT_TIMEOUT)
                .map_or(0, |(_, tries)| tries),
            is_gone: false,
        }
    }

    /// Returns the first cause, and what came of trying to come back.
    pub(super) fn chain(&self, last: &str) -> String {
        if self.why == last {
            last.to_owned()
        } else {
            format!("{}; then, on coming back: {last}", self.why)
        }
    }

    /// Returns the same, as far as it is known.
    pub(super) fn story(&self) -> String {
        self.chain(self.last.as_deref().unwrap_or(&self.why))
    }
}

impl Session {
    /// Reopens the signalling connection while the media connections go on.
    pub(super) async fn resume(
        &mut self,
        mut failure: SessionFailure,
        restart_ice: bool,
    ) -> Result<Signal, SessionFailure> {
        while let Some(pause) = self.next_try() {
            let asked = failure.limit.flatten().unwrap_or_default();
            tokio::time::sleep(pause.max(asked).min(RECONNECT_TIMEOUT)).await;
            match self.try_to_resume(restart_ice).await {
                Ok(signal) => {
                    if restart_ice {
                        let by = self.context.epoch.now() + MEDIA_BACK_TIMEOUT;
                        self.media_back_by.get_or_insert(by);
                    } else {
                        self.tell_reconnected();
                    }
                    return Ok(signal);
                }
                Err(again) if matches!(again.cure, Cure::Resume { .. }) => {
                    debug!(why = again.reason, "could not resume, and tries again");
                    if let Some(lost) = &mut self.lost {
                        lost.last = Some(again.reason.clone());
                    }
                    failure = again;
                }
                Err(other) => return Err(other),
            }
        }
        failure.cure = Cure::None;
        Err(failure)
    }

    async fn try_to_resume(&mut self, restart_ice: bool) -> Result<Signal, SessionFailure> {
        self.held_answer = None;
        let mut signal = self.open_signal(true).await?;
        let resuming = resumption(self, &mut signal.receiver);
        let relays = tokio::time::timeout(RESUME_TIMEOUT, resuming)
            .await
            .map_err(|_| SignalError::NotResumed {
                after: RESUME_TIMEOUT,
            })??;
        signal.sender.sync_state(sync_state(&self.tracks)).await?;
        if let Some(offered) = relays.filter(|_| self.goes_past_relay()) {
            // ICE restarts when the relay has given its address.
            self.move_to_relays(&offered)?;
            return Ok(signal);
        }
        self.offer_again(restart_ice, &mut signal.sender).await?;
        Ok(signal)
    }

    /// The server wants media to go through a relay from now on: as clients do, ICE restarts with
    /// nothing else, on the same connections.
    fn move_to_relays(&mut self, offered: &[IceServer]) -> Result<(), SessionFailure> {
        self.held_offer = None;
        self.take_relays(offered, true)?;
        for role in PeerRole::BOTH {
            self.half_mut(role).begin_move();
        }
        Ok(())
    }

    /// A relay has given its address to a connection that is to move there.
    pub(super) async fn restart_at_relay(
        &mut self,
        role: PeerRole,
        sender: &mut SignalSender,
        engine: &mpsc::UnboundedSender<ShardEvent>,
    ) -> Result<(), SessionFailure> {
        match role {
            PeerRole::Publisher => self.offer_again(true, sender).await,
            PeerRole::Subscriber => match self.held_offer.take() {
                Some(offer) => self.handle_offer(&offer, sender, engine).await,
                None => Ok(()),
            },
        }
    }

    /// What was said while nobody listened is said again: our last offer, and with one connection
    /// also the server's wish for another.
    async fn offer_again(
        &mut self,
        restart_ice: bool,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        if !self.publisher.wanted
            || !(self.context.single_connection || restart_ice || self.offering.is_open)
        {
            return Ok(());
        }
        if restart_ice {
            self.publisher.draw_credentials();
        }
        self.offering.is_open = false;
        self.offering.wanted.get_or_insert_default();
        self.offer_if_wanted(sender).await
    }

    /// Returns the pause before the next attempt to come back; `None` when it has taken too long.
    fn next_try(&mut self) -> Option<Duration> {
        let now = self.context.epoch.now();
        let lost = self.lost.as_mut()?;
        let pause = retry_pause(lost.tries, self.plan.seed);
        lost.tries += 1;
        Some(pause).filter(|pause| now.since(lost.at) + *pause <= RECONNECT_TIMEOUT)
    }

    /// Returns the pause before joining (again), after a failed attempt or a lost session; `None`:
    /// do not join.
    pub(super) fn pause_after(&mut self, failure: &SessionFailure) -> Option<Duration> {
        if self.first_timeline.is_none() {
            return self.pause_after_join(failure);
        }
        let (index, now) = (self.plan.index, self.context.epoch.now());
        let has_tried = self.lost.is_some();
        let back = self.back;
        let lost = self
            .lost
            .get_or_insert_with(|| Lost::at(now, back, &failure.reason));
        let at = lost.at;
        if !std::mem::replace(&mut lost.is_gone, true) {
            self.disconnects += 1;
            warn!(why = failure.reason, "lost its session");
            let reason = lost.chain(&failure.reason);
            self.notify(Notice::Disconnected {
                index,
                at,
                reason,
                server_reason: failure.server_reason,
            });
        }
        let pause = match failure.cure {
            Cure::None => None,
            Cure::Resume { .. } | Cure::Rejoin => self.next_try(),
        };
        if pause.is_none() && (has_tried || failure.cure != Cure::None) {
            self.notify(Notice::ReconnectFailed { index });
        }
        pause
    }

    fn pause_after_join(&mut self, failure: &SessionFailure) -> Option<Duration> {
        if let Some(asked) = failure.limit {
            return self.pause_at_limit(failure, asked);
        }
        if self.join_retries == self.context.join_retries {
            return None;
        }
        self.join_retries += 1;
        let reason = failure.reason.clone();
        self.first_failure.get_or_insert_with(|| reason.clone());
        self.notify(Notice::JoinRetried { reason });
        Some(retry_pause(self.join_retries, self.plan.seed))
    }

    /// Returns the pause that a rate limit asks for. The join still counts from its intended start.
    /// `None`: the pause would exceed the join's time limit.
    fn pause_at_limit(
        &self,
        failure: &SessionFailure,
        asked: Option<Duration>,
    ) -> Option<Duration> {
        let asked = asked.unwrap_or(LIMIT_PAUSE);
        // Spread the participants, so that they do not all come back at once.
        let scattered = scatter(self.plan.seed) % LIMIT_SCATTER.as_millis() as u64;
        let pause = asked + Duration::from_millis(scattered);
        let back_at = self.context.epoch.now() + pause;
        if back_at >= self.join_deadline() {
            return None;
        }
        self.notify(Notice::HeldBack {
            reason: failure.reason.clone(),
        });
        Some(pause)
    }

    /// Resets everything for a new session. The server no longer knows this participant, so its
    /// media must stop.
    pub(super) fn start_over(&mut self) {
        self.remove_peers();
        self.joined = false;
        self.timeline = JoinTimeline {
            intended: self.timeline.intended,
            ..JoinTimeline::default()
        };
        self.offering = Offering {
            wanted: Some(self.offering.sections),
            ..Offering::default()
        };
        self.answerer = Answerer::new(Capabilities::SUBSCRIBER);
        (self.held_answer, self.held_offer) = (None, None);
        self.media_back_by = None;
        self.publisher = PeerHalf::new(self.publisher.wanted, self.plan.transport);
        self.subscriber = PeerHalf::new(self.subscriber.wanted, self.plan.transport);
        self.streams = JoinSet::new();
        self.relays = Relays::new();
        self.tracks
            .iter_mut()
            .for_each(SessionTrack::forget_negotiation);
        self.tracks_ever = 0;
        self.viewer.start_over();
    }

    /// Whether the server may move its media to a relay.
    fn goes_past_relay(&self) -> bool {
        self.plan.transport.is_auto() && !self.transport().is_relay()
    }

    /// ICE has a path again. A resume that restarted it is done when that is so everywhere.
    pub(super) fn note_media_back(&mut self) {
        let is_back = !self.publisher.is_restarting() && !self.subscriber.is_restarting();
        if is_back && self.media_back_by.take().is_some() {
            self.tell_reconnected();
        }
    }

    /// Fails if ICE was restarted and found no path in time.
    pub(super) fn end_wait_for_media(&mut self) -> Result<(), SessionFailure> {
        self.media_back_by = None;
        if self.publisher.is_restarting() || self.subscriber.is_restarting() {
            let seconds = MEDIA_BACK_TIMEOUT.as_secs();
            let why = format!("its media did not come back within {seconds} s of a resume");
            return Err(SessionFailure::of(why, Cure::Rejoin));
        }
        // The server did not restart ICE after all, so media never went away.
        self.tell_reconnected();
        Ok(())
    }

    pub(super) fn tell_reconnected(&mut self) {
        if let Some(lost) = self.lost.take() {
            let after = self.context.epoch.now().since(lost.at);
            info!(?after, resumed = !lost.is_gone, "is back");
            self.back = Some((self.context.epoch.now(), lost.tries));
            self.notify(Notice::Reconnected {
                index: self.plan.index,
                after: self.context.epoch.now().since(lost.at),
                resumed: !lost.is_gone,
                why: lost.why,
            });
        }
    }
}

/// The server's word on a resume, which is the first thing that it says; with the relays that it
/// names, where it wants media to go through one.
async fn resumption(
    session: &Session,
    receiver: &mut SignalReceiver,
) -> Result<Option<Vec<IceServer>>, SessionFailure> {
    loop {
        match receiver.next().await? {
            SignalEvent::Reconnect {
                ice_servers,
                force_relay,
            } => return Ok(Some(ice_servers).filter(|_| force_relay)),
            SignalEvent::Leave(leave) => return Err(SessionFailure::from(&leave)),
            SignalEvent::Join(_) => {
                return Err(SessionFailure::of(
                    "the server began a new session instead of resuming the old one",
                    Cure::Rejoin,
                ));
            }
            SignalEvent::Malformed { kind, .. } => session.handle_malformed(kind)?,
            SignalEvent::Closed { .. } => return Err(SignalError::Closed.into()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_of_trying_to_come_back_stays_in_the_story() {
        let mut lost = Lost::at(Time::from_millis(1_000), None, "the server hung up");
        assert_eq!(lost.story(), "the server hung up");
        lost.last = Some("nginx answers 502".to_owned());
        assert_eq!(
            lost.story(),
            "the server hung up; then, on coming back: nginx answers 502"
        );
    }

    #[test]
    fn who_is_thrown_out_as_soon_as_it_is_back_waits_ever_longer() {
        let (mut now, mut back, mut pauses) = (Time::from_millis(1_000), None, Vec::new());
        for _ in 0..8 {
            let mut lost = Lost::at(now, back, "");
            let pause = retry_pause(lost.tries, 7);
            lost.tries += 1;
            pauses.push(pause);
            now += pause;
            back = Some((now, lost.tries));
        }
        assert!(
            pauses[0].is_zero()
                && pauses
                    .windows(2)
                    .all(|pair| pair[0] < pair[1] || pair[1] > Duration::from_secs(5)),
            "{pauses:?}"
        );
        assert_eq!(
            Lost::at(now + RECONNECT_TIMEOUT, back, "").tries,
            0,
            "who stayed for long begins anew"
        );
    }
}
