use super::scan::*;
use super::write::kind_name;
use super::*;
use crate::transport::rtp::Ssrc;
use std::time::Instant;

/// Offers of one subscriber connection, recorded from LiveKit 1.13.5: data channels only; the first
/// audio and video; three talkers; the second of them gone; the audio section of the second taken
/// over by a fourth.
const OFFERS: [&str; 5] = [
    include_str!("../../../fixtures/sdp/offer-1-application.sdp"),
    include_str!("../../../fixtures/sdp/offer-2-first-video.sdp"),
    include_str!("../../../fixtures/sdp/offer-3-six-tracks.sdp"),
    include_str!("../../../fixtures/sdp/offer-4-two-gone.sdp"),
    include_str!("../../../fixtures/sdp/offer-5-section-reused.sdp"),
];
const ANSWERS: [&str; 5] = [
    include_str!("../../../fixtures/sdp/answer-1.sdp"),
    include_str!("../../../fixtures/sdp/answer-2.sdp"),
    include_str!("../../../fixtures/sdp/answer-3.sdp"),
    include_str!("../../../fixtures/sdp/answer-4.sdp"),
    include_str!("../../../fixtures/sdp/answer-5.sdp"),
];

fn local() -> LocalTransport {
    LocalTransport {
        ufrag: "ours".into(),
        pwd: "ourpasswordof22charsmin".into(),
        fingerprint: Fingerprint([0xA5; 32]),
        setup: DtlsSetup::Active,
        candidates: vec![Candidate::host("127.0.0.1:40000".parse().unwrap())],
        session_id: 42,
    }
}

fn answerer() -> Answerer {
    Answerer::new(Capabilities::SUBSCRIBER)
}

/// Makes a client that offers an audio and a video track, or expects them, after data channels or
/// without.
fn publisher(data: bool, receives: bool) -> Offerer {
    let mut offerer = Offerer::default();
    if data {
        offerer.open_data();
    }
    for kind in [Kind::Audio, Kind::Video] {
        if receives {
            offerer.receive(kind, 1).unwrap()
        } else {
            offerer.send(LocalTrack {
                codec: Codec::default_of(kind),
                cid: kind_name(kind).into(),
                stream_id: "s".into(),
                ssrc: Ssrc(1),
                rtx_ssrc: Some(Ssrc(2)),
                rids: Vec::new(),
            })
        }
    }
    offerer
}

fn mids(tracks: &[RemoteTrack]) -> Vec<&str> {
    tracks.iter().map(|track| &*track.mid).collect()
}

#[test]
fn recorded_offers_get_the_recorded_answers() {
    let mut answerer = answerer();
    for (index, (offer, golden)) in OFFERS.iter().zip(ANSWERS).enumerate() {
        let answer = answerer.answer(offer, &local()).unwrap().sdp;
        if std::env::var_os("THRONG_BLESS").is_some() {
            std::fs::write(format!("fixtures/sdp/answer-{}.sdp", index + 1), &answer).unwrap();
            continue;
        }
        assert_eq!(
            answer,
            golden,
            "answer {} (THRONG_BLESS=1 writes the new one)",
            index + 1
        );
    }
}

#[test]
fn a_room_fills_and_empties_and_only_what_changed_is_read() {
    let mut answerer = answerer();
    // The order of candidates and of header extensions changes often. This does not count as a
    // change.
    for (offer, read, added, removed, updated) in [
        (OFFERS[0], 1, vec![], vec![], vec![]),
        (OFFERS[1], 3, vec!["1", "2"], vec![], vec![]),
        // The client of the recording took no RTX, so the server does not offer it again.
        (OFFERS[2], 5, vec!["3", "4", "5", "6"], vec![], vec!["2"]),
        (OFFERS[3], 2, vec![], vec!["3", "4"], vec![]),
        (OFFERS[4], 1, vec!["3"], vec![], vec![]),
    ] {
        let answered = answerer.answer(offer, &local()).unwrap();
        assert_eq!(
            (
                mids(&answered.added),
                mids(&answered.removed),
                mids(&answered.updated)
            ),
            (added, removed, updated)
        );
        assert_eq!(answered.unusable, 0);
        assert_eq!(answered.sections_read, read);
    }
    assert_eq!(
        answerer
            .tracks()
            .map(|track| &*track.mid)
            .collect::<Vec<_>>(),
        ["1", "2", "3", "5", "6"]
    );
}

#[test]
fn a_recorded_offer_names_transport_and_tracks() {
    let answered = answerer().answer(OFFERS[1], &local()).unwrap();
    let remote = &answered.remote;
    assert_eq!(
        (remote.ufrag.as_str(), remote.pwd.as_str()),
        ("qbDCvLwFbZDqebWM", "XfcIfwRYkzocWBecseuadOwNGsCKgfIj")
    );
    assert_eq!(
        (
            remote.setup,
            answered.setup,
            remote.ice_lite,
            remote.end_of_candidates
        ),
        (DtlsSetup::ActPass, DtlsSetup::Active, false, true)
    );
    assert!(
        remote
            .fingerprint
            .to_string()
            .starts_with("sha-256 44:35:6F:5A:")
    );
    assert_eq!(remote.candidates.len(), 1, "component 2 is left out");
    assert_eq!(
        (remote.candidates[0].address, remote.candidates[0].priority),
        ("127.0.0.1:33170".parse().unwrap(), 2_130_706_431)
    );
    assert_eq!(remote.tcp_candidates[0].address.port(), 17_881);

    let [audio, video] = answered.added.as_slice() else {
        panic!("{:?}", answered.added)
    };
    assert_eq!(
        (audio.payloads, audio.rtx_payload_type, audio.rtx_ssrc),
        (PayloadTypes::of(Codec::Opus, 111), None, None)
    );
    assert_eq!(
        (audio.ssrc, &*audio.track_id),
        (Ssrc(359_536_568), "TR_AteYg99Z6BqU3")
    );
    assert_eq!(
        (video.payloads, video.rtx_payload_type),
        (PayloadTypes::of(Codec::Vp8, 96), Some(97))
    );
    assert_eq!(
        (video.ssrc, video.rtx_ssrc),
        (Ssrc(631_379_334), Some(Ssrc(2_598_880_657)))
    );
    assert_eq!(
        (&*video.stream_id, &*video.track_id),
        ("PA_gqKSsAd8SZ6Q|TR_V54ByyhYHjTUB", "TR_V54ByyhYHjTUB")
    );
    assert_eq!(
        (
            video.extensions.id(Extension::AbsSendTime),
            video.extensions.id(Extension::AbsCaptureTime)
        ),
        (Some(3), None)
    );
}

/// Reads a description with the library that is the oracle: `m=` and attributes of each section.
fn oracle(sdp: &str) -> rtc_sdp::description::session::SessionDescription {
    rtc_sdp::description::session::SessionDescription::unmarshal(&mut std::io::Cursor::new(sdp))
        .unwrap_or_else(|error| panic!("{error}: {sdp}"))
}

fn values(media: &rtc_sdp::description::media::MediaDescription, key: &str) -> Vec<String> {
    media
        .attributes
        .iter()
        .filter(|attribute| attribute.key == key)
        .filter_map(|attribute| attribute.value.clone())
        .collect()
}

#[test]
fn an_independent_parser_reads_our_answers_as_they_are_meant() {
    let mut answerer = answerer();
    for offer in OFFERS {
        let answer = oracle(&answerer.answer(offer, &local()).unwrap().sdp);
        let offer = oracle(offer);
        assert_eq!(
            answer.media_descriptions.len(),
            offer.media_descriptions.len()
        );
        assert_eq!(
            answer.attribute("group").unwrap(),
            offer.attribute("group").unwrap()
        );
        assert!(
            answer
                .attribute("fingerprint")
                .unwrap()
                .starts_with("sha-256 A5:A5")
        );
        for (ours, theirs) in answer
            .media_descriptions
            .iter()
            .zip(&offer.media_descriptions)
        {
            assert_eq!(ours.media_name.media, theirs.media_name.media);
            assert_eq!(ours.attribute("mid"), theirs.attribute("mid"));
            assert_eq!(
                (ours.attribute("setup"), ours.attribute("ice-ufrag")),
                (Some(Some("active")), Some(Some("ours")))
            );
            assert!(
                values(ours, "rtpmap")
                    .iter()
                    .all(|map| values(theirs, "rtpmap").contains(map))
            );
            let sends =
                theirs.has_attribute("sendrecv") && theirs.media_name.media != "application";
            assert_eq!(ours.has_attribute("recvonly"), sends);
        }
        assert!(answer.media_descriptions[0].has_attribute("candidate"));
    }
}

#[test]
fn an_independent_parser_reads_our_offers_as_they_are_meant() {
    let audio = LocalTrack {
        codec: Codec::Opus,
        cid: "mic".into(),
        stream_id: "s".into(),
        ssrc: Ssrc(1),
        rtx_ssrc: None,
        rids: Vec::new(),
    };
    let video = LocalTrack {
        codec: Codec::Vp8,
        cid: "cam".into(),
        stream_id: "s".into(),
        ssrc: Ssrc(2),
        rtx_ssrc: Some(Ssrc(3)),
        rids: Vec::new(),
    };
    let simulcast = LocalTrack {
        rids: ["q", "h", "f"].map(str::to_owned).into(),
        ..video.clone()
    };
    let mut offerer = Offerer::default();
    offerer.open_data();
    [audio, video, simulcast]
        .into_iter()
        .for_each(|track| offerer.send(track));
    offerer.offer(&local());
    offerer.receive(Kind::Audio, 1).unwrap();
    offerer.receive(Kind::Video, 1).unwrap();
    let offer = offerer.offer(&local());
    let parsed = oracle(&offer);
    assert_eq!(
        (
            parsed.origin.session_version,
            parsed.attribute("group").unwrap().as_str()
        ),
        (2, "BUNDLE 0 1 2 3 4 5")
    );
    let [application, audio, video, simulcast, free_audio, free_video] =
        parsed.media_descriptions.as_slice()
    else {
        panic!("{offer}")
    };
    for (free, maps) in [
        (free_audio, vec!["63 red/48000/2", "111 opus/48000/2"]),
        (free_video, vec!["96 VP8/90000", "97 rtx/90000"]),
    ] {
        assert!(
            free.has_attribute("recvonly")
                && values(free, "ssrc").is_empty()
                && values(free, "msid").is_empty()
        );
        assert_eq!(values(free, "rtpmap"), maps);
        assert!(
            values(free, "extmap").contains(
                &"5 http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time".to_owned()
            )
        );
    }
    assert_eq!(application.attribute("sctp-port"), Some(Some("5000")));
    assert_eq!(values(audio, "rtpmap"), ["111 opus/48000/2"]);
    assert_eq!(values(audio, "rtcp-fb"), ["111 nack", "111 transport-cc"]);
    assert_eq!(values(audio, "ssrc"), ["1 cname:s", "1 msid:s mic"]);
    assert_eq!(
        values(video, "rtcp-fb"),
        [
            "96 nack",
            "96 nack pli",
            "96 ccm fir",
            "96 goog-remb",
            "96 transport-cc"
        ]
    );
    assert_eq!(values(video, "ssrc-group"), ["FID 2 3"]);
    let transport_cc = format!("6 {}", Extension::TransportCc.uri());
    assert_eq!(
        values(video, "extmap"),
        ["1 urn:ietf:params:rtp-hdrext:sdes:mid", &transport_cc]
    );
    assert_eq!(
        (values(simulcast, "rid"), values(simulcast, "ssrc").len()),
        (vec!["q send".into(), "h send".into(), "f send".into()], 0)
    );
    assert_eq!(
        (
            values(simulcast, "simulcast"),
            values(simulcast, "extmap").len()
        ),
        (vec!["send q;h;f".to_owned()], 4)
    );
    assert_eq!(values(video, "msid"), ["s cam"]);
}

#[test]
fn recorded_answers_to_our_offers_are_read() {
    for (answer, data, rid) in [
        (
            include_str!("../../../fixtures/sdp/publisher-answer-plain.sdp"),
            true,
            None,
        ),
        (
            include_str!("../../../fixtures/sdp/publisher-answer-simulcast.sdp"),
            false,
            Some(2),
        ),
    ] {
        let parsed = publisher(data, false).handle_answer(answer).unwrap();
        assert_eq!(parsed.remote.setup, DtlsSetup::Passive);
        let [audio, video] = parsed.media.as_slice() else {
            panic!("{parsed:?}")
        };
        assert!(audio.accepted && video.accepted);
        assert_eq!(
            (audio.payloads, video.payloads, video.rtx_payload_type),
            (
                Some(PayloadTypes::of(Codec::Opus, 111)),
                Some(PayloadTypes::of(Codec::Vp8, 96)),
                Some(97)
            )
        );
        assert_eq!(
            (
                video.extensions.id(Extension::Mid),
                video.extensions.id(Extension::Rid)
            ),
            (Some(1), rid)
        );
        assert!(
            audio.feedback.contains(RtcpFeedback::Nack)
                && video.feedback.contains(RtcpFeedback::CcmFir)
        );
        assert!(!video.feedback.contains(RtcpFeedback::GoogRemb));
    }
}

/// Writes a session part and sections for a made-up offer; `{}` in a section stands for its mid.
fn offer_of(sections: &[&str]) -> String {
    let mids: Vec<String> = (0..sections.len()).map(|mid| mid.to_string()).collect();
    let fingerprint = Fingerprint([1; 32]);
    let mut sdp = format!(
        "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=fingerprint:{fingerprint}\r\na=ice-ufrag:u\r\na=ice-pwd:p\r\na=setup:passive\r\na=group:BUNDLE {}\r\n",
        mids.join(" ")
    );
    for (mid, section) in mids.iter().zip(sections) {
        sdp.push_str(&section.replace("{}", mid).replace('\n', "\r\n"));
    }
    sdp
}

const APPLICATION: &str =
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\na=mid:{}\na=sctp-port:5000\n";
const VP8: &str = "m=video 9 UDP/TLS/RTP/SAVPF 100\na=mid:{}\na=rtpmap:100 VP8/90000\na=ssrc:7 cname:x\na=msid:s t\na=sendonly\n";

#[test]
fn what_cannot_be_used_is_answered_in_its_place() {
    let sections = [
        APPLICATION,
        VP8,
        "m=video 0 UDP/TLS/RTP/SAVPF 100\na=inactive\n",
        "m=video 9 UDP/TLS/RTP/SAVPF 98\na=mid:{}\na=rtpmap:98 H264/90000\na=ssrc:9 cname:x\na=sendonly\n",
        "m=text 9 UDP/TLS/RTP/SAVPF 98\na=mid:{}\n",
        "m=audio 9 UDP/TLS/RTP/SAVPF 0\na=mid:{}\na=sendonly\n",
        "m=video 9 UDP/TLS/RTP/SAVPF 100\na=mid:{}\na=rtpmap:100 vp8/90000\na=inactive\n",
        "m=video 9 UDP/TLS/RTP/SAVPF 100\na=mid:stray\na=rtpmap:100 VP8/90000\na=ssrc:8 cname:x\na=sendonly\n",
    ];
    let answered = answerer().answer(&offer_of(&sections), &local()).unwrap();
    assert_eq!(
        (answered.remote.setup, answered.setup),
        (DtlsSetup::Passive, DtlsSetup::Active)
    );
    let answer = oracle(&answered.sdp);
    let seen: Vec<(String, isize, bool)> = answer
        .media_descriptions
        .iter()
        .map(|media| {
            (
                media.media_name.media.clone(),
                media.media_name.port.value,
                media.has_attribute("inactive"),
            )
        })
        .collect();
    let expected = [
        ("application", 9, false),
        ("video", 9, false),
        ("video", 0, true),
        ("video", 0, true),
        ("text", 0, true),
        ("audio", 0, true),
        ("video", 9, true),
        ("video", 0, true),
    ];
    assert_eq!(
        seen,
        expected.map(|(media, port, inactive)| (media.to_owned(), port, inactive))
    );
    assert_eq!(answer.attribute("group").unwrap(), "BUNDLE 0 1 6");
    assert_eq!((mids(&answered.added), answered.unusable), (vec!["1"], 3));
}

#[test]
fn a_changed_ssrc_or_msid_is_a_removed_and_an_added_track() {
    let mut answerer = answerer();
    answerer
        .answer(&offer_of(&[APPLICATION, VP8]), &local())
        .unwrap();
    for changed in [
        VP8.replace("ssrc:7", "ssrc:8"),
        VP8.replace("msid:s t", "msid:s u"),
    ] {
        let answered = answerer
            .answer(&offer_of(&[APPLICATION, &changed]), &local())
            .unwrap();
        assert_eq!(
            (mids(&answered.added), mids(&answered.removed)),
            (vec!["1"], vec!["1"])
        );
    }
    let answered = answerer
        .answer(&offer_of(&[APPLICATION]), &local())
        .unwrap();
    assert_eq!(
        (mids(&answered.removed), answerer.tracks().count()),
        (vec!["1"], 0)
    );
}

#[test]
fn an_ice_restart_changes_the_transport_and_no_track() {
    let mut answerer = answerer();
    answerer.answer(OFFERS[2], &local()).unwrap();
    let restarted = OFFERS[2].replace("qbDCvLwFbZDqebWM", "newufrag");
    let answered = answerer.answer(&restarted, &local()).unwrap();
    assert_eq!(
        (
            answered.remote.ufrag.as_str(),
            answered.added.len(),
            answered.removed.len()
        ),
        ("newufrag", 0, 0)
    );
}

#[test]
fn broken_offers_are_refused_and_leave_the_state_as_it_was() {
    let mut answerer = answerer();
    answerer.answer(OFFERS[2], &local()).unwrap();
    let twice = offer_of(&[APPLICATION, VP8, &VP8.replace("{}", "1")]);
    for (offer, error) in [
        ("", SdpError::NoSections),
        ("v=0\r\n", SdpError::NoSections),
        (twice.as_str(), SdpError::DuplicateMid { mid: "1".into() }),
        (
            &offer_of(&["m=\n"]),
            SdpError::Section {
                index: 0,
                what: "its m-line cannot be read",
            },
        ),
        (
            &offer_of(&["m=audio 9 UDP/TLS/RTP/SAVPF 0\na=mid:a b\n"]),
            SdpError::Section {
                index: 0,
                what: "it has no usable mid",
            },
        ),
        (
            &offer_of(&[APPLICATION]).replace("a=ice-pwd:p\r\n", ""),
            SdpError::Missing { what: "an ice-pwd" },
        ),
        (
            &offer_of(&[APPLICATION]).replace("sha-256", "sha-1"),
            SdpError::Missing {
                what: "a sha-256 fingerprint",
            },
        ),
        (
            &offer_of(&[&format!(
                "m=video 9 x\n{}",
                "a=x\n".repeat(SECTION_BYTES_MAX / 4)
            )]),
            SdpError::SectionTooLarge { index: 0 },
        ),
        (
            &"m=a 0 b\n".repeat(SECTIONS_MAX + 1),
            SdpError::TooManySections,
        ),
        (
            &" ".repeat(SDP_BYTES_MAX + 1),
            SdpError::TooLarge {
                bytes: SDP_BYTES_MAX + 1,
            },
        ),
    ] {
        assert_eq!(answerer.answer(offer, &local()).unwrap_err(), error);
    }
    assert_eq!(answerer.tracks().count(), 6);
    assert_eq!(
        answerer.answer(OFFERS[2], &local()).unwrap().sections_read,
        0
    );
}

/// Small generator for tests (xorshift64*). Its seed determines the run.
struct SessionRandom(u64);

impl SessionRandom {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }
}

#[test]
fn mutated_offers_and_answers_never_panic_and_answers_keep_their_form() {
    let mut random = SessionRandom(0x5eed);
    let answers = [
        ANSWERS[2],
        include_str!("../../../fixtures/sdp/publisher-answer-simulcast.sdp"),
    ];
    let mut accepted = 0;
    for _ in 0..3_000 {
        let text = mutated(OFFERS[random.below(OFFERS.len())], &mut random);
        let mut answerer = answerer();
        let _ = answerer.answer(OFFERS[1], &local());
        if let Ok(answered) = answerer.answer(&text, &local()) {
            accepted += 1;
            let sections = |sdp: &str| sdp.lines().filter(|line| line.starts_with("m=")).count();
            assert_eq!(
                sections(&answered.sdp),
                SplitDescription::new(&text).unwrap().sections.len()
            );
            assert!(
                answered
                    .sdp
                    .split("\r\n")
                    .all(|line| line.is_empty() || line.as_bytes().get(1) == Some(&b'=')),
                "{}",
                answered.sdp
            );
            assert!(
                answered
                    .sdp
                    .bytes()
                    .all(|b| b == b'\r' || b == b'\n' || b == b' ' || b.is_ascii_graphic()),
                "{}",
                answered.sdp
            );
        }
        let _ = publisher(false, random.below(2) == 0)
            .handle_answer(&mutated(answers[random.below(2)], &mut random));
        let _ = mutated(
            r#"{"candidate":"candidate:1 1 udp 5 1.2.3.4 5 typ host","sdpMid":"0"}"#,
            &mut random,
        )
        .parse::<Trickled>();
        let _ = mutated(
            "sha-256 44:35:6F:5A:5A:9B:96:26:AC:E4:81:D0:0C:7D:EC:56",
            &mut random,
        )
        .parse::<Fingerprint>();
    }
    assert!(
        accepted > 300,
        "{accepted}: the mutations are too crude to test anything"
    );
}

/// Returns the text with a few bytes changed, a line dropped or doubled, or the end cut off.
fn mutated(text: &str, random: &mut SessionRandom) -> String {
    let mut lines: Vec<Vec<u8>> = text
        .split_inclusive('\n')
        .map(|line| line.as_bytes().to_vec())
        .collect();
    for _ in 0..=random.below(4) {
        let at = random.below(lines.len());
        match random.below(6) {
            0 => lines.insert(at, lines[at].clone()),
            1 if lines.len() > 1 => drop(lines.remove(at)),
            2 if random.below(8) == 0 => lines.truncate(at.max(1)),
            _ => {
                let byte = random.below(lines[at].len());
                lines[at][byte] = b"\r\n\0:=/ 0919amv\xff\xc3"[random.below(16)];
            }
        }
    }
    String::from_utf8_lossy(&lines.concat()).into_owned()
}

/// Room whose sections are offered as a server would, made from recorded ones.
struct OfferedRoom {
    session: String,
    application: String,
    templates: [String; 2],
    sections: Vec<String>,
}

impl OfferedRoom {
    fn new() -> OfferedRoom {
        let split = SplitDescription::new(OFFERS[1]).unwrap();
        let [application, audio, video] = split.sections.as_slice() else {
            panic!("three sections")
        };
        let template = |text: &str, ssrc: &str| {
            text.replace("a=mid:1\r", "a=mid:{mid}\r")
                .replace("a=mid:2\r", "a=mid:{mid}\r")
                .replace(ssrc, "{ssrc}")
        };
        OfferedRoom {
            session: split.session.replace("BUNDLE 0 1 2", "BUNDLE {mids}"),
            application: (*application).to_owned(),
            templates: [template(audio, "359536568"), template(video, "631379334")],
            sections: Vec::new(),
        }
    }

    fn section(&self, mid: usize, template: usize, ssrc: usize) -> String {
        self.templates[template]
            .replace("{mid}", &mid.to_string())
            .replace("{ssrc}", &ssrc.to_string())
    }

    fn push(&mut self, template: usize, ssrc: usize) {
        self.sections
            .push(self.section(self.sections.len() + 1, template, ssrc));
    }

    fn offer(&self) -> String {
        let mids: Vec<String> = (0..=self.sections.len())
            .map(|mid| mid.to_string())
            .collect();
        format!(
            "{}{}{}",
            self.session.replace("{mids}", &mids.join(" ")),
            self.application,
            self.sections.concat()
        )
    }

    /// Adds, removes or replaces a track, or restarts the whole connection.
    fn change(&mut self, random: &mut SessionRandom) {
        let ssrc = 1_000 + random.below(1_000_000);
        let at = random.below(self.sections.len().max(1));
        match random.below(8) {
            0..=3 => self.push(random.below(2), ssrc),
            4 if at < self.sections.len() => {
                self.sections[at] = self.section(at + 1, random.below(2), ssrc)
            }
            5 | 6 if at < self.sections.len() => {
                self.sections[at] = self.sections[at].replace("a=sendrecv", "a=inactive")
            }
            7 => self.application = self.application.replace("a=ice-ufrag:", "a=ice-ufrag:x"),
            _ => {}
        }
    }
}

#[test]
fn answering_by_increments_is_answering_in_full() {
    for seed in 1..=20 {
        let (mut random, mut room, mut incremental) =
            (SessionRandom(seed), OfferedRoom::new(), answerer());
        let mut alive: Vec<RemoteTrack> = Vec::new();
        for version in 1..=40 {
            (0..random.below(4)).for_each(|_| room.change(&mut random));
            let offer = room.offer();
            let mut full = answerer();
            full.version = version - 1;
            let (step, whole) = (
                incremental.answer(&offer, &local()).unwrap(),
                full.answer(&offer, &local()).unwrap(),
            );
            assert_eq!(
                (&step.sdp, &step.remote, step.unusable),
                (&whole.sdp, &whole.remote, whole.unusable),
                "seed {seed}"
            );
            assert!(step.sections_read <= whole.sections_read);
            assert!(
                step.removed.iter().all(|track| alive.contains(track)),
                "seed {seed}"
            );
            alive.retain(|track| {
                !step.removed.contains(track)
                    && !step.updated.iter().any(|new| new.mid == track.mid)
            });
            alive.extend(step.updated);
            alive.extend(step.added);
            alive.sort_by_key(|track| track.mid.parse::<u32>().unwrap());
            assert_eq!(
                alive.iter().collect::<Vec<_>>(),
                full.tracks().collect::<Vec<_>>(),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn a_hundred_tracks_cost_little_and_the_next_one_less() {
    let mut room = OfferedRoom::new();
    (0..100).for_each(|index| room.push(index % 2, 1_000 + index));
    let (first, mut answerer) = (room.offer(), answerer());
    let started = Instant::now();
    assert_eq!(
        answerer.answer(&first, &local()).unwrap().sections_read,
        101
    );
    let full = started.elapsed();
    room.push(0, 5_000);
    let second = room.offer();
    let started = Instant::now();
    let answered = answerer.answer(&second, &local()).unwrap();
    let step = started.elapsed();
    assert_eq!((answered.sections_read, answered.added.len()), (1, 1));
    eprintln!(
        "101 sections, {} bytes: {full:?} in full, {step:?} for one more; answer {} bytes",
        first.len(),
        answered.sdp.len()
    );
    let started = Instant::now();
    oracle(&second);
    eprintln!("a general library parses it in {:?}", started.elapsed());
}

/// Answers of one connection, recorded from LiveKit 1.13.5: a free audio section; the first audio
/// and video; two more talkers; the second of them gone; the audio section of the second taken over
/// by a fourth.
const SINGLE_ANSWERS: [&str; 6] = [
    include_str!("../../../fixtures/sdp/single-answer-1.sdp"),
    include_str!("../../../fixtures/sdp/single-answer-2.sdp"),
    include_str!("../../../fixtures/sdp/single-answer-3.sdp"),
    include_str!("../../../fixtures/sdp/single-answer-4.sdp"),
    include_str!("../../../fixtures/sdp/single-answer-5.sdp"),
    include_str!("../../../fixtures/sdp/single-answer-6.sdp"),
];

#[test]
fn over_one_connection_a_room_fills_and_empties_and_only_what_changed_is_read() {
    let mut offerer = Offerer::default();
    for (answer, (audio, video), read, added, removed, tracks) in [
        (SINGLE_ANSWERS[0], (1, 0), 1, vec![], vec![], 0),
        // The audio track found the free section; the video track lacked one.
        (SINGLE_ANSWERS[1], (0, 1), 2, vec!["0", "1"], vec![], 2),
        (SINGLE_ANSWERS[2], (1, 1), 2, vec!["2", "3"], vec![], 4),
        (SINGLE_ANSWERS[3], (1, 1), 2, vec!["4", "5"], vec![], 6),
        (SINGLE_ANSWERS[4], (0, 0), 2, vec![], vec!["2", "3"], 4),
        (SINGLE_ANSWERS[5], (0, 0), 1, vec!["2"], vec![], 5),
    ] {
        offerer.receive(Kind::Audio, audio).unwrap();
        offerer.receive(Kind::Video, video).unwrap();
        let offered = oracle(&offerer.offer(&local())).media_descriptions.len();
        let negotiated = offerer.handle_answer(answer).unwrap();
        assert_eq!(
            (mids(&negotiated.added), mids(&negotiated.removed)),
            (added, removed)
        );
        assert_eq!(
            (
                negotiated.updated.len(),
                negotiated.media.len(),
                negotiated.remote.setup
            ),
            (0, 0, DtlsSetup::Passive)
        );
        assert_eq!(
            (offerer.tracks().count(), offered),
            (tracks, oracle(answer).media_descriptions.len())
        );
        assert_eq!(negotiated.sections_read, read);
        assert!(
            negotiated
                .added
                .iter()
                .all(|track| (track.kind() == Kind::Video) == track.rtx_ssrc.is_some())
        );
        // The same answer again changes nothing.
        let again = offerer.handle_answer(answer).unwrap();
        assert_eq!(
            (again.sections_read, again.added.len(), again.removed.len()),
            (0, 0, 0)
        );
    }
}

#[test]
fn an_answer_to_another_offer_is_refused_and_changes_nothing() {
    let mut offerer = Offerer::default();
    offerer.receive(Kind::Audio, 1).unwrap();
    offerer.receive(Kind::Video, 1).unwrap();
    offerer.handle_answer(SINGLE_ANSWERS[1]).unwrap();
    for answer in [SINGLE_ANSWERS[0], SINGLE_ANSWERS[2], "", OFFERS[0]] {
        assert!(matches!(
            offerer.handle_answer(answer),
            Err(SdpError::SectionCount { offered: 2, .. })
        ));
    }
    assert!(
        offerer
            .handle_answer(&SINGLE_ANSWERS[1].replace("a=ice-pwd", "a=no-pwd"))
            .is_err()
    );
    assert_eq!(offerer.tracks().count(), 2);
    assert_eq!(
        offerer.receive(Kind::Video, SECTIONS_MAX - 1),
        Err(SdpError::TooManySections)
    );
    assert_eq!(
        offerer.receive(Kind::Video, usize::MAX),
        Err(SdpError::TooManySections)
    );
}

/// Makes an offerer with as many sections as `room` offers, because a room's offer reads like an
/// answer.
fn offerer_for(room: &OfferedRoom) -> Offerer {
    let mut offerer = Offerer::default();
    offerer.open_data();
    offerer.receive(Kind::Audio, room.sections.len()).unwrap();
    offerer
}

#[test]
fn reading_answers_by_increments_is_reading_them_in_full() {
    for seed in 1..=20 {
        let (mut random, mut room) = (SessionRandom(seed), OfferedRoom::new());
        let mut incremental = offerer_for(&room);
        for _ in 1..=40 {
            let before = room.sections.len();
            (0..random.below(4)).for_each(|_| room.change(&mut random));
            incremental
                .receive(Kind::Audio, room.sections.len() - before)
                .unwrap();
            let mut full = offerer_for(&room);
            let (step, whole) = (
                incremental.handle_answer(&room.offer()).unwrap(),
                full.handle_answer(&room.offer()).unwrap(),
            );
            assert_eq!(
                (step.remote, step.media),
                (whole.remote, whole.media),
                "seed {seed}"
            );
            assert!(step.sections_read <= whole.sections_read);
            assert_eq!(
                incremental.tracks().collect::<Vec<_>>(),
                full.tracks().collect::<Vec<_>>(),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn in_a_meeting_of_150_one_more_track_reads_one_section() {
    let mut room = OfferedRoom::new();
    (0..149).for_each(|index| room.push(0, 1_000 + index));
    let mut offerer = offerer_for(&room);
    let timed = |what: &str, offerer: &mut Offerer, room: &OfferedRoom| {
        let started = Instant::now();
        let offer = offerer.offer(&local());
        let offered = started.elapsed();
        let answer = room.offer();
        let started = Instant::now();
        let negotiated = offerer.handle_answer(&answer).unwrap();
        let (bytes, took) = (answer.len(), started.elapsed());
        eprintln!(
            "{what}: our offer of {} bytes in {offered:?}, an answer of {bytes} bytes read in {took:?}",
            offer.len()
        );
        negotiated
    };
    assert_eq!(timed("149 tracks", &mut offerer, &room).sections_read, 150);
    room.push(0, 5_000);
    offerer.receive(Kind::Audio, 1).unwrap();
    let negotiated = timed("one more", &mut offerer, &room);
    assert_eq!((negotiated.sections_read, negotiated.added.len()), (1, 1));
}

#[test]
fn ten_thousand_sections_are_answered_in_bounded_time() {
    let mut room = OfferedRoom::new();
    (0..SECTIONS_MAX - 1).for_each(|index| room.push(0, 1_000 + index));
    let offer = room.offer();
    let started = Instant::now();
    let answered = answerer().answer(&offer, &local()).unwrap();
    assert_eq!(answered.added.len(), SECTIONS_MAX - 1);
    eprintln!(
        "{SECTIONS_MAX} sections, {} bytes: {:?}",
        offer.len(),
        started.elapsed()
    );
    assert!(started.elapsed().as_secs() < 5);
}

#[test]
fn candidates_are_read_written_and_refused() {
    let udp: Candidate =
        "candidate:2878742611 1 udp 2130706431 127.0.0.1 33170 typ host ufrag qbDCvLwFbZDqebWM"
            .parse()
            .unwrap();
    assert_eq!(
        (udp.transport, udp.kind, udp.address),
        (
            CandidateTransport::Udp,
            CandidateKind::Host,
            "127.0.0.1:33170".parse().unwrap()
        )
    );
    assert_eq!(udp.to_string().parse::<Candidate>().unwrap(), udp);
    assert_eq!(
        udp.to_init().parse::<Trickled>().unwrap(),
        Trickled {
            candidate: Some(udp),
            ufrag: None
        }
    );
    let tcp = "candidate:7 1 tcp 1671430143 127.0.0.1 7881 typ host tcptype passive ufrag abc";
    let tcp: Candidate = tcp.parse().unwrap();
    assert_eq!(tcp.transport, CandidateTransport::TcpPassive);
    assert_eq!(tcp.to_string().parse::<Candidate>().unwrap(), tcp);
    let ours = Candidate::tcp_active("10.0.0.1".parse().unwrap());
    assert!(
        ours.to_string()
            .ends_with(" tcp 1518280447 10.0.0.1 9 typ host tcptype active")
    );
    assert_eq!(ours.to_string().parse::<Candidate>().unwrap(), ours);
    let six: Candidate = "a=candidate:1 1 UDP 5 ::1 9 typ relay raddr 0.0.0.0 rport 9"
        .parse()
        .unwrap();
    assert_eq!(
        (six.address.to_string().as_str(), six.kind),
        ("[::1]:9", CandidateKind::Relayed)
    );
    for text in [
        "",
        "candidate:",
        "candidate:1 2 udp 5 1.2.3.4 5 typ host",
        "candidate:1 1 sctp 5 1.2.3.4 5 typ host",
        "candidate:1 1 udp 4294967296 1.2.3.4 5 typ host",
        "candidate:1 1 udp 5 4ad5c5c1.local 5 typ host",
        "candidate:1 1 udp 5 1.2.3.4 65536 typ host",
        "candidate:1 1 udp 5 1.2.3.4 5 typ guest",
        "candidate:1 1 tcp 5 1.2.3.4 5 typ host",
        "candidate:1 1 tcp 5 1.2.3.4 5 typ host tcptype idle",
        "candidate:1 1 tcp 5 1.2.3.4 5 typ host tcptype",
        "candidate:\" 1 udp 5 1.2.3.4 5 typ host",
    ] {
        assert!(text.parse::<Candidate>().is_err(), "{text}");
    }
}

#[test]
fn trickled_json_is_read_and_refused() {
    let trickled: Trickled = r#"{"candidate":"candidate:1 1 udp 5 1.2.3.4 5 typ host","sdpMid":"","sdpMLineIndex":0,"usernameFragment":"abc"}"#
        .parse()
        .unwrap();
    assert_eq!(
        (
            trickled.candidate.unwrap().address.port(),
            trickled.ufrag.as_deref()
        ),
        (5, Some("abc"))
    );
    assert_eq!(
        r#"{"candidate":"","usernameFragment":null}"#.parse::<Trickled>().unwrap(),
        Trickled {
            candidate: None,
            ufrag: None
        }
    );
    for json in [
        "",
        "[]",
        "{}",
        r#"{"candidate":"x"}"#,
        &format!(r#"{{"candidate":"{}"}}"#, " ".repeat(5000)),
    ] {
        assert!(json.parse::<Trickled>().is_err(), "{json}");
    }
}

#[test]
fn fingerprints_are_read_written_and_refused() {
    let text = Fingerprint(std::array::from_fn(|index| index as u8 * 7)).to_string();
    assert_eq!(text.parse::<Fingerprint>().unwrap().to_string(), text);
    assert_eq!(
        text.to_lowercase()
            .parse::<Fingerprint>()
            .unwrap()
            .to_string(),
        text
    );
    let short = text.rsplit_once(':').unwrap().0;
    for text in [
        "",
        "sha-256",
        "sha-1 00:11",
        short,
        &format!("{text}:00"),
        &text.replace("07", "+7"),
        &text.replace("07", "007"),
    ] {
        assert!(text.parse::<Fingerprint>().is_err(), "{text}");
    }
}
