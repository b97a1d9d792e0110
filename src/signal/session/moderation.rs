//! Handles what the server does to a participant in the room: it mutes or removes tracks, takes
//! rights away, refuses requests, moves the participant to another room. The participant obeys as a
//! client does, and reports to the run.

use super::*;
use crate::signal::client::RoomMoved;
use crate::words;

/// Request that the server answers; see `proto::RequestResponse`.
use proto::request_response::{Reason, Request as Refused};

const RIGHT_TAKEN: &str = "lost its right to subscribe: the server took it away";

impl Session {
    pub(super) async fn handle_moderation(
        &mut self,
        event: SignalEvent,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        match event {
            SignalEvent::Mute { track_sid, muted } => {
                return self.handle_mute(&track_sid, muted, sender).await;
            }
            SignalEvent::RequestResponse(response) => {
                return self.handle_request_response(&response, sender).await;
            }
            SignalEvent::TrackUnpublished { track_sid } => {
                self.handle_track_unpublished(&track_sid);
            }
            SignalEvent::ParticipantUpdate(update) => self.handle_participant_update(&update),
            SignalEvent::SubscriptionResponse { error, .. } => {
                self.handle_subscription_response(error);
            }
            SignalEvent::RoomMoved(moved) => self.handle_room_moved(moved),
            SignalEvent::RefreshToken(token) => self.fresh_token = Some(token),
            _ => {}
        }
        Ok(())
    }

    /// Handles that somebody has muted or unmuted one of our tracks. We stop or resume, and confirm
    /// it, as the SDKs do.
    pub(super) async fn handle_mute(
        &mut self,
        track_sid: &str,
        muted: bool,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        let Some(kind) = self.kind_of(track_sid) else {
            return Ok(());
        };
        info!(
            ?kind,
            muted, "the server mutes a track of it, or unmutes it"
        );
        self.notify(Notice::MutedByServer {
            index: self.plan.index,
            kind,
            muted,
            at: self.context.epoch.now(),
        });
        self.set_muted(kind, muted, sender).await
    }

    pub(super) async fn set_muted(
        &mut self,
        kind: Kind,
        muted: bool,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        let track = self.tracks.iter().find(|track| track.kind() == kind);
        let Some(sid) = track.and_then(|track| track.sid().map(str::to_owned)) else {
            return Ok(());
        };
        self.command(ShardCommand::SetMuted {
            key: self.place.key,
            track: track_number(kind),
            muted,
        });
        let request = proto::MuteTrackRequest { sid, muted };
        Ok(sender.send(SignalRequest::Mute(request)).await?)
    }

    /// Handles that the server has removed one of our tracks from the room, because the right to
    /// publish was withdrawn. The track stops, as a client's does.
    pub(super) fn handle_track_unpublished(&mut self, track_sid: &str) {
        if let Some(kind) = self.kind_of(track_sid) {
            let story = format!("lost its {} track: the server unpublished it", kind.name());
            self.lose_track(kind, story);
        }
    }

    /// Reports that the server has taken away the right to subscribe, if the plan needs it, or has
    /// given it back. The loss of the right to publish shows in the server's messages about each
    /// track.
    pub(super) fn handle_participant_update(&mut self, update: &[u8]) {
        let (here, now) = ((self.plan.room, self.plan.index), self.context.epoch.now());
        self.context.strangers.take_update(here, update, now);
        let Some(permission) = client::permission_of(&self.sid, update) else {
            return;
        };
        let is_taken = self.plan.subscribes && !permission.can_subscribe;
        let was_taken = std::mem::replace(&mut self.may_not_subscribe, is_taken);
        match (was_taken, is_taken) {
            (false, true) => self.tell_harm(RIGHT_TAKEN.to_owned()),
            (true, false) => self.notify(Notice::Restored {
                index: self.plan.index,
                at: self.context.epoch.now(),
                story: RIGHT_TAKEN,
            }),
            (true, true) | (false, false) => {}
        }
    }

    /// Handles a refused request. A refused track does not affect the others.
    pub(super) async fn handle_request_response(
        &mut self,
        response: &proto::RequestResponse,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        let reason = response.reason();
        if matches!(reason, Reason::Ok | Reason::Queued) {
            return Ok(());
        }
        let why = match words::one_line(&response.message) {
            message if message.is_empty() => reason.as_str_name().to_owned(),
            message => format!("{}: {message}", reason.as_str_name()),
        };
        match &response.request {
            Some(Refused::AddTrack(asked)) => {
                let mut tracks = self.tracks.iter_mut();
                let track = tracks.find(|track| track.local.cid == asked.cid);
                if let Some(track) = track.filter(|track| !track.is_refused) {
                    track.is_refused = true;
                    let kind = track.kind();
                    self.lose_track(kind, refused_track(kind, &why));
                    return self.offer_tracks(sender).await;
                }
            }
            request => {
                let what = request.as_ref().map_or("a request", request_name);
                self.notify(Notice::Refused {
                    reason: format!("the server refused {what} of ours: {why}"),
                });
            }
        }
        Ok(())
    }

    /// Handles tracks of ours that the server's answer leaves out.
    pub(super) fn handle_left_out(&mut self) {
        let left_out: Vec<Kind> = self
            .tracks
            .iter_mut()
            .filter(|track| track.is_offered && track.negotiated.is_none() && !track.is_refused)
            .map(|track| {
                track.is_refused = true;
                track.kind()
            })
            .collect();
        for kind in left_out {
            let why = "it did not accept it (is its codec enabled?)";
            self.lose_track(kind, refused_track(kind, why));
        }
    }

    pub(super) fn handle_subscription_response(&self, error: proto::SubscriptionError) {
        let why = match error {
            proto::SubscriptionError::SeCodecUnsupported => {
                "it has no codec that we can decode (SE_CODEC_UNSUPPORTED)".to_owned()
            }
            proto::SubscriptionError::SeTrackNotfound => {
                "there is no such track (SE_TRACK_NOTFOUND)".to_owned()
            }
            proto::SubscriptionError::SeUnknown => "it does not say why (SE_UNKNOWN)".to_owned(),
        };
        self.notify(Notice::Refused {
            reason: format!("the server could not give a track to a subscriber: {why}"),
        });
    }

    /// Handles a move to another room. The participant goes on there, but those who should hear it
    /// no longer do.
    pub(super) fn handle_room_moved(&mut self, moved: RoomMoved) {
        let room = words::one_line(&moved.room);
        warn!(room, "the server moved it to another room");
        self.sid = moved.participant_sid;
        self.fresh_token = Some(moved.token);
        self.tell_harm(format!("was moved to room '{room}' by the server"));
    }

    fn lose_track(&self, kind: Kind, story: String) {
        warn!(why = story, "a track of it does not send any more");
        self.command(ShardCommand::LoseTrack {
            key: self.place.key,
            track: track_number(kind),
        });
        self.notify(Notice::TrackLost {
            index: self.plan.index,
            kind,
            at: self.context.epoch.now(),
            story,
        });
    }

    fn tell_harm(&self, story: String) {
        warn!(what = story, "the server changed what it may do");
        self.notify(Notice::Harmed {
            index: self.plan.index,
            at: self.context.epoch.now(),
            story,
        });
    }

    fn kind_of(&self, track_sid: &str) -> Option<Kind> {
        let mut tracks = self.tracks.iter();
        let track = tracks.find(|track| track.sid() == Some(track_sid));
        track.map(SessionTrack::kind)
    }
}

fn refused_track(kind: Kind, why: &str) -> String {
    format!(
        "could not publish its {} track: the server refused it: {why}",
        kind.name()
    )
}

fn request_name(request: &Refused) -> &'static str {
    match request {
        Refused::Mute(_) => "a mute",
        Refused::UpdateAudioTrack(_) | Refused::UpdateVideoTrack(_) => "a change of a track",
        _ => "a request",
    }
}
