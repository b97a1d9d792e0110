//! A participant's tracks: how AddTrack and descriptions present them, and what the shard gets once
//! they are negotiated.

use crate::transport::rtp::Ssrc;
use std::sync::Arc;
use std::time::Duration;

use livekit_protocol as proto;

use crate::codec::{Codec, PayloadTypes};
use crate::engine::publisher::{MediaSource, Redundancy, SendParameters, SimulcastLayer, Talk};
use crate::engine::{LAYERS_MAX, StreamParameters, track_number};
use crate::measure::Kind;
use crate::media::identity::{FrameIdentity, Origin};
use crate::media::opus::AudioClip;
use crate::plan::{Pacing, ParticipantPlan, SpeakerTurns};
use crate::transport::sdp::{Extension, LocalTrack, NegotiatedMedia, RemoteTrack, RtcpFeedback};
use crate::units::{Bitrate, Time};

/// Rids of a simulcast track's layers, the lowest first, as LiveKit names them.
const RIDS: [&str; LAYERS_MAX] = ["q", "h", "f"];

/// Media that the participants of a run may send.
pub struct Media {
    pub audio: Option<MediaSource>,
    /// Number of earlier packets that each audio packet repeats (RED), if the server accepts that.
    pub audio_redundancy: u8,
    /// Whether AddTrack says that the pauses of audio are sent (no DTX).
    pub states_no_dtx: bool,
    /// Layers of video tracks, the lowest first.
    pub video: Vec<MediaSource>,
    /// Set if publishers take turns in speaking.
    pub taking_turns: Option<TakingTurns>,
    pub pacing: Pacing,
}

/// Parameters for publishers that take turns in speaking.
pub struct TakingTurns {
    pub seed: u64,
    /// Number of speakers in each room.
    pub speakers: u32,
    pub silence: Arc<AudioClip>,
}

impl TakingTurns {
    fn talk(&self, plan: &ParticipantPlan) -> Talk {
        Talk {
            turns: SpeakerTurns::new(self.seed, plan.room, self.speakers),
            place: plan.place,
            silence: self.silence.clone(),
        }
    }
}

/// A track to publish.
pub(super) struct SessionTrack {
    pub(super) local: LocalTrack,
    /// The server's answer to AddTrack.
    pub(super) info: Option<Box<proto::TrackInfo>>,
    /// Whether the track is in our offer.
    pub(super) is_offered: bool,
    /// Whether the server has refused the track.
    pub(super) is_refused: bool,
    /// Parameters that the server accepted for the track, once it has answered the offer.
    pub(super) negotiated: Option<NegotiatedMedia>,
    layers: Vec<Layer>,
    /// Number of earlier packets that each packet is to repeat.
    redundancy: u8,
    states_no_dtx: bool,
    talk: Option<Talk>,
    pacing: Pacing,
}

/// One encoding of a track. A track without simulcast has one layer, too.
struct Layer {
    source: MediaSource,
    ssrc: Ssrc,
    rtx_ssrc: Option<Ssrc>,
}

impl SessionTrack {
    /// Makes the tracks of one participant. The plan gives the participant's number and everything
    /// that is drawn for its tracks.
    pub(super) fn of(plan: &ParticipantPlan, media: &Media) -> Vec<SessionTrack> {
        let audio = media
            .audio
            .iter()
            .filter(|_| plan.publishes_audio)
            .map(|source| {
                let talk = media.taking_turns.as_ref().map(|turns| turns.talk(plan));
                let codec = if media.audio_redundancy > 0 {
                    Codec::Red
                } else {
                    source.codec()
                };
                SessionTrack {
                    redundancy: media.audio_redundancy,
                    states_no_dtx: media.states_no_dtx,
                    talk,
                    ..SessionTrack::new(plan, codec, std::slice::from_ref(source), media.pacing)
                }
            });
        let video =
            Some(&media.video[..]).filter(|layers| plan.publishes_video && !layers.is_empty());
        audio
            .chain(
                video
                    .map(|layers| SessionTrack::new(plan, layers[0].codec(), layers, media.pacing)),
            )
            .collect()
    }

    fn new(
        plan: &ParticipantPlan,
        codec: Codec,
        sources: &[MediaSource],
        pacing: Pacing,
    ) -> SessionTrack {
        let kind = codec.kind();
        let name = kind.name();
        // The low bits keep the participant's few SSRCs distinct. The rest is random enough to be
        // distinct in a room.
        let base = (plan.seed >> 16) as u32 & !0xF;
        let layers: Vec<Layer> = (0..)
            .zip(sources)
            .map(|(layer, source)| {
                let ssrc = base | (u32::from(track_number(kind)) * 4 + 2 * layer + 2);
                Layer {
                    source: source.clone(),
                    ssrc: Ssrc(ssrc),
                    rtx_ssrc: codec.has_rtx().then_some(Ssrc(ssrc + 1)),
                }
            })
            .collect();
        SessionTrack {
            local: LocalTrack {
                codec,
                cid: format!("{}-{name}", plan.identity),
                stream_id: plan.identity.clone(),
                ssrc: layers[0].ssrc,
                rtx_ssrc: layers[0].rtx_ssrc,
                rids: if layers.len() > 1 {
                    RIDS[..layers.len()]
                        .iter()
                        .map(|rid| (*rid).to_owned())
                        .collect()
                } else {
                    Vec::new()
                },
            },
            info: None,
            is_offered: false,
            is_refused: false,
            negotiated: None,
            layers,
            redundancy: 0,
            states_no_dtx: false,
            talk: None,
            pacing,
        }
    }

    /// Returns the server's sid of the track, once it has answered AddTrack.
    pub(super) fn sid(&self) -> Option<&str> {
        self.info.as_ref().map(|info| info.sid.as_str())
    }

    pub(super) fn forget_negotiation(&mut self) {
        (self.negotiated, self.info) = (None, None);
        (self.is_offered, self.is_refused) = (false, false);
    }

    pub(super) fn kind(&self) -> Kind {
        self.local.codec.kind()
    }

    /// Returns the first of the track's slots from `ready` on. Slots are times of the run's clock,
    /// so that tracks stay spread whatever the timing of their joins.
    pub(super) fn first_slot(&self, plan: &ParticipantPlan, ready: Time) -> Time {
        let interval = self
            .layers
            .iter()
            .map(|layer| layer.source.frame_interval())
            .min()
            .unwrap_or_default();
        first_slot(
            slot_offset(plan.index, track_number(self.kind()), interval),
            interval,
            ready,
        )
    }

    /// Returns parameters for the shard, which starts all layers with the frame of
    /// `first_frame_at`; empty until the server has accepted the track.
    pub(super) fn send_parameters(
        &self,
        plan: &ParticipantPlan,
        run: u32,
        first_frame_at: Time,
    ) -> Vec<SendParameters> {
        let Some((negotiated, payloads)) = self
            .negotiated
            .as_ref()
            .and_then(|negotiated| Some((negotiated, negotiated.payloads?)))
        else {
            return Vec::new();
        };
        let kind = self.kind();
        let number = track_number(kind);
        let layers = (0..)
            .zip(&self.layers)
            .map(|(layer, encoding)| SendParameters {
                source: encoding.source.clone(),
                ssrc: encoding.ssrc,
                rtx_ssrc: encoding.rtx_ssrc,
                payload_type: payloads.plain_payload_type(),
                redundancy: self.redundancy_by(payloads),
                rtx_payload_type: negotiated.rtx_payload_type,
                transport_cc_extension: negotiated
                    .extensions
                    .id(Extension::TransportCc)
                    .filter(|_| negotiated.feedback.contains(RtcpFeedback::TransportCc)),
                audio_level_extension: negotiated
                    .extensions
                    .id(Extension::AudioLevel)
                    .filter(|_| kind == Kind::Audio),
                simulcast: self
                    .local
                    .rids
                    .get(usize::from(layer))
                    .map(|rid| self.simulcast_layer(negotiated, rid)),
                talk: self.talk.clone(),
                pacing: self.pacing,
                identity: FrameIdentity {
                    run,
                    origin: Origin {
                        publisher: plan.index,
                        track: number,
                    },
                    layer,
                    ..FrameIdentity::default()
                },
                seed: plan.seed ^ u64::from(number) ^ u64::from(layer) << 8,
                first_frame_at,
            });
        layers.collect()
    }

    /// Returns the redundancy to use. A server that does not want any names plain Opus first, or
    /// alone.
    fn redundancy_by(&self, payloads: PayloadTypes) -> Option<Redundancy> {
        (payloads.codec == Codec::Red && self.redundancy > 0).then_some(Redundancy {
            payload_type: payloads.payload_type,
            distance: self.redundancy,
        })
    }

    fn simulcast_layer(&self, negotiated: &NegotiatedMedia, rid: &str) -> SimulcastLayer {
        // 0 stands for a missing id. The shard refuses it, and the track counts as missing: without
        // mid and rid the server could not tell layers apart.
        let id = |extension| negotiated.extensions.id(extension);
        SimulcastLayer {
            mid: negotiated.mid.clone(),
            rid: rid.into(),
            mid_extension: id(Extension::Mid).unwrap_or(0),
            rid_extension: id(Extension::Rid).unwrap_or(0),
            repaired_rid_extension: id(Extension::RepairedRid),
            track_bitrate: Bitrate::from_bps(
                self.layers
                    .iter()
                    .map(|layer| layer.source.bitrate().bps())
                    .sum(),
            ),
        }
    }

    /// Returns the watched layers, one bit each. For a track with one layer that is this layer,
    /// whatever its name.
    pub(super) fn watched_layers(&self, update: &proto::SubscribedQualityUpdate) -> Option<u8> {
        // We publish one codec.
        let codec = update.subscribed_codecs.first()?;
        let bit = |quality: &proto::SubscribedQuality| match self.layers.len() {
            1 => 1,
            _ => 1u8.checked_shl(quality.quality.unsigned_abs()).unwrap_or(0),
        };
        let watched = codec
            .qualities
            .iter()
            .filter(|quality| quality.enabled)
            .map(bit);
        Some(watched.fold(0, |layers, bit| layers | bit))
    }
}

/// Returns the offset of a track's slots within the frame interval: multiples of the golden ratio,
/// so that any number of tracks is spread evenly.
fn slot_offset(index: u32, track: u8, interval: Duration) -> Duration {
    let turn = index
        .wrapping_mul(2)
        .wrapping_add(u32::from(track))
        .wrapping_mul(0x9E37_79B9);
    Duration::from_nanos(((interval.as_nanos() * u128::from(turn)) >> 32) as u64)
}

/// Returns the first time from `ready` on that lies `offset` after a multiple of `interval`.
fn first_slot(offset: Duration, interval: Duration, ready: Time) -> Time {
    let interval_nanos = interval.as_nanos().max(1) as u64;
    let slots = ready
        .since(Time::ZERO + offset)
        .as_nanos()
        .div_ceil(u128::from(interval_nanos)) as u64;
    Time::from_nanos(slots * interval_nanos) + offset
}

// LiveKit calls `disable_dtx` deprecated, but still reads it, and clients still fill it.
#[allow(deprecated)]
pub(super) fn add_track_request(track: &SessionTrack) -> proto::AddTrackRequest {
    let mut request = proto::AddTrackRequest {
        cid: track.local.cid.clone(),
        name: track.local.cid.clone(),
        ..Default::default()
    };
    match track.kind() {
        Kind::Audio => {
            request.r#type = proto::TrackType::Audio.into();
            request.source = proto::TrackSource::Microphone.into();
            request.disable_red = track.local.codec != Codec::Red;
            request.disable_dtx = track.states_no_dtx;
            let features = track
                .states_no_dtx
                .then_some(proto::AudioTrackFeature::TfNoDtx);
            request.audio_features = features.into_iter().map(Into::into).collect();
        }
        Kind::Video => {
            request.r#type = proto::TrackType::Video.into();
            request.source = proto::TrackSource::Camera.into();
            request.layers = video_layers(track);
            if let Some(top) = request.layers.last() {
                (request.width, request.height) = (top.width, top.height);
            }
            let features = [
                proto::PacketTrailerFeature::PtfUserTimestamp,
                proto::PacketTrailerFeature::PtfFrameId,
                proto::PacketTrailerFeature::PtfUserData,
            ];
            request.packet_trailer_features = features.into_iter().map(Into::into).collect();
        }
    }
    if track.layers.len() > 1 {
        // This makes the server treat the track as simulcast.
        request.simulcast_codecs = vec![proto::SimulcastCodec {
            codec: track.local.codec.name().into(),
            cid: track.local.cid.clone(),
            layers: request.layers.clone(),
            ..Default::default()
        }];
    }
    request
}

/// Describes the layers of a video track. Without them, the server says that nobody watches
/// anything. A single layer counts as high, several start at low.
fn video_layers(track: &SessionTrack) -> Vec<proto::VideoLayer> {
    let mut layers = Vec::new();
    for (at, layer) in track.layers.iter().enumerate() {
        let MediaSource::Video(clip) = &layer.source else {
            continue;
        };
        let spec = clip.spec();
        let quality = match track.layers.len() {
            1 => proto::VideoQuality::High,
            _ => [
                proto::VideoQuality::Low,
                proto::VideoQuality::Medium,
                proto::VideoQuality::High,
            ][at],
        };
        layers.push(proto::VideoLayer {
            quality: quality.into(),
            width: spec.width,
            height: spec.height,
            bitrate: u32::try_from(spec.bitrate.bps()).unwrap_or(u32::MAX),
            ssrc: layer.ssrc.0,
            rid: track.local.rids.get(at).cloned().unwrap_or_default(),
            ..Default::default()
        });
    }
    layers
}

/// Returns our view of the session, for a resume. If the server's view differs, it has the
/// participant join anew.
pub(super) fn sync_state(tracks: &[SessionTrack]) -> proto::SyncState {
    let published = tracks.iter().map(|track| proto::TrackPublishedResponse {
        cid: track.local.cid.clone(),
        track: track.info.as_deref().cloned(),
    });
    proto::SyncState {
        // Everything is subscribed to, without exception.
        subscription: Some(proto::UpdateSubscription::default()),
        publish_tracks: published.collect(),
        ..Default::default()
    }
}

pub(super) fn stream_parameters(track: &RemoteTrack, announced_at: Time) -> StreamParameters {
    StreamParameters {
        payloads: track.payloads,
        ssrc: track.ssrc,
        rtx_ssrc: track.rtx_ssrc,
        nack: track.feedback.contains(RtcpFeedback::Nack),
        transport_cc_extension: track
            .extensions
            .id(Extension::TransportCc)
            .filter(|_| track.feedback.contains(RtcpFeedback::TransportCc)),
        abs_send_time_extension: track
            .extensions
            .id(Extension::AbsSendTime)
            .filter(|_| track.feedback.contains(RtcpFeedback::GoogRemb)),
        announced_at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_spread_evenly_whenever_their_participants_come() {
        const INTERVAL: Duration = Duration::from_millis(20);
        let mut in_millisecond = [0u32; 20];
        for index in 0..3_000 {
            let ready = Time::from_micros(u64::from(index) * 5_003);
            let slot = first_slot(slot_offset(index, 0, INTERVAL), INTERVAL, ready);
            assert!(
                slot >= ready && slot.since(ready) <= INTERVAL,
                "{index}: {slot:?} after {ready:?}"
            );
            in_millisecond[(slot.as_nanos() % INTERVAL.as_nanos() as u64 / 1_000_000) as usize] +=
                1;
        }
        assert!(
            in_millisecond.iter().all(|count| count.abs_diff(150) <= 3),
            "{in_millisecond:?}"
        );
    }
}
