//! The engine's side of a recording. It copies packets into pages and never waits.

use crate::transport::rtp::Ssrc;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use crate::codec::Codec;
use crate::units::Time;

/// Number of pages of one tap. These 2 MiB hold more than a second of the busiest subscriber (12
/// Mbps), so that a disk may stall for that long. Unused pages take no memory.
pub(super) const PAGES: usize = 32;
const PAGE_BYTES: usize = 64 << 10;
/// Maximum number of packets in a page. It limits a page of Opus, whose packets are small.
const PAGE_PACKETS: usize = 512;
/// Maximum age of a page. An older one is handed over with the next packet. A killed process loses
/// no more than this and [`super::POLL`].
const PAGE_AGE_MAX: Duration = Duration::from_millis(100);

/// Facts of one opened packet. Its payload follows the earlier ones in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TappedPacket {
    /// Number of the stream within the connection. Unlike an SSRC, it is never used twice.
    pub stream: u32,
    pub ssrc: Ssrc,
    pub codec: Codec,
    /// Unwrapped sequence number.
    pub ext_seq: u64,
    pub rtp_time: u32,
    pub marker: bool,
    pub arrival: Time,
}

/// Batch of packets on its way to the recorder; empty on its way back.
pub(super) struct TapPage {
    pub room: u32,
    pub connection: u32,
    packets: Vec<(TappedPacket, usize)>,
    payloads: Vec<u8>,
    opened_at: Time,
}

impl TapPage {
    fn new(room: u32) -> TapPage {
        TapPage {
            room,
            connection: 0,
            packets: Vec::with_capacity(PAGE_PACKETS),
            payloads: Vec::with_capacity(PAGE_BYTES),
            opened_at: Time::ZERO,
        }
    }

    pub fn packets(&self) -> impl Iterator<Item = (&TappedPacket, &[u8])> {
        let mut rest = self.payloads.as_slice();
        self.packets.iter().map(move |(packet, len)| {
            let (payload, after) = rest.split_at(*len);
            rest = after;
            (packet, payload)
        })
    }

    pub fn clear(&mut self) {
        self.packets.clear();
        self.payloads.clear();
    }

    fn has_room(&self, len: usize) -> bool {
        self.packets.len() < PAGE_PACKETS && self.payloads.len() + len <= PAGE_BYTES
    }
}

/// Receives copies of a recorded participant's packets. It allocates nothing after construction,
/// takes no lock and makes no system call.
pub struct Tap {
    page: Option<TapPage>,
    /// Spare pages. The page used last is taken first, so the others are touched only if the
    /// recorder is slow.
    spare: Vec<TapPage>,
    returned: Receiver<TapPage>,
    full: SyncSender<TapPage>,
    connection: u32,
    dropped: Arc<AtomicU64>,
}

impl Tap {
    /// Creates a tap. `full` has room for all pages, so that sending never waits.
    pub(super) fn new(room: u32, full: SyncSender<TapPage>, returned: Receiver<TapPage>) -> Tap {
        Tap {
            page: None,
            spare: (0..PAGES).map(|_| TapPage::new(room)).collect(),
            returned,
            full,
            connection: 0,
            dropped: Arc::default(),
        }
    }

    /// Returns the counter of packets for which there was no room.
    pub(super) fn dropped(&self) -> Arc<AtomicU64> {
        self.dropped.clone()
    }

    /// Switches to another connection of the participant. Its streams are different ones, even with
    /// the same numbers.
    pub fn begin_connection(&mut self) {
        self.hand_over();
        self.connection += 1;
    }

    /// Copies one packet; `payload` is the part after the RTP header.
    pub fn take(&mut self, packet: &TappedPacket, payload: &[u8]) {
        let goes_out = |page: &TapPage| {
            !page.has_room(payload.len()) || packet.arrival.since(page.opened_at) >= PAGE_AGE_MAX
        };
        if self.page.as_ref().is_some_and(goes_out) {
            self.hand_over();
        }
        let Some(page) = self
            .open_page(packet.arrival)
            .filter(|page| page.has_room(payload.len()))
        else {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        };
        page.packets.push((*packet, payload.len()));
        page.payloads.extend_from_slice(payload);
    }

    fn open_page(&mut self, now: Time) -> Option<&mut TapPage> {
        if self.page.is_none() {
            self.spare.extend(self.returned.try_iter());
            self.page = self.spare.pop();
            if let Some(page) = &mut self.page {
                (page.connection, page.opened_at) = (self.connection, now);
            }
        }
        self.page.as_mut()
    }

    fn hand_over(&mut self) {
        if let Some(page) = mem::take(&mut self.page) {
            // If the recorder is gone, it has reported why.
            let _ = self.full.try_send(page);
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.hand_over();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    fn packet(ext_seq: u64, arrival: Time) -> TappedPacket {
        TappedPacket {
            stream: 1,
            ssrc: Ssrc(2),
            codec: Codec::Opus,
            ext_seq,
            rtp_time: 0,
            marker: false,
            arrival,
        }
    }

    #[test]
    fn packets_come_out_as_they_went_in_and_a_page_leaves_when_it_is_old() {
        let (full, pages) = sync_channel(PAGES);
        let (_give_back, returned) = sync_channel(PAGES);
        let mut tap = Tap::new(3, full, returned);
        let payloads: [&[u8]; 4] = [b"one", b"", b"three", b"four"];
        for (at, payload) in payloads.iter().enumerate() {
            tap.take(
                &packet(at as u64, Time::from_millis(at as u64 * 40)),
                payload,
            );
        }
        let page = pages.try_recv().unwrap();
        let seen: Vec<_> = page
            .packets()
            .map(|(packet, payload)| (packet.ext_seq, payload))
            .collect();
        assert_eq!(
            (page.room, seen),
            (3, vec![(0, &b"one"[..]), (1, b""), (2, b"three")])
        );
        assert!(pages.try_recv().is_err(), "the last page is young");
        drop(tap);
        assert_eq!(
            pages.try_recv().unwrap().packets().count(),
            1,
            "the last page comes with the tap's end"
        );
    }

    #[test]
    fn without_a_recorder_the_oldest_are_kept_the_rest_is_counted_and_nothing_grows() {
        let (full, pages) = sync_channel(PAGES);
        let (give_back, returned) = sync_channel(PAGES);
        let mut tap = Tap::new(0, full, returned);
        let payload = [7; 1_000];
        let per_page = PAGE_BYTES / payload.len();
        let sent = PAGES * per_page + 500;
        for at in 0..sent {
            tap.take(&packet(at as u64, Time::ZERO), &payload);
        }
        assert_eq!(tap.dropped.load(Ordering::Relaxed), 500);
        let mut page = pages.try_recv().unwrap();
        let kept = page.packets().map(|(packet, _)| packet.ext_seq);
        assert!(kept.eq(0..per_page as u64));
        page.clear();
        assert!(give_back.try_send(page).is_ok());
        tap.take(&packet(9_999, Time::ZERO), &payload);
        assert_eq!(
            tap.dropped.load(Ordering::Relaxed),
            500,
            "a page that came back takes packets again"
        );
        tap.take(&packet(10_000, Time::ZERO), &vec![0; PAGE_BYTES + 1]);
        assert_eq!(
            tap.dropped.load(Ordering::Relaxed),
            501,
            "no page holds this"
        );
    }
}
