//! The fuzz targets: the network input that each takes, and what must hold whatever the input is.
//!
//! A target is a function of bytes that panics if something does not hold. Targets with a state
//! read their input as a script, see [`Script`].

mod dtls;
mod identity;
mod lobby;
mod receive;
mod red;
mod relay;
mod router;
mod rtcp;
mod rtp;
mod sdp;
mod server_page;
mod shard;
mod signal;
mod srtp;
mod stun;
mod vp8;

pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Inputs to start with, made by our own writers. They are the same every time, as far as keys
    /// allow.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Number of mutations of its corpus that a test run tries: as many as take a second without
    /// optimisation.
    pub mutations: usize,
    /// Memory that our code may hold at a time for an input: a number of bytes, and a number of
    /// bytes for each byte of input. `None` if the memory does not depend on the input alone.
    pub memory: Option<(usize, usize)>,
}

pub const ALL: &[Target] = &[
    stun::TARGET,
    dtls::TARGET,
    rtp::TARGET,
    rtcp::TARGET,
    srtp::TARGET,
    sdp::ANSWER,
    sdp::OFFER,
    sdp::SERVE,
    signal::RESPONSE,
    signal::ACCESS,
    identity::TARGET,
    red::TARGET,
    vp8::DESCRIPTOR,
    vp8::ASSEMBLER,
    receive::TARGET,
    shard::TARGET,
    router::TARGET,
    lobby::TARGET,
    server_page::TARGET,
    relay::TARGET,
];

pub fn named(name: &str) -> &'static Target {
    ALL.iter()
        .find(|target| target.name == name)
        .expect("a target of this name")
}

/// Reader of an input as a script: numbers, and chunks of bytes after their length. An input that
/// ends early continues with zeros, so every input means something.
pub struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub fn new(input: &'a [u8]) -> Script<'a> {
        Script(input)
    }

    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes([self.u8(), self.u8()])
    }

    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) << 16 | u32::from(self.u16())
    }

    /// Returns up to 65,535 bytes, which follow a length of two bytes.
    pub fn chunk(&mut self) -> &'a [u8] {
        let len = usize::from(self.u16());
        self.take(len)
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// Writes what [`Script::chunk`] reads.
pub fn chunk(bytes: &[u8]) -> Vec<u8> {
    let len = u16::try_from(bytes.len()).expect("a chunk's length fits its field");
    [&len.to_be_bytes(), bytes].concat()
}

/// Runs code under test, with its allocations counted. The test's own readers run outside of it.
pub fn ours<R>(work: impl FnOnce() -> R) -> R {
    crate::common::link::under_test(true, work)
}
