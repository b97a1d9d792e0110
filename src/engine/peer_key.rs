//! Keys of a shard's peer connections.

use std::ops::{Index, IndexMut};

/// Slot of a peer connection in its shard, below the shard's capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey(pub usize);

/// One slot per peer connection, for what a shard or its worker keeps of it.
pub struct PeerSlots<T>(Vec<Option<T>>);

impl<T> PeerSlots<T> {
    pub fn new(capacity: usize) -> PeerSlots<T> {
        PeerSlots((0..capacity).map(|_| None).collect())
    }

    /// Returns the occupied slots in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().flatten()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().flatten()
    }
}

impl<T> Index<PeerKey> for PeerSlots<T> {
    type Output = Option<T>;

    #[inline]
    fn index(&self, key: PeerKey) -> &Option<T> {
        &self.0[key.0]
    }
}

impl<T> IndexMut<PeerKey> for PeerSlots<T> {
    #[inline]
    fn index_mut(&mut self, key: PeerKey) -> &mut Option<T> {
        &mut self.0[key.0]
    }
}
