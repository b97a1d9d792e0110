//! A participant's tracks: what is said of them in AddTrack and in descriptions, and what the shard gets once they are agreed.

use std::time::Duration;

use livekit_protocol as proto;

use crate::engine::StreamParameters;
use crate::engine::publisher::{SendParameters, Source};
use crate::measure::Kind;
use crate::media::identity::FrameIdentity;
use crate::plan::{Pacing, ParticipantPlan};
use crate::transport::sdp::{Extension, LocalTrack, NegotiatedMedia, RemoteTrack};
use crate::units::Time;

/// A track to publish.
pub(super) struct Track {
    pub(super) local: LocalTrack,
    pub(super) source: Source,
    /// What the server took of it, once it has answered.
    pub(super) negotiated: Option<NegotiatedMedia>,
    /// The server has answered AddTrack.
    pub(super) added: bool,
}

impl Track {
    /// The tracks of one participant: its number in the plan and everything that is drawn for them come from there.
    pub(super) fn of(plan: &ParticipantPlan, audio: Option<&Source>, video: Option<&Source>) -> Vec<Track> {
        let wanted = [audio.filter(|_| plan.publishes_audio), video.filter(|_| plan.publishes_video)];
        wanted
            .into_iter()
            .flatten()
            .map(|source| Track {
                local: local_track(plan, source.kind()),
                source: source.clone(),
                negotiated: None,
                added: false,
            })
            .collect()
    }

    /// Where in its frame interval the track's slots lie.
    pub(super) fn slot_offset(&self, plan: &ParticipantPlan) -> Duration {
        slot_offset(plan.index, track_number(self.source.kind()), self.source.frame_interval())
    }

    /// For the shard, which starts it with the frame of `first_frame_at`; `None` until the server has taken it.
    pub(super) fn send_parameters(&self, plan: &ParticipantPlan, run: u32, pacing: Pacing, first_frame_at: Time) -> Option<SendParameters> {
        let negotiated = self.negotiated.as_ref()?;
        let kind = self.source.kind();
        let number = track_number(kind);
        Some(SendParameters {
            source: self.source.clone(),
            ssrc: self.local.ssrc,
            rtx_ssrc: self.local.rtx_ssrc,
            payload_type: negotiated.payload_type,
            rtx_payload_type: negotiated.rtx_payload_type,
            audio_level_extension: negotiated.extensions.id(Extension::AudioLevel).filter(|_| kind == Kind::Audio),
            pacing,
            identity: FrameIdentity {
                run,
                origin: plan.index,
                track: number,
                ..FrameIdentity::default()
            },
            seed: plan.seed ^ u64::from(number),
            first_frame_at,
        })
    }
}

/// The number of a track in frame identities and in the [`crate::engine::Roster`].
pub(super) fn track_number(kind: Kind) -> u8 {
    match kind {
        Kind::Audio => 0,
        Kind::Video => 1,
    }
}

/// Where in the frame interval a track's slots lie: multiples of the golden ratio, so that any number of tracks is spread evenly.
fn slot_offset(index: u32, track: u8, interval: Duration) -> Duration {
    let turn = index.wrapping_mul(2).wrapping_add(u32::from(track)).wrapping_mul(0x9E37_79B9);
    Duration::from_nanos(((interval.as_nanos() * u128::from(turn)) >> 32) as u64)
}

fn local_track(plan: &ParticipantPlan, kind: Kind) -> LocalTrack {
    let name = match kind {
        Kind::Audio => "audio",
        Kind::Video => "video",
    };
    // Distinct for the participant's few SSRCs by the low bits, and unguessable enough to be distinct in a room.
    let base = (plan.seed >> 16) as u32 & !0xF;
    let number = u32::from(track_number(kind)) * 4;
    LocalTrack {
        kind,
        cid: format!("{}-{name}", plan.identity),
        stream_id: plan.identity.clone(),
        ssrc: base | number | 2,
        rtx_ssrc: (kind == Kind::Video).then_some(base | number | 3),
        rids: Vec::new(),
    }
}

pub(super) fn add_track_request(track: &Track) -> proto::AddTrackRequest {
    let mut request = proto::AddTrackRequest {
        cid: track.local.cid.clone(),
        name: track.local.cid.clone(),
        ..Default::default()
    };
    match &track.source {
        Source::Audio(_) => {
            request.r#type = proto::TrackType::Audio.into();
            request.source = proto::TrackSource::Microphone.into();
            request.disable_red = true;
        }
        Source::Video(clip) => {
            let spec = clip.spec();
            request.r#type = proto::TrackType::Video.into();
            request.source = proto::TrackSource::Camera.into();
            (request.width, request.height) = (spec.width, spec.height);
            let layer = proto::VideoLayer {
                quality: proto::VideoQuality::High.into(),
                width: spec.width,
                height: spec.height,
                bitrate: u32::try_from(spec.bitrate.bps()).unwrap_or(u32::MAX),
                ssrc: track.local.ssrc,
                ..Default::default()
            };
            request.layers = vec![layer];
            let features = [
                proto::PacketTrailerFeature::PtfUserTimestamp,
                proto::PacketTrailerFeature::PtfFrameId,
                proto::PacketTrailerFeature::PtfUserData,
            ];
            request.packet_trailer_features = features.into_iter().map(Into::into).collect();
        }
    }
    request
}

pub(super) fn stream_parameters(track: &RemoteTrack, announced_at: Time) -> StreamParameters {
    StreamParameters {
        kind: track.kind,
        ssrc: track.ssrc,
        rtx_ssrc: track.rtx_ssrc,
        clock_rate: track.clock_rate,
        announced_at,
    }
}
