//! The signalling half of the embedded SFU, with clients that lie: joins, requests with any content
//! in both encodings, lost sockets, and time, in any order.

use std::net::SocketAddr;
use std::time::Duration;

use livekit_protocol as proto;
use livekit_protocol::signal_request::Message as Request;
use prost::Message;
use throng::secrets::Secrets;
use throng::sfu::lobby::{ConnectionId, Entrant, Lobby, LobbyConfig, LobbyOutput};
use throng::sfu::{MediaCommand, MediaEvent, TransportId};
use throng::transport::sdp::{
    Answerer, Candidate, Capabilities, DtlsSetup, Fingerprint, LocalTransport,
};
use throng::units::{Epoch, Time};

use super::{Script, Target, chunk, ours};

pub const TARGET: Target = Target {
    name: "lobby",
    run,
    seeds,
    mutations: 300,
    memory: None,
};

const JOIN: u8 = 0;
const PROTOBUF: u8 = 1;
const JSON: u8 = 2;
const DISCONNECT: u8 = 3;
const TIME: u8 = 4;
const CONNECTED: u8 = 5;
/// Command: answers our last offer to this client as an honest client does.
const ANSWER: u8 = 6;

const CLIENTS: usize = 4;
/// Maximum number of steps in a script, so that what everybody is told stays small.
const STEPS_MAX: usize = 64;

fn local() -> LocalTransport {
    LocalTransport {
        ufrag: "client".into(),
        pwd: "0123456789abcdefghijklmn".into(),
        fingerprint: Fingerprint([9; 32]),
        setup: DtlsSetup::Active,
        candidates: vec![Candidate::host(SocketAddr::from(([192, 0, 2, 7], 4_000)))],
        session_id: 1,
    }
}

struct Client {
    connection: Option<ConnectionId>,
    answerer: Answerer,
    offer: Option<proto::SessionDescription>,
}

struct World {
    lobby: Lobby,
    clients: [Client; CLIENTS],
    transports: Vec<TransportId>,
    bytes_out: usize,
    messages_out: usize,
}

fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let mut world = World {
        lobby: Lobby::new(LobbyConfig {
            seed: 1,
            secrets: Secrets::keyed_for_tests(1),
            epoch: Epoch::read(),
            fingerprint: Fingerprint([7; 32]),
            routers: vec![SocketAddr::from(([192, 0, 2, 100], 7_882)).into()],
        }),
        clients: std::array::from_fn(|_| Client {
            connection: None,
            answerer: Answerer::new(Capabilities::SUBSCRIBER),
            offer: None,
        }),
        transports: Vec::new(),
        bytes_out: 0,
        messages_out: 0,
    };
    let (mut now, mut steps) = (Time::ZERO, 0);
    while !script.is_over() && steps < STEPS_MAX {
        steps += 1;
        let (op, who) = (script.u8() % 7, usize::from(script.u8()));
        if op == TIME {
            now = world.wait(now, Duration::from_millis(who as u64 * 16));
            continue;
        }
        world.step(op, who, &mut script, now);
        world.drain();
    }
    world.wait(now, Duration::from_secs(400));
    // Everybody is told about everything, several times. The bound is the product of what was said
    // and the number of those who hear it.
    let limit = 64 << 10 << (steps / 8).min(8);
    assert!(
        world.bytes_out <= limit + 4_096 * input.len(),
        "{} bytes make {} in {} messages",
        input.len(),
        world.bytes_out,
        world.messages_out
    );
    assert_eq!(
        world.lobby.statistics().participants,
        0,
        "without WebSockets and media nobody stays"
    );
}

impl World {
    fn step(&mut self, op: u8, who: usize, script: &mut Script<'_>, now: Time) {
        let client = &mut self.clients[who % CLIENTS];
        match op {
            JOIN => {
                let entry = entry(who, script);
                if let Some(connection) = client.connection.take() {
                    self.lobby.handle_disconnect(connection, now);
                }
                client.answerer = Answerer::new(Capabilities::SUBSCRIBER);
                client.connection = Some(ours(|| self.lobby.handle_entry(entry, now)));
            }
            PROTOBUF | JSON => {
                let bytes = script.chunk();
                let request = match op {
                    PROTOBUF => ours(|| proto::SignalRequest::decode(bytes)).ok(),
                    _ => ours(|| serde_json::from_slice(bytes)).ok(),
                };
                if let (Some(connection), Some(request)) = (client.connection, request) {
                    ours(|| self.lobby.handle_request(connection, request, now));
                }
            }
            DISCONNECT => {
                if let Some(connection) = client.connection.take() {
                    ours(|| self.lobby.handle_disconnect(connection, now));
                }
            }
            CONNECTED => {
                if let Some(transport) = self.transports.get(who).copied() {
                    let event = MediaEvent::Connected { transport, at: now };
                    ours(|| self.lobby.handle_media(0, event, now));
                }
            }
            _ => {
                if let (Some(connection), Some(offer)) = (client.connection, client.offer.take())
                    && let Ok(answered) = client.answerer.answer(&offer.sdp, &local())
                {
                    let answer = proto::SessionDescription {
                        r#type: "answer".into(),
                        sdp: answered.sdp,
                        id: offer.id,
                        ..Default::default()
                    };
                    let request = proto::SignalRequest {
                        message: Some(Request::Answer(answer)),
                    };
                    ours(|| self.lobby.handle_request(connection, request, now));
                }
            }
        }
    }

    fn wait(&mut self, now: Time, time: Duration) -> Time {
        let until = now + time;
        let mut now = now;
        let mut turns = 0;
        while self.lobby.next_timeout() <= until {
            turns += 1;
            assert!(turns < 20_000, "timers that are always due");
            now = now.max(self.lobby.next_timeout());
            ours(|| self.lobby.handle_timeout(now));
            self.drain();
        }
        if time > Duration::from_secs(100) {
            for client in &mut self.clients {
                if let Some(connection) = client.connection.take() {
                    self.lobby.handle_disconnect(connection, until);
                }
            }
            return self.wait(until, Duration::from_secs(60));
        }
        until
    }

    fn drain(&mut self) {
        while let Some(output) = self.lobby.poll_output() {
            match output {
                LobbyOutput::Send {
                    connection,
                    message,
                } => {
                    self.bytes_out += message.len();
                    self.messages_out += 1;
                    let response =
                        proto::SignalResponse::decode(message).expect("what we write can be read");
                    let client = self
                        .clients
                        .iter_mut()
                        .find(|client| client.connection == Some(connection));
                    if let (Some(client), Some(proto::signal_response::Message::Offer(offer))) =
                        (client, response.message)
                    {
                        client.offer = Some(offer);
                    }
                }
                LobbyOutput::Close { connection } => {
                    for client in &mut self.clients {
                        client.connection = client.connection.filter(|open| *open != connection);
                    }
                }
                LobbyOutput::Media { command, .. } => match command {
                    MediaCommand::AddTransport { transport, .. } => self.transports.push(transport),
                    MediaCommand::RemoveTransport { transport } => {
                        self.transports.retain(|known| *known != transport)
                    }
                    _ => {}
                },
            }
        }
    }
}

fn entry(who: usize, script: &mut Script<'_>) -> Entrant {
    let flags = script.u8();
    let sdp = String::from_utf8_lossy(script.chunk()).into_owned();
    Entrant {
        room: "hall".into(),
        identity: format!("client-{}", who % CLIENTS),
        permission: proto::ParticipantPermission {
            can_publish: flags & 1 != 0,
            can_subscribe: flags & 2 != 0,
            can_update_metadata: flags & 4 != 0,
            hidden: flags & 8 != 0,
            ..Default::default()
        },
        auto_subscribe: flags & 16 == 0,
        single: flags & 32 != 0,
        resume: (flags & 64 != 0).then(String::new),
        publisher_offer: (!sdp.is_empty()).then(|| proto::SessionDescription {
            r#type: "offer".into(),
            sdp,
            id: 1,
            ..Default::default()
        }),
        ..Entrant::default()
    }
}

fn seeds() -> Vec<Vec<u8>> {
    const AUDIO: &str = include_str!("../../../fixtures/sdp/browser-publisher-1-audio.sdp");
    const SINGLE: &str = include_str!("../../../fixtures/sdp/browser-single-1-join.sdp");
    let join = |who: u8, flags: u8, offer: &str| {
        [&[JOIN, who, flags][..], &chunk(offer.as_bytes())].concat()
    };
    let say = |who: u8, message: Request| {
        let request = proto::SignalRequest {
            message: Some(message),
        };
        [&[PROTOBUF, who][..], &chunk(&request.encode_to_vec())].concat()
    };
    let cid = AUDIO
        .lines()
        .find_map(|line| line.strip_prefix("a=msid:")?.split_once(' '))
        .map_or("cid", |(_, track)| track);
    let add = Request::AddTrack(proto::AddTrackRequest {
        cid: cid.into(),
        ..Default::default()
    });
    let offer = Request::Offer(proto::SessionDescription {
        r#type: "offer".into(),
        sdp: AUDIO.into(),
        id: 1,
        ..Default::default()
    });
    let metadata = |text: &str| {
        Request::UpdateMetadata(proto::UpdateParticipantMetadata {
            metadata: text.into(),
            attributes: [(text.to_owned(), text.to_owned())].into(),
            ..Default::default()
        })
    };
    let subscription = Request::Subscription(proto::UpdateSubscription {
        track_sids: vec!["TR_x".into(); 20],
        subscribe: true,
        ..Default::default()
    });
    let json = br#"{"addTrack":{"cid":"c","type":"VIDEO","layers":[{"quality":"HIGH"}]}}"#;
    vec![
        [
            join(0, 7, ""),
            vec![ANSWER, 0, CONNECTED, 0],
            join(1, 3, ""),
            vec![ANSWER, 1, CONNECTED, 1],
            say(0, add.clone()),
            say(0, offer.clone()),
            vec![TIME, 20, ANSWER, 1, TIME, 20],
            say(0, metadata("a")),
            say(0, metadata("b")),
            vec![DISCONNECT, 0, TIME, 100],
            join(0, 64 | 7, ""),
        ]
        .concat(),
        [
            join(2, 32 | 3, SINGLE),
            vec![TIME, 30],
            say(2, subscription.clone()),
            say(2, add),
        ]
        .concat(),
        [
            join(3, 3, ""),
            [&[JSON, 3][..], &chunk(json)].concat(),
            say(3, offer),
            say(3, subscription),
            vec![TIME, 255],
        ]
        .concat(),
        [
            join(0, 3, "v=0"),
            join(0, 3, ""),
            join(0, 3, ""),
            join(1, 8 | 3, ""),
        ]
        .concat(),
    ]
}
