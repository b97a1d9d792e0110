//! Descriptions: a server's offers to our [`Answerer`], a server's answers to our [`Offerer`], and
//! a client's offers and answers to the embedded SFU. Each target takes a sequence of descriptions,
//! so that the state that is kept from one to the next is tested as well.

use std::io::Cursor;
use throng::transport::rtp::Ssrc;

use rtc_sdp::description::session::SessionDescription;
use throng::codec::Codec;
use throng::measure::Kind;
use throng::transport::sdp::serve::{
    ClientDescriptions, SectionUse, SentTrack, SubscriberOffer, write_answer,
};
use throng::transport::sdp::{
    Answerer, Candidate, Capabilities, DtlsSetup, Fingerprint, LocalTrack, LocalTransport, Offerer,
    SECTIONS_MAX, ice_ufrag,
};

use super::{Script, Target, chunk, ours};

/// Memory limits. A line of 12 bytes (`m=a 0 b 0\r\n`) may become a rejected section of 60 bytes. A
/// section that is accepted was longer than what is written of it, or names our own credentials and
/// extensions. What is read of a section takes a few hundred bytes.
const MEMORY: Option<(usize, usize)> = Some((64 << 10, 96));

pub const ANSWER: Target = Target {
    name: "sdp_answer",
    run: answer,
    seeds: answer_seeds,
    mutations: 120,
    memory: MEMORY,
};

pub const OFFER: Target = Target {
    name: "sdp_offer",
    run: offer,
    seeds: offer_seeds,
    mutations: 120,
    memory: MEMORY,
};

pub const SERVE: Target = Target {
    name: "sdp_serve",
    run: serve,
    seeds: serve_seeds,
    mutations: 120,
    memory: MEMORY,
};

fn local() -> LocalTransport {
    LocalTransport {
        ufrag: "ours".into(),
        pwd: "0123456789abcdefghijklmn".into(),
        fingerprint: Fingerprint([7; 32]),
        setup: DtlsSetup::Active,
        candidates: vec![Candidate::host(std::net::SocketAddr::from((
            [192, 0, 2, 1],
            7_882,
        )))],
        session_id: 1,
    }
}

/// Returns the texts of a script, in order.
fn texts(input: &[u8]) -> impl Iterator<Item = &str> {
    let mut script = Script::new(input);
    std::iter::from_fn(move || (!script.is_over()).then(|| script.chunk()))
        .filter_map(|chunk| std::str::from_utf8(chunk).ok())
}

fn sections(text: &str) -> usize {
    usize::from(text.starts_with("m=")) + text.matches("\nm=").count()
}

/// Checks what was written, whatever came in: others can read the description, it has as many
/// sections, and none of its lines was injected.
fn is_well_formed(written: &str, expected_sections: usize) {
    assert!(written.ends_with("\r\n"));
    for line in written.split_terminator("\r\n") {
        let bytes = line.as_bytes();
        assert!(
            bytes.len() > 2 && bytes[0].is_ascii_lowercase() && bytes[1] == b'=',
            "{line:?}"
        );
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
    assert_eq!(sections(written), expected_sections);
    // A media section of unknown kind is rejected under its own name, which `rtc-sdp` refuses to
    // read.
    let known = |line: &str| {
        ["m=audio ", "m=video ", "m=application "]
            .iter()
            .any(|kind| line.starts_with(kind))
    };
    let named = written.split_inclusive("\r\n").map(|line| {
        match line
            .strip_prefix("m=")
            .and_then(|rest| rest.split_once(' '))
        {
            Some((_, rest)) if !known(line) => format!("m=text {rest}"),
            _ => line.to_owned(),
        }
    });
    let named: String = named.collect();
    let theirs = SessionDescription::unmarshal(&mut Cursor::new(&named))
        .unwrap_or_else(|error| panic!("{error}: {written}"));
    assert_eq!(theirs.media_descriptions.len(), expected_sections);
}

fn is_bounded(written: &str, read: &str) {
    assert!(
        written.len() <= 2_048 + 24 * read.len(),
        "{} bytes make {}",
        read.len(),
        written.len()
    );
}

fn answer(input: &[u8]) {
    let (local, mut answerer) = (local(), Answerer::new(Capabilities::SUBSCRIBER));
    let mut longest = 0;
    for text in texts(input) {
        let _ = ours(|| ice_ufrag(text).map(str::len));
        let before: Vec<_> = answerer.tracks().cloned().collect();
        longest = longest.max(text.len());
        let Ok(answered) = ours(|| answerer.answer(text, &local)) else {
            assert!(
                answerer.tracks().eq(&before),
                "an offer that is refused changes nothing"
            );
            continue;
        };
        is_well_formed(&answered.sdp, sections(text));
        is_bounded(&answered.sdp, text);
        assert!(answerer.tracks().count() <= sections(text) && sections(text) <= SECTIONS_MAX);
        let same = ours(|| answerer.answer(text, &local)).expect("it was fine a moment ago");
        assert_eq!(
            (
                same.sections_read,
                same.added.len(),
                same.removed.len(),
                same.updated.len()
            ),
            (0, 0, 0, 0)
        );
        assert_eq!(sections(&same.sdp), sections(text));
    }
}

fn offer(input: &[u8]) {
    let (local, mut offerer) = (local(), Offerer::default());
    offerer.open_data();
    ours(|| offerer.receive(Kind::Audio, 2)).expect("two are not too many");
    for (kind, ssrc) in [(Kind::Audio, 11), (Kind::Video, 21)] {
        offerer.send(LocalTrack {
            codec: Codec::default_of(kind),
            cid: format!("cid-{ssrc}"),
            stream_id: "stream".into(),
            ssrc: Ssrc(ssrc),
            rtx_ssrc: (kind == Kind::Video).then_some(Ssrc(ssrc + 1)),
            rids: Vec::new(),
        });
    }
    for text in texts(input) {
        is_well_formed(&offerer.offer(&local), 5);
        let Ok(negotiated) = ours(|| offerer.handle_answer(text)) else {
            continue;
        };
        assert!(negotiated.media.len() <= 2);
        let same = ours(|| offerer.handle_answer(text)).expect("it was fine a moment ago");
        assert_eq!(
            (same.sections_read, same.added.len(), same.removed.len()),
            (0, 0, 0)
        );
    }
}

fn serve(input: &[u8]) {
    let (local, mut offers, mut subscriber) = (
        local(),
        ClientDescriptions::default(),
        SubscriberOffer::default(),
    );
    let sent = |codec| SentTrack {
        stream_id: "PA_1|TR_1".into(),
        track_id: "TR_1".into(),
        ssrc: Ssrc(3),
        rtx_ssrc: Some(Ssrc(4)),
        codec,
    };
    let [red, video] = [sent(Codec::Red), sent(Codec::Vp8)];
    subscriber.add(red.clone());
    subscriber.add(video);
    for (version, text) in (1..).zip(texts(input)) {
        if !subscriber.is_waiting_for_answer() {
            is_well_formed(&subscriber.offer(&local), 3);
        }
        if let Ok((_, agreed)) = ours(|| subscriber.answered(text)) {
            assert!(agreed.len() <= 2);
        }
        let before = offers.sections().len();
        let Ok(update) = ours(|| offers.read(text)) else {
            assert_eq!(offers.sections().len(), before);
            continue;
        };
        assert_eq!(offers.sections().len(), sections(text));
        assert!(update.changed.iter().all(|index| *index < sections(text)));
        let answer = ours(|| {
            write_answer(&mut offers, &local, version, |index, section| {
                match (index % 3, section.sends) {
                    (0, true) => SectionUse::Receive {
                        dtx: true,
                        red: true,
                    },
                    (1, false) => SectionUse::Send(&red),
                    _ => SectionUse::Idle,
                }
            })
        });
        is_well_formed(&answer, sections(text));
        is_bounded(&answer, text);
        assert_eq!(
            ours(|| offers.read(text))
                .expect("it was fine a moment ago")
                .changed,
            [0; 0]
        );
    }
}

macro_rules! recorded {
    ($($name:literal),+ $(,)?) => {
        [$(include_str!(concat!("../../../fixtures/sdp/", $name, ".sdp"))),+]
    };
}

const OFFERS: [&str; 5] = recorded!(
    "offer-1-application",
    "offer-2-first-video",
    "offer-3-six-tracks",
    "offer-4-two-gone",
    "offer-5-section-reused"
);
const BROWSER: [&str; 5] = recorded!(
    "browser-publisher-1-audio",
    "browser-publisher-2-simulcast",
    "browser-single-1-join",
    "browser-single-2-audio",
    "browser-single-3-simulcast"
);

fn script(texts: &[&str]) -> Vec<u8> {
    texts
        .iter()
        .flat_map(|text| chunk(text.as_bytes()))
        .collect()
}

/// Small enough that mutations have an effect, with one of everything that is read.
const SMALL: &str = "v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1 2\r\na=ice-lite\r\na=fingerprint:sha-256 \
    07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07:07\r\na=ice-ufrag:abcd\r\na=ice-pwd:0123456789abcdefghijkl\r\n\
    m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=mid:0\r\na=setup:actpass\r\na=sctp-port:5000\r\na=candidate:1 1 udp 2130706431 192.0.2.9 7882 typ host\r\n\
    m=audio 9 UDP/TLS/RTP/SAVPF 111 0\r\na=mid:1\r\na=sendonly\r\na=rtcp-mux\r\na=rtcp-rsize\r\na=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10\r\n\
    a=rtcp-fb:111 nack\r\na=extmap:1 urn:ietf:params:rtp-hdrext:ssrc-audio-level\r\na=msid:PA_1|TR_1 TR_1\r\na=ssrc:7 cname:x\r\n\
    m=video 9 UDP/TLS/RTP/SAVPF 96 97\r\na=mid:2\r\na=sendrecv\r\na=rtpmap:96 VP8/90000\r\na=rtcp-fb:* nack pli\r\na=rtpmap:97 rtx/90000\r\na=fmtp:97 apt=96\r\n\
    a=ssrc-group:FID 8 9\r\na=ssrc:8 msid:PA_1|TR_2 TR_2\r\na=rid:q send\r\na=rid:f send\r\na=simulcast:send q;f\r\n";

fn answer_seeds() -> Vec<Vec<u8>> {
    vec![
        script(&[SMALL]),
        script(&[SMALL, &SMALL.replace("a=sendonly", "a=inactive"), SMALL]),
        script(&[OFFERS[0], OFFERS[1]]),
        script(&[OFFERS[3], OFFERS[4]]),
    ]
}

fn offer_seeds() -> Vec<Vec<u8>> {
    let (local, mut offerer) = (local(), Offerer::default());
    offerer.open_data();
    offerer
        .receive(Kind::Audio, 2)
        .expect("two are not too many");
    offerer.receive(Kind::Audio, 1).expect("nor is one");
    offerer.receive(Kind::Video, 1).expect("nor is one");
    // Our own answerer answers our own offer of the same shape.
    let answer = Answerer::new(Capabilities::SUBSCRIBER)
        .answer(&offerer.offer(&local), &local)
        .expect("an answer")
        .sdp;
    let sending = answer.replace(
        "a=inactive",
        "a=sendonly\r\na=msid:PA_1|TR_1 TR_1\r\na=ssrc:77 cname:x",
    );
    vec![
        script(&[&answer]),
        script(&[&answer, &sending, &answer]),
        script(&[SMALL]),
    ]
}

fn serve_seeds() -> Vec<Vec<u8>> {
    let mut offers = SubscriberOffer::default();
    let sent = |codec| SentTrack {
        stream_id: "PA_1|TR_1".into(),
        track_id: "TR_1".into(),
        ssrc: Ssrc(3),
        rtx_ssrc: Some(Ssrc(4)),
        codec,
    };
    offers.add(sent(Codec::Red));
    offers.add(sent(Codec::Vp8));
    let answer = Answerer::new(Capabilities::SUBSCRIBER)
        .answer(&offers.offer(&local()), &local())
        .expect("an answer")
        .sdp;
    vec![
        script(&[&answer]),
        script(&[SMALL]),
        script(&[SMALL, &SMALL.replace("send q;f", "send f")]),
        script(&[BROWSER[0], BROWSER[1]]),
        script(&[BROWSER[2]]),
    ]
}
