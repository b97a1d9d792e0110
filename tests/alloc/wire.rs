//! Nothing on the per-packet paths of the wire code allocates.

use std::hint::black_box;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};
use throng::transport::rtp::Ssrc;

use crate::common::counting::ALLOCATIONS;
use crate::common::link::under_test;
use throng::codec::vp8::{PictureId, Vp8Descriptor};
use throng::net::{self, ReceiveBatch};
use throng::path::{Lane, Path, RelayLink, RelayStream, Unsent};
use throng::transport::rtcp::{
    DlrrBlock, ReportBlock, RtcpPacket, RtcpWriter, SenderInfo, packets,
};
use throng::transport::rtp::{Header, HeaderTemplate, classify, split_rtx, write_rtx_osn};
use throng::transport::sequence::{ReplayWindow, Seq, SeqExtender};
use throng::transport::srtp::{DtlsRole, Profile, session};
use throng::units::Bitrate;

/// Returns the number of allocations of this thread while `work` runs.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    under_test(true, work);
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(black_box(vec![1, 2, 3]))), 1);
}

/// Function that sends a frame from the other end of a relay's link.
type SayFrame = Box<dyn Fn(&[u8])>;

/// Returns a relay's link over UDP and one over a stream, each with its other end.
fn links() -> [(RelayLink, SayFrame); 2] {
    let relay = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = net::open_relay_socket([127, 0, 0, 1].into(), 1 << 20).unwrap();
    socket.connect(relay.local_addr().unwrap()).unwrap();
    let ours = socket.local_addr().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    let stream = RelayStream::new(stream, None, &[]).unwrap();
    [
        (
            RelayLink::Udp(socket),
            Box::new(move |frame| assert!(relay.send_to(frame, ours).is_ok())),
        ),
        (
            RelayLink::Stream(Box::new(stream)),
            Box::new(move |frame| io::Write::write_all(&mut &theirs, frame).unwrap()),
        ),
    ]
}

#[test]
fn datagrams_through_a_relay_allocate_nothing() {
    const BURSTS: usize = 20;
    const LEN: usize = 1_101;
    let (peer, relayed) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let (peer, relayed) = (SocketAddr::from((peer, 5)), SocketAddr::from((relayed, 6)));
    let frame = [[0x40, 1, 4, 0x4D].as_slice(), &[7; LEN], &[0; 3]].concat();
    for (link, say) in links() {
        let (control, _said) = tokio::sync::mpsc::channel(4);
        let mut path = Path::of_relay(link, relayed, control);
        path.bind_channel(relayed, peer, 0x4001);
        (0..BURSTS).for_each(|_| say(&frame));
        let (mut batch, mut unsent, mut heard) = (ReceiveBatch::default(), Unsent::default(), 0);
        let (bytes, deadline) = ([7; 3 * LEN], Instant::now() + Duration::from_secs(10));
        let count = allocations(|| {
            while heard < BURSTS && Instant::now() < deadline {
                path.send(peer, &bytes, LEN, &mut true, &mut unsent);
                heard += path.receive(Lane::Main, &mut batch).unwrap_or(0);
            }
        });
        assert_eq!((count, heard), (0, BURSTS));
    }
}

#[test]
fn sealing_and_opening_allocate_nothing() {
    for profile in [
        Profile::AeadAes128Gcm,
        Profile::AeadAes256Gcm,
        Profile::Aes128CmHmacSha1_80,
    ] {
        let material: Vec<u8> = (0..profile.keying_material_len() as u8).collect();
        let (mut sealer, _) = session(profile, &material, DtlsRole::Client).unwrap();
        let (_, mut opener) = session(profile, &material, DtlsRole::Server).unwrap();
        let mut template = HeaderTemplate::new(96, Ssrc(0xCAFE_BABE)).unwrap();
        let twcc = template.push_extension(3, &[0; 2]).unwrap();
        let (mut extender, mut replay) = (SeqExtender::default(), ReplayWindow::default());
        let mut media = |index: u64, buf: &mut [u8; 1_500]| {
            let header_len = template
                .write(buf, false, Seq(index as u16), 90 * index as u32)
                .unwrap();
            twcc.patch(buf, &(index as u16).to_be_bytes());
            let len = sealer.seal_rtp(buf, header_len, 1_100, index).unwrap();
            let packet = &mut buf[..len];
            black_box(classify(packet));
            let header = Header::parse(packet).unwrap();
            let guess = extender.guess(header.seq.0);
            assert!(guess == index && replay.check(guess));
            let plain_len = opener.open_rtp(packet, header.header_len, guess).unwrap();
            extender.commit(guess);
            replay.commit(guess);
            assert!(
                header.extension(packet, 3).is_some()
                    && header.payload(&packet[..plain_len]).is_some()
            );
            let len = {
                let mut writer = RtcpWriter::new(buf);
                writer.pli(Ssrc(1), Ssrc(2)).unwrap();
                writer.len()
            };
            let len = sealer.seal_rtcp(buf, len).unwrap();
            assert_eq!(opener.open_rtcp(&mut buf[..len]), Ok(12));
        };
        let mut buf = [0; 1_500];
        // The first SRTCP packet of a sender allocates its replay window.
        media(65_000, &mut buf);
        assert_eq!(
            allocations(|| (65_001..68_000).for_each(|index| media(index, &mut buf))),
            0,
            "{profile:?}"
        );
    }
}

#[test]
fn writing_and_reading_rtcp_allocates_nothing() {
    let mut out = [0; 4_000];
    let work = || {
        let mut writer = RtcpWriter::new(&mut out);
        let report = ReportBlock {
            ssrc: Ssrc(5),
            ..ReportBlock::default()
        };
        writer
            .sender_report(&SenderInfo::default(), [report; 40])
            .unwrap();
        writer.receiver_report(Ssrc(1), [report]).unwrap();
        writer.sdes_cname(Ssrc(1), "a name").unwrap();
        writer
            .nack(Ssrc(1), Ssrc(2), (0..200).map(|n| Seq(n * 3)))
            .unwrap();
        writer.pli(Ssrc(1), Ssrc(2)).unwrap();
        writer.fir(Ssrc(1), &[(Ssrc(2), 3)]).unwrap();
        writer
            .remb(Ssrc(1), Bitrate::from_bps(1_000_000), &[Ssrc(2), Ssrc(3)])
            .unwrap();
        writer
            .xr(Ssrc(1), Some(7), [DlrrBlock::default(); 3])
            .unwrap();
        writer.bye(&[Ssrc(1)]).unwrap();
        let len = writer.len();
        let (mut read, mut items) = (0, 0);
        for packet in packets(&out[..len]) {
            read += 1;
            items += match packet.unwrap() {
                RtcpPacket::SenderReport { reports, .. }
                | RtcpPacket::ReceiverReport { reports, .. } => reports.count(),
                RtcpPacket::Sdes { chunks } => chunks.filter(|chunk| chunk.cname.is_some()).count(),
                RtcpPacket::Nack { seqs, .. } => seqs.count(),
                RtcpPacket::Fir { entries, .. } => entries.count(),
                RtcpPacket::Bye { sources, .. } | RtcpPacket::Remb { sources, .. } => {
                    sources.count()
                }
                RtcpPacket::Xr { dlrr, .. } => dlrr.count(),
                _ => 0,
            };
        }
        assert_eq!((read, items), (10, 31 + 9 + 1 + 1 + 200 + 1 + 2 + 3 + 1));
    };
    assert_eq!(allocations(work), 0);
}

#[test]
fn payload_descriptors_and_retransmissions_allocate_nothing() {
    let work = || {
        for id in 0..1_000 {
            let mut payload = [0; 32];
            let osn_len = write_rtx_osn(&mut payload, Seq(id)).unwrap();
            let descriptor = Vp8Descriptor {
                start_of_partition: true,
                picture_id: Some(PictureId::Long(id)),
                ..Vp8Descriptor::default()
            };
            let len = descriptor.write(&mut payload[osn_len..]).unwrap();
            let (osn, original) = split_rtx(&payload).unwrap();
            assert_eq!(
                (osn, Vp8Descriptor::parse(original)),
                (Seq(id), Some((descriptor, len)))
            );
        }
    };
    assert_eq!(allocations(work), 0);
}
