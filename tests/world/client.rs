//! A participant's signalling, sans-IO: what `signal::session` does in a real run. Messages go in.
//! Requests, and what is to be done with the participant's media, come out.

// LiveKit calls the layers of a track's description deprecated, but fills them all the same.
#![allow(deprecated)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use livekit_protocol as proto;
use proto::signal_request::Message as Request;
use proto::signal_response::Message as Response;
use throng::codec::Codec;
use throng::measure::Kind;
use throng::sfu::lobby::Entrant;
use throng::transport::peer::{IceCredentials, PeerParameters};
use throng::transport::sdp::{
    Answerer, Candidate, Capabilities, DtlsSetup, Fingerprint, LocalTrack, LocalTransport,
    NegotiatedMedia, Offerer, RemoteTrack, RemoteTransport,
};

use crate::plan::{Act, Person, Settings};

/// Layers of a simulcast track, from low to high.
pub const RIDS: [&str; 3] = ["q", "h", "f"];

/// One of the two peer connections. A single connection is the publisher's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Half {
    Publisher,
    Subscriber,
}

impl Half {
    pub const BOTH: [Half; 2] = [Half::Publisher, Half::Subscriber];
}

/// Something to do because of a message or an act.
pub enum Todo {
    Send(Box<Request>),
    AddPeer {
        half: Half,
        parameters: PeerParameters,
    },
    /// Streams of the server that ended, and streams that began.
    Streams {
        half: Half,
        removed: Vec<RemoteTrack>,
        added: Vec<RemoteTrack>,
    },
    RestartIce {
        half: Half,
        local: IceCredentials,
        remote: IceCredentials,
        remote_candidates: Vec<SocketAddr>,
    },
    /// The server wants these layers of a track, one bit each.
    SetLayers {
        kind: Kind,
        layers: u8,
    },
    SetMuted {
        kind: Kind,
        muted: bool,
    },
    /// The server was asked for this layer of a track, or for nothing.
    Watch {
        track_sid: String,
        layer: Option<u8>,
    },
    /// The signalling connection breaks, and is opened again after this time.
    LoseSignal(Duration),
    /// The server has ended the session, for this reason.
    Gone(String),
}

impl Todo {
    fn send(request: Request) -> Todo {
        Todo::Send(Box::new(request))
    }
}

pub struct Track {
    pub local: LocalTrack,
    /// SSRCs of each layer, from low to high: media and retransmissions.
    pub ssrcs: Vec<(Ssrc, Option<Ssrc>)>,
    pub sid: Option<String>,
    pub negotiated: Option<NegotiatedMedia>,
}

/// A track of another participant.
#[derive(Clone)]
struct Other {
    sid: String,
    kind: Kind,
    heights: Vec<u32>,
}

pub struct Client {
    pub person: Person,
    pub tracks: Vec<Track>,
    /// Sids of tracks for which it sent a request. What it then gets of them is not what it would
    /// get by itself.
    pub touched: BTreeSet<String>,
    sid: String,
    locals: [LocalTransport; 2],
    addresses: [SocketAddr; 2],
    /// The other side's ICE credentials, once a connection is there.
    remotes: [Option<IceCredentials>; 2],
    ice_generation: u32,
    offerer: Offerer,
    offers: u32,
    offer_is_open: bool,
    wanted: Option<(u32, u32)>,
    answerer: Answerer,
    /// Tracks of each other participant, by its sid.
    others: BTreeMap<String, Vec<Other>>,
}

impl Client {
    pub fn new(person: &Person, addresses: [SocketAddr; 2], fingerprint: Fingerprint) -> Client {
        let kinds = [
            person.audio.then_some(Kind::Audio),
            person.video.then_some(Kind::Video),
        ];
        let locals = [0, 1].map(|half| LocalTransport {
            ufrag: format!("client{}half{half}", person.index),
            pwd: format!("passwordOfClient{:04}half{half}", person.index),
            fingerprint,
            setup: DtlsSetup::Active,
            candidates: vec![Candidate::host(addresses[half])],
            session_id: u64::from(person.index) + 1,
        });
        Client {
            tracks: kinds
                .into_iter()
                .flatten()
                .map(|kind| track(person, kind))
                .collect(),
            touched: BTreeSet::new(),
            person: person.clone(),
            sid: String::new(),
            locals,
            addresses,
            remotes: [None, None],
            ice_generation: 0,
            offerer: Offerer::default(),
            offers: 0,
            offer_is_open: false,
            wanted: None,
            answerer: Answerer::new(subscriber(person)),
            others: BTreeMap::new(),
        }
    }

    /// Returns what the server learns from its token and from the first request.
    pub fn entry(&mut self) -> Entrant {
        let mut entry = self.token();
        if self.person.single {
            entry.add_tracks = self
                .tracks
                .iter()
                .map(|track| add_track_request(track, &self.person))
                .collect();
            entry.publisher_offer = Some(self.next_offer());
        }
        entry
    }

    /// Returns what the server learns when a new signalling connection takes the broken one's
    /// place.
    pub fn resume(&self) -> Entrant {
        Entrant {
            resume: Some(self.sid.clone()),
            ..self.token()
        }
    }

    fn token(&self) -> Entrant {
        let person = &self.person;
        Entrant {
            room: format!("room-{}", person.room),
            identity: person.identity.clone(),
            name: person.identity.clone(),
            permission: proto::ParticipantPermission {
                can_subscribe: person.subscribes,
                can_publish: !self.tracks.is_empty(),
                ..Default::default()
            },
            auto_subscribe: person.subscribes,
            single: person.single,
            ..Entrant::default()
        }
    }

    fn next_offer(&mut self) -> proto::SessionDescription {
        if self.person.single {
            let (audio, video) = self.wanted.take().unwrap_or_default();
            // A connection needs a section to come up, even if nothing is to be sent or received
            // yet.
            let nothing =
                (audio, video) == (0, 0) && self.offerer.is_empty() && self.tracks.is_empty();
            self.offerer
                .receive(Kind::Audio, audio as usize + usize::from(nothing))
                .unwrap();
            self.offerer.receive(Kind::Video, video as usize).unwrap();
        }
        if self.offers == 0 {
            self.tracks
                .iter()
                .for_each(|track| self.offerer.send(track.local.clone()));
        }
        self.offers += 1;
        self.offer_is_open = true;
        proto::SessionDescription {
            r#type: "offer".into(),
            sdp: self.offerer.offer(&self.locals[0]),
            id: self.offers,
            ..Default::default()
        }
    }

    pub fn handle(&mut self, message: Response, todo: &mut Vec<Todo>) {
        match message {
            Response::Join(join) => {
                self.sid = join.participant.unwrap_or_default().sid;
                join.other_participants
                    .iter()
                    .for_each(|other| self.handle_participant(other));
                if !self.person.single {
                    let requests = self
                        .tracks
                        .iter()
                        .map(|track| add_track_request(track, &self.person));
                    todo.extend(requests.map(|request| Todo::send(Request::AddTrack(request))));
                }
            }
            Response::Update(update) => update
                .participants
                .iter()
                .for_each(|other| self.handle_participant(other)),
            Response::TrackPublished(published) => self.handle_track_published(published, todo),
            Response::Offer(offer) => self.handle_offer(&offer, todo),
            Response::Answer(answer) => self.handle_answer(&answer, todo),
            Response::MediaSectionsRequirement(more) => {
                let wanted = self.wanted.get_or_insert_default();
                (wanted.0, wanted.1) = (wanted.0 + more.num_audios, wanted.1 + more.num_videos);
                self.offer_if_wanted(todo);
            }
            Response::SubscribedQualityUpdate(update) => self.handle_qualities(&update, todo),
            Response::Reconnect(_) => self.handle_reconnect(todo),
            Response::Leave(leave) => {
                todo.push(Todo::Gone(leave.reason().as_str_name().to_owned()))
            }
            _ => {}
        }
    }

    /// Sends again what was under way when the signalling connection broke, because that is lost.
    fn handle_reconnect(&mut self, todo: &mut Vec<Todo>) {
        todo.push(Todo::send(Request::SyncState(proto::SyncState::default())));
        let unknown = self.tracks.iter().filter(|track| track.sid.is_none());
        todo.extend(
            unknown
                .map(|track| Todo::send(Request::AddTrack(add_track_request(track, &self.person)))),
        );
        if self.offer_is_open {
            let offer = self.next_offer();
            todo.push(Todo::send(Request::Offer(offer)));
        }
    }

    fn handle_participant(&mut self, info: &proto::ParticipantInfo) {
        if info.identity == self.person.identity {
            return;
        }
        if info.state() == proto::participant_info::State::Disconnected {
            self.others.remove(&info.sid);
            return;
        }
        let tracks = info.tracks.iter().map(|track| Other {
            sid: track.sid.clone(),
            kind: match track.r#type() {
                proto::TrackType::Audio => Kind::Audio,
                _ => Kind::Video,
            },
            heights: track.layers.iter().map(|layer| layer.height).collect(),
        });
        self.others.insert(info.sid.clone(), tracks.collect());
    }

    fn handle_track_published(
        &mut self,
        published: proto::TrackPublishedResponse,
        todo: &mut Vec<Todo>,
    ) {
        if let Some(track) = self
            .tracks
            .iter_mut()
            .find(|track| track.local.cid == published.cid)
        {
            track.sid = published.track.map(|info| info.sid);
        }
        if !self.person.single
            && self.offers == 0
            && self.tracks.iter().all(|track| track.sid.is_some())
        {
            let offer = self.next_offer();
            todo.push(Todo::send(Request::Offer(offer)));
        }
    }

    fn handle_answer(&mut self, answer: &proto::SessionDescription, todo: &mut Vec<Todo>) {
        assert!(
            answer.id <= self.offers,
            "an answer to an offer that was never made"
        );
        if answer.id != self.offers {
            return;
        }
        let negotiated = self
            .offerer
            .handle_answer(&answer.sdp)
            .expect("the server's answer");
        for (track, media) in self.tracks.iter_mut().zip(&negotiated.media) {
            assert!(media.accepted, "{} was not accepted", track.local.cid);
            track.negotiated = Some(media.clone());
        }
        self.add_peer(
            Half::Publisher,
            &negotiated.remote,
            true,
            DtlsSetup::Active,
            todo,
        );
        let added = negotiated
            .added
            .into_iter()
            .chain(negotiated.updated)
            .collect();
        push_streams(Half::Publisher, negotiated.removed, added, todo);
        self.offer_is_open = false;
        if self.person.single {
            self.offer_if_wanted(todo);
        }
    }

    fn offer_if_wanted(&mut self, todo: &mut Vec<Todo>) {
        if !self.offer_is_open && self.wanted.is_some() {
            let offer = self.next_offer();
            todo.push(Todo::send(Request::Offer(offer)));
        }
    }

    fn handle_offer(&mut self, offer: &proto::SessionDescription, todo: &mut Vec<Todo>) {
        let restarts = self.remotes[1]
            .as_ref()
            .is_some_and(|known| !offer.sdp.contains(&known.ufrag));
        if restarts {
            self.ice_generation += 1;
            let local = &mut self.locals[1];
            local.ufrag = format!(
                "client{}half1generation{}",
                self.person.index, self.ice_generation
            );
        }
        let answered = self
            .answerer
            .answer(&offer.sdp, &self.locals[1])
            .expect("the server's offer");
        self.add_peer(
            Half::Subscriber,
            &answered.remote,
            answered.remote.ice_lite,
            answered.setup,
            todo,
        );
        let added = answered.added.into_iter().chain(answered.updated).collect();
        push_streams(Half::Subscriber, answered.removed, added, todo);
        todo.push(Todo::send(Request::Answer(proto::SessionDescription {
            r#type: "answer".into(),
            sdp: answered.sdp,
            id: offer.id,
            ..Default::default()
        })));
    }

    fn add_peer(
        &mut self,
        half: Half,
        remote: &RemoteTransport,
        ice_controlling: bool,
        setup: DtlsSetup,
        todo: &mut Vec<Todo>,
    ) {
        let credentials = IceCredentials {
            ufrag: remote.ufrag.clone(),
            password: remote.pwd.clone(),
        };
        let known = self.remotes[half as usize].replace(credentials.clone());
        if known.as_ref() == Some(&credentials) {
            return;
        }
        if known.is_some() {
            let local = &self.locals[half as usize];
            todo.push(Todo::RestartIce {
                half,
                local: IceCredentials {
                    ufrag: local.ufrag.clone(),
                    password: local.pwd.clone(),
                },
                remote: credentials,
                remote_candidates: remote
                    .candidates
                    .iter()
                    .map(|candidate| candidate.address)
                    .collect(),
            });
            return;
        }
        let local = &self.locals[half as usize];
        todo.push(Todo::AddPeer {
            half,
            parameters: PeerParameters {
                local_address: self.addresses[half as usize],
                local: IceCredentials {
                    ufrag: local.ufrag.clone(),
                    password: local.pwd.clone(),
                },
                remote: IceCredentials {
                    ufrag: remote.ufrag.clone(),
                    password: remote.pwd.clone(),
                },
                remote_fingerprint: remote.fingerprint,
                remote_candidates: remote
                    .candidates
                    .iter()
                    .map(|candidate| candidate.address)
                    .collect(),
                ice_controlling,
                dtls_active: setup == DtlsSetup::Active,
            },
        });
    }

    fn handle_qualities(&mut self, update: &proto::SubscribedQualityUpdate, todo: &mut Vec<Todo>) {
        let Some(track) = self
            .tracks
            .iter()
            .find(|track| track.sid.as_deref() == Some(&update.track_sid))
        else {
            return;
        };
        let Some(codec) = update.subscribed_codecs.first() else {
            return;
        };
        let enabled = codec.qualities.iter().filter(|quality| quality.enabled);
        let layers = enabled.fold(0, |layers, quality| layers | 1 << quality.quality as u8);
        let layers = if track.ssrcs.len() > 1 {
            layers
        } else {
            u8::from(layers > 0)
        };
        todo.push(Todo::SetLayers {
            kind: track.local.codec.kind(),
            layers,
        });
    }

    /// Turns an act of the plan into requests to the server and whatever else is to be done.
    pub fn act(&mut self, act: Act, todo: &mut Vec<Todo>) {
        match act {
            Act::Subscribe { choice, on } => {
                let Some((participant_sid, Other { sid, .. })) = self.choose(choice, |_| true)
                else {
                    return;
                };
                todo.push(Todo::send(Request::Subscription(
                    proto::UpdateSubscription {
                        track_sids: vec![sid.clone()],
                        subscribe: on,
                        participant_tracks: vec![proto::ParticipantTracks {
                            participant_sid,
                            track_sids: vec![sid],
                        }],
                    },
                )));
            }
            Act::Settings { choice, settings } => {
                let Some((_, Other { sid, heights, .. })) =
                    self.choose(choice, |kind| kind == Kind::Video)
                else {
                    return;
                };
                todo.push(Todo::Watch {
                    track_sid: sid.clone(),
                    layer: layer(settings, &heights),
                });
                let mut request = proto::UpdateTrackSettings {
                    track_sids: vec![sid],
                    ..Default::default()
                };
                match settings {
                    Settings::Disabled => request.disabled = true,
                    Settings::Quality(quality) => request.quality = quality.into(),
                    Settings::Height(height) => {
                        (request.width, request.height) = (height * 16 / 9, height)
                    }
                }
                todo.push(Todo::send(Request::TrackSetting(request)));
            }
            Act::Mute { video, on } => {
                let kind = if video { Kind::Video } else { Kind::Audio };
                let sid = self
                    .tracks
                    .iter()
                    .find(|track| track.local.codec.kind() == kind)
                    .and_then(|track| track.sid.clone());
                if let Some(sid) = sid {
                    todo.push(Todo::SetMuted { kind, muted: on });
                    todo.push(Todo::send(Request::Mute(proto::MuteTrackRequest {
                        sid,
                        muted: on,
                    })));
                }
            }
            Act::LoseSignal { away } => todo.push(Todo::LoseSignal(away)),
        }
    }

    /// Chooses one of the tracks that it knows of, and marks it as touched. Returns the track and
    /// its participant's sid.
    fn choose(&mut self, choice: u64, fits: impl Fn(Kind) -> bool) -> Option<(String, Other)> {
        let tracks = |(participant, tracks): (&String, &Vec<Other>)| -> Vec<(String, Other)> {
            let fitting = tracks.iter().filter(|track| fits(track.kind));
            fitting
                .map(|track| (participant.clone(), track.clone()))
                .collect()
        };
        let known: Vec<_> = self.others.iter().flat_map(tracks).collect();
        let chosen = known
            .get((choice % known.len().max(1) as u64) as usize)?
            .clone();
        self.touched.insert(chosen.1.sid.clone());
        Some(chosen)
    }
}

/// Returns the layer that settings ask for, among layers of these heights.
fn layer(settings: Settings, heights: &[u32]) -> Option<u8> {
    let highest = heights.len().saturating_sub(1);
    let layer = match settings {
        Settings::Disabled => return None,
        Settings::Quality(quality) => usize::from(quality),
        // The server accepts a layer that is up to a tenth too small.
        Settings::Height(asked) => heights
            .iter()
            .position(|height| *height as f32 >= asked as f32 * 0.9)
            .unwrap_or(highest),
    };
    Some(layer.min(highest) as u8)
}

fn push_streams(
    half: Half,
    removed: Vec<RemoteTrack>,
    added: Vec<RemoteTrack>,
    todo: &mut Vec<Todo>,
) {
    if !removed.is_empty() || !added.is_empty() {
        todo.push(Todo::Streams {
            half,
            removed,
            added,
        });
    }
}

/// Returns what a participant can receive. Every third one takes no redundancy.
fn subscriber(person: &Person) -> Capabilities {
    Capabilities {
        codecs: if person.index % 3 == 2 {
            &[Codec::Opus, Codec::Vp8]
        } else {
            Capabilities::SUBSCRIBER.codecs
        },
        ..Capabilities::SUBSCRIBER
    }
}

fn track(person: &Person, kind: Kind) -> Track {
    let base = 0x1000_0000 + person.index * 64 + if kind == Kind::Video { 16 } else { 0 };
    let layers = if kind == Kind::Video && person.simulcast {
        RIDS.len() as u32
    } else {
        1
    };
    let rids = if layers > 1 {
        RIDS.map(String::from).to_vec()
    } else {
        Vec::new()
    };
    let ssrcs: Vec<_> = (0..layers)
        .map(|layer| {
            (
                Ssrc(base + 2 * layer),
                (kind == Kind::Video).then_some(Ssrc(base + 2 * layer + 1)),
            )
        })
        .collect();
    Track {
        local: LocalTrack {
            codec: match kind {
                // Every other one sends with redundancy.
                Kind::Audio if person.index % 2 == 1 => Codec::Red,
                kind => Codec::default_of(kind),
            },
            cid: format!("{}-{kind:?}-{}", person.identity, person.index),
            stream_id: person.identity.clone(),
            ssrc: ssrcs[0].0,
            rtx_ssrc: ssrcs[0].1,
            rids,
        },
        ssrcs,
        sid: None,
        negotiated: None,
    }
}

fn add_track_request(track: &Track, person: &Person) -> proto::AddTrackRequest {
    let mut request = proto::AddTrackRequest {
        cid: track.local.cid.clone(),
        name: track.local.cid.clone(),
        ..Default::default()
    };
    match track.local.codec.kind() {
        Kind::Audio => {
            request.r#type = proto::TrackType::Audio.into();
            request.source = proto::TrackSource::Microphone.into();
            request.disable_red = track.local.codec != Codec::Red;
        }
        Kind::Video => {
            request.r#type = proto::TrackType::Video.into();
            request.source = proto::TrackSource::Camera.into();
            let sizes = crate::media::sizes(person.simulcast);
            (request.width, request.height) = *sizes.last().unwrap();
            let qualities = [
                proto::VideoQuality::Low,
                proto::VideoQuality::Medium,
                proto::VideoQuality::High,
            ];
            let layers = sizes.iter().zip(&qualities[3 - sizes.len()..]);
            request.layers = layers
                .map(|((width, height), quality)| proto::VideoLayer {
                    quality: (*quality).into(),
                    width: *width,
                    height: *height,
                    ..Default::default()
                })
                .collect();
        }
    }
    request
}
