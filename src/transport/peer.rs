//! Set-up of one peer connection: ICE (`is`) finds the path, DTLS (`dimpl`) agrees on the SRTP
//! keys.
//!
//! Sans-IO. `handle_*` takes datagrams, candidates and time; `poll_*` gives datagrams and events.
//! [`Peer::sealer`] seals and [`Peer::opener`] opens the media that flows afterwards. STUN keeps
//! the path alive for as long as the peer lives.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dimpl::crypto::{Buf, HashAlgorithm, KeyProvider, SignatureAlgorithm, SigningKey};
use dimpl::{CryptoError, CryptoOperation, Dtls, DtlsCertificate, Output, SrtpProfile};
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, CandidateKind, IceAgent, IceAgentEvent, IceCreds, Protocol};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use ring::digest;
use ring::error::KeyRejected;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};

use super::data::{DataChannelKind, DataMessage, DataRole, DataTransport};
use super::dtls_crypto;
use super::sdp::Fingerprint;
use super::srtp::{self, DtlsRole, Opener, Profile, Sealer};
use crate::net;
use crate::path::{FarEnd, Via};
use crate::secrets::Secrets;
use crate::units::{Epoch, Time};

/// Retry interval of a check that met a role conflict. `is` would wait 250 ms.
const STUN_RTO: Duration = Duration::from_millis(100);
/// Minimum retry interval after an ICE restart: the time that another tick or two on either side
/// may take.
const RESTART_RTO_MIN: Duration = Duration::from_millis(20);
/// DTLS retransmission interval, the same as LiveKit's. `dimpl` would wait 1 s.
const DTLS_RTO: Duration = Duration::from_millis(200);
/// Number of retransmissions of a flight. With doubling from 200 ms, eight of them span the whole
/// of [`DTLS_TIMEOUT`].
const DTLS_RETRIES: usize = 8;
const DTLS_TIMEOUT: Duration = Duration::from_secs(30);
/// Size of the DTLS buffer, larger than any record that `dimpl` makes with the configured MTU.
const DTLS_BUFFER: usize = 2048;
/// Silence after which a lite agent has failed. It sends no checks, so only silence shows a lost
/// peer. The limit is LiveKit's: 10 s until disconnected, 5 more until failed.
const LITE_SILENCE_MAX: Duration = Duration::from_secs(15);
/// Time that a lite agent waits for the first check: LiveKit's limit for a participant's first
/// connection.
const LITE_FIRST_CHECK_MAX: Duration = Duration::from_secs(60);
/// Grace time after a path has ended, because a server that restarts ICE ends its TCP connections
/// before its description arrives.
const PATH_END_GRACE: Duration = Duration::from_secs(1);
/// Maximum number of DTLS datagrams kept until ICE has nominated a path: one flight.
const EARLY_DTLS_MAX: usize = 8;

/// Certificate and DTLS configuration that all connections of a process share, because making
/// either takes over a millisecond.
#[derive(Clone)]
pub struct Identity {
    certificate: DtlsCertificate,
    config: Arc<dimpl::Config>,
}

/// Error returned when the crypto library cannot make an identity.
#[derive(Debug, thiserror::Error)]
pub enum NoIdentity {
    #[error(transparent)]
    Certificate(#[from] rcgen::Error),
    #[error("{0}")]
    Key(KeyRejected),
    #[error(transparent)]
    Config(#[from] dimpl::Error),
}

impl Identity {
    /// Makes the key pair. Fails only if the crypto library fails its self-test.
    pub fn generate() -> Result<Identity, NoIdentity> {
        Identity::with_config(dimpl::Config::builder())
    }

    /// Makes an identity for simulations, never for a network. DTLS draws its retransmission delays
    /// from a seed, so that a run can be repeated. Keys are still secret. They affect the lengths
    /// of some DTLS records, and nothing else.
    pub fn simulated(seed: u64) -> Result<Identity, NoIdentity> {
        Identity::with_config(dimpl::Config::builder().dangerously_set_rng_seed(seed))
    }

    fn with_config(config: dimpl::ConfigBuilder) -> Result<Identity, NoIdentity> {
        let certificate = self_signed_certificate()?;
        let config = config
            .with_crypto_provider(dtls_crypto::provider(
                LoadedKey::leaked(&certificate).map_err(NoIdentity::Key)?,
            ))
            // A cookie proves that a ClientHello comes from the address that it claims (RFC 6347,
            // section 4.2.1). ICE has proved that already, and a connection that no description
            // announced gets no answer at all.
            .use_server_cookie(false)
            .flight_start_rto(DTLS_RTO)
            .flight_retries(DTLS_RETRIES)
            .handshake_timeout(DTLS_TIMEOUT)
            .build()?;
        Ok(Identity {
            certificate,
            config: Arc::new(config),
        })
    }

    /// Returns the fingerprint for `a=fingerprint`.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.certificate.certificate)
    }
}

/// Returns the SHA-256 fingerprint of a certificate (RFC 8122, section 5).
fn fingerprint(certificate: &[u8]) -> Fingerprint {
    let digest = digest::digest(&digest::SHA256, certificate);
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    Fingerprint(bytes)
}

/// Makes a certificate that is valid for a year from now. The fingerprint in a description says
/// whose it is; the certificate itself does not.
fn self_signed_certificate() -> Result<DtlsCertificate, rcgen::Error> {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3_600);
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "DTLS Peer");
    let now = SystemTime::now();
    (params.not_before, params.not_after) = (now.into(), (now + YEAR).into());
    // Firefox requires a serial number that no other certificate has.
    params.serial_number = Some(Secrets::system().bytes::<16>().to_vec().into());
    let certificate = params.self_signed(&key)?;
    Ok(DtlsCertificate {
        certificate: certificate.der().to_vec(),
        private_key: key.serialize_der(),
    })
}

/// The private key of an [`Identity`], parsed once. The library would parse and check it again for
/// each connection, which is a tenth of the handshake.
#[derive(Clone, Debug)]
struct LoadedKey {
    der: Arc<[u8]>,
    pair: Arc<EcdsaKeyPair>,
}

impl LoadedKey {
    /// Leaks the key, because the library requires providers that live for ever. The identity of a
    /// process does so anyway.
    fn leaked(certificate: &DtlsCertificate) -> Result<&'static LoadedKey, KeyRejected> {
        let der = certificate.private_key.as_slice();
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der, &SystemRandom::new())?;
        Ok(Box::leak(Box::new(LoadedKey {
            der: der.into(),
            pair: Arc::new(pair),
        })))
    }
}

impl KeyProvider for LoadedKey {
    fn load_private_key(&self, der: &[u8]) -> Result<Box<dyn SigningKey>, CryptoError> {
        if *der == *self.der {
            Ok(Box::new(self.clone()))
        } else {
            Err(CryptoError::InvalidPrivateKey)
        }
    }
}

impl SigningKey for LoadedKey {
    fn sign(
        &mut self,
        data: &[u8],
        hash: HashAlgorithm,
        signature: &mut Buf,
    ) -> Result<(), CryptoError> {
        let key_hash = self.hash_algorithm();
        if hash != key_hash {
            return Err(CryptoError::SigningKeyHashMismatch {
                key_hash,
                requested: hash,
            });
        }
        let signed = self.pair.sign(&SystemRandom::new(), data);
        let signed = signed.map_err(|_| CryptoError::OperationFailed(CryptoOperation::Sign))?;
        signature.clear();
        signature.extend_from_slice(signed.as_ref());
        Ok(())
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }

    fn hash_algorithm(&self) -> HashAlgorithm {
        HashAlgorithm::SHA256
    }

    fn supported_hash_algorithms(&self) -> &[HashAlgorithm] {
        &[HashAlgorithm::SHA256]
    }
}

/// An ICE user name fragment and password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IceCredentials {
    pub ufrag: String,
    pub password: String,
}

impl IceCredentials {
    /// Draws credentials from the system's generator. Only the edge (signalling, tests) calls this.
    /// (`IceCreds::new` uses a generator that is not for secrets.)
    pub fn random() -> IceCredentials {
        IceCredentials::draw(&mut Secrets::system())
    }

    /// Draws new credentials for a new connection or an ICE restart. RFC 8445, section 5.3 requires
    /// at least 24 and 128 bits; these have 91 and 182.
    pub fn draw(secrets: &mut Secrets) -> IceCredentials {
        IceCredentials {
            ufrag: secrets.letters(16),
            password: secrets.letters(32),
        }
    }
}

/// Parameters of one connection, as the exchanged descriptions give them.
#[derive(Clone, Debug)]
pub struct PeerParameters {
    pub local_address: SocketAddr,
    pub local: IceCredentials,
    pub remote: IceCredentials,
    pub remote_fingerprint: Fingerprint,
    pub remote_candidates: Vec<SocketAddr>,
    pub ice_controlling: bool,
    /// Whether we send the ClientHello (`a=setup:active`).
    pub dtls_active: bool,
}

/// Event for the owner of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// A path is nominated. Datagrams go to this address from now on. The event repeats when the
    /// path changes.
    Nominated(FarEnd),
    /// SRTP keys are available, so media may flow.
    Connected,
    Failed(PeerFailure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerFailure {
    /// STUN checks got no answer for as long as the agent waits.
    IceDisconnected,
    /// The remote certificate is not the one that the description promised.
    FingerprintMismatch,
    /// The DTLS handshake broke or timed out.
    Dtls,
    /// The other side ended the DTLS session.
    ClosedByRemote,
    /// The connection that carried datagrams ended. This happens with TCP, not with UDP.
    PathEnded,
}

/// Local end of a path, which sends and receives datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NearEnd {
    /// A socket with this address.
    Udp(SocketAddr),
    /// A connection from this local address to a passive candidate of the other side (RFC 6544,
    /// section 4.2).
    Tcp {
        local: SocketAddr,
        remote: SocketAddr,
    },
    /// A passive candidate of ours: the other side opens connections to it.
    TcpListener(SocketAddr),
    /// A relay, with our relayed address.
    Relay(SocketAddr),
}

impl PeerFailure {
    pub fn describe(self) -> &'static str {
        match self {
            PeerFailure::IceDisconnected => "ICE: no answer on any candidate pair",
            PeerFailure::FingerprintMismatch => {
                "DTLS: the server's certificate does not match its SDP fingerprint"
            }
            PeerFailure::Dtls => "DTLS: handshake failed",
            PeerFailure::ClosedByRemote => "DTLS: closed by the server",
            PeerFailure::PathEnded => {
                "the TCP connection that carried media was closed by the server, or by something on the way"
            }
        }
    }
}

/// One peer connection.
pub struct Peer {
    sealer: Option<Sealer>,
    opener: Option<Opener>,
    /// Destination of datagrams, by `PeerSetup::via`.
    remote: Option<SocketAddr>,
    /// Whether that is the other end of a TCP connection.
    is_stream: bool,
    next_timeout: Time,
    setup: Box<PeerSetup>,
}

/// State that no media packet touches.
struct PeerSetup {
    ice: IceAgent,
    dtls: Dtls,
    epoch: Epoch,
    local_address: SocketAddr,
    /// Local address in the other address family, if there is one.
    other_local_address: Option<SocketAddr>,
    /// Relayed addresses.
    relayed: Vec<SocketAddr>,
    /// Local end that the nominated path uses.
    via: Via,
    remote_fingerprint: Fingerprint,
    dtls_active: bool,
    dtls_started: bool,
    early_dtls: Vec<Vec<u8>>,
    failure: Option<PeerFailure>,
    failure_told: bool,
    responses_seen: u64,
    /// Time when a lite agent fails unless a check comes before; [`Time::MAX`] for a full agent,
    /// which sends checks itself.
    silent_until: Time,
    /// Time when the peer fails because its path has ended, unless the other side restarts ICE
    /// before.
    pathless_until: Time,
    is_restarting: bool,
    nominated_at: Option<Time>,
    connected_at: Option<Time>,
    data: Option<DataService>,
}

/// Data channels that are served. Their transport is made when the first SCTP packet comes, because
/// most connections never have one.
struct DataService {
    role: DataRole,
    transport: Option<Box<DataTransport>>,
}

impl Peer {
    pub fn new(identity: &Identity, parameters: &PeerParameters, epoch: Epoch, now: Time) -> Peer {
        Peer::with_agent(identity, parameters, ice_agent(parameters), epoch, now)
    }

    /// Creates an `ice-lite` peer (RFC 8445, section 2.5): it answers checks and sends none, and
    /// the other side nominates. Remote candidates and the role are ignored, because addresses are
    /// learnt from checks and a lite agent is controlled.
    pub fn lite(identity: &Identity, parameters: &PeerParameters, epoch: Epoch, now: Time) -> Peer {
        let mut ice = ice_agent(&PeerParameters {
            remote_candidates: Vec::new(),
            ice_controlling: false,
            ..parameters.clone()
        });
        ice.set_ice_lite(true);
        // The largest tie-breaker makes the other side yield in a role conflict. A lite agent that
        // switched its role would wait for a nomination that never comes.
        ice.set_control_tie_breaker(u64::MAX);
        let mut peer = Peer::with_agent(identity, parameters, ice, epoch, now);
        peer.setup.silent_until = now + LITE_FIRST_CHECK_MAX;
        peer
    }

    fn with_agent(
        identity: &Identity,
        parameters: &PeerParameters,
        ice: IceAgent,
        epoch: Epoch,
        now: Time,
    ) -> Peer {
        let mut dtls = Dtls::new_12(
            identity.config.clone(),
            identity.certificate.clone(),
            epoch.instant(now),
        );
        dtls.set_active(parameters.dtls_active);
        let setup = PeerSetup {
            ice,
            dtls,
            epoch,
            local_address: parameters.local_address,
            other_local_address: None,
            relayed: Vec::new(),
            via: Via::Udp,
            remote_fingerprint: parameters.remote_fingerprint,
            dtls_active: parameters.dtls_active,
            dtls_started: false,
            early_dtls: Vec::new(),
            failure: None,
            failure_told: false,
            responses_seen: 0,
            silent_until: Time::MAX,
            pathless_until: Time::MAX,
            is_restarting: false,
            nominated_at: None,
            connected_at: None,
            data: None,
        };
        Peer {
            sealer: None,
            opener: None,
            remote: None,
            is_stream: false,
            next_timeout: now,
            setup: Box::new(setup),
        }
    }

    /// Adds a local end, with the remote end if that is known.
    ///
    /// One UDP address per family is enough. The path decides which address datagrams leave from,
    /// and all of them reach us.
    pub fn add_near_end(&mut self, end: NearEnd, now: Time) {
        let setup = &mut self.setup;
        match end {
            NearEnd::Udp(address) => {
                if address.is_ipv6() == setup.local_address.is_ipv6()
                    || setup.other_local_address.is_some()
                {
                    return;
                }
                if let Ok(candidate) = Candidate::host(address, Protocol::Udp) {
                    setup.other_local_address = Some(address);
                    setup.ice.add_local_candidate(candidate);
                }
            }
            NearEnd::Tcp { local, remote } => {
                let host = |address| Candidate::host(address, Protocol::Tcp);
                if let (Ok(local), Ok(remote)) = (host(local), host(remote)) {
                    setup.ice.add_local_candidate(local);
                    setup.ice.add_remote_candidate(remote);
                }
            }
            NearEnd::TcpListener(address) => {
                if let Ok(candidate) = Candidate::host(address, Protocol::Tcp) {
                    setup.ice.add_local_candidate(candidate);
                }
            }
            NearEnd::Relay(relayed) => {
                if let Ok(candidate) = Candidate::relayed(relayed, relayed, Protocol::Udp) {
                    setup.relayed.push(relayed);
                    setup.ice.add_local_candidate(candidate);
                }
            }
        }
        self.next_timeout = now;
    }

    /// Takes note that a local end is gone. With `is_last` no other is left.
    pub fn handle_path_end(&mut self, via: Via, is_last: bool, now: Time) {
        let setup = &mut self.setup;
        let is_used = is_last || (setup.via == via && self.remote.is_some());
        if is_used && !setup.is_restarting {
            setup.pathless_until = setup.pathless_until.min(now + PATH_END_GRACE);
        }
        if let Via::Tcp(local) = via {
            let is_gone = |candidate: &Candidate| {
                candidate.proto() == Protocol::Tcp && candidate.addr() == local
            };
            let gone = setup.ice.local_candidates().find(is_gone);
            gone.map(|candidate| setup.ice.invalidate_candidate(&candidate));
        }
        self.next_timeout = now;
    }

    pub fn add_remote_candidate(&mut self, address: SocketAddr, now: Time) {
        if let Ok(candidate) = Candidate::host(address, Protocol::Udp) {
            self.setup.ice.add_remote_candidate(candidate);
            self.next_timeout = now;
        }
    }

    /// Restarts ICE with new credentials on both sides (RFC 8445, section 9). The DTLS session
    /// stays, and datagrams keep their destination until a new path is nominated.
    pub fn restart_ice(&mut self, local: &IceCredentials, remote: &IceCredentials, now: Time) {
        // Checks are retried sooner after a restart. No new path is nominated until a check
        // succeeds, and the first one may come before the other side knows of the restart. The
        // round trip is known by now.
        if let Some(rtt) = self.setup.ice.nominated_pair_rtt() {
            self.setup
                .ice
                .set_initial_stun_rto((rtt * 2).clamp(RESTART_RTO_MIN, STUN_RTO));
        }
        (self.setup.pathless_until, self.setup.is_restarting) = (Time::MAX, true);
        self.setup.ice.ice_restart(creds(local), true);
        self.setup.ice.set_remote_credentials(creds(remote));
        if self.setup.ice.ice_lite() {
            self.setup.silent_until = now + LITE_SILENCE_MAX;
        }
        self.next_timeout = now;
    }

    /// From now on relays alone carry it.
    pub fn keep_to_relays(&mut self) {
        let ice = &mut self.setup.ice;
        let straight = ice
            .local_candidates()
            .filter(|candidate| candidate.kind() != CandidateKind::Relayed);
        for candidate in straight.collect::<Vec<_>>() {
            ice.invalidate_candidate(&candidate);
        }
    }

    /// Serves data channels: the client may open them. With `opens`, we open LiveKit's two once the
    /// client has begun an association.
    pub fn serve_data(&mut self, role: DataRole) {
        self.setup.data.get_or_insert(DataService {
            role,
            transport: None,
        });
    }

    /// Returns the next message received on a data channel.
    pub fn poll_data(&mut self) -> Option<DataMessage> {
        self.setup.data_transport()?.poll_message()
    }

    /// Sends a message; follow with [`Peer::poll`]. Returns `false` if the client has no such
    /// channel, or does not read from it.
    pub fn send_data(&mut self, channel: DataChannelKind, payload: &[u8]) -> bool {
        let transport = self.setup.data_transport();
        transport.is_some_and(|transport| transport.send(channel, payload))
    }

    /// Takes a STUN or DTLS datagram. Anything malformed is dropped; returns whether it was taken.
    pub fn handle_setup_datagram(
        &mut self,
        datagram: &[u8],
        from: impl Into<FarEnd>,
        now: Time,
    ) -> bool {
        self.next_timeout = now;
        match datagram.first() {
            Some(0..=3) => self.setup.handle_stun(datagram, from.into(), now),
            Some(20..=63) => self.setup.handle_dtls(datagram, now),
            _ => false,
        }
    }

    /// Advances the timers. It is due at [`Peer::next_timeout`]; follow with [`Peer::poll`].
    pub fn handle_timeout(&mut self, now: Time) {
        let instant = self.setup.epoch.instant(now);
        self.setup.ice.handle_timeout(instant);
        if now >= self.setup.silent_until {
            self.setup.fail(PeerFailure::IceDisconnected);
        }
        if now >= self.setup.pathless_until {
            self.setup.fail(PeerFailure::PathEnded);
        }
        if self.setup.dtls_started && self.setup.dtls.handle_timeout(instant).is_err() {
            self.setup.fail(PeerFailure::Dtls);
        }
        if let Some(data) = self.setup.data_transport() {
            data.handle_timeout(instant);
        }
    }

    /// Does the same as [`Peer::poll_by`], for a connection that uses UDP only.
    pub fn poll(
        &mut self,
        now: Time,
        mut send: impl FnMut(&[u8], SocketAddr),
        event: impl FnMut(PeerEvent),
    ) {
        self.poll_by(now, |datagram, to| send(datagram, to.address), event);
    }

    /// Hands every pending datagram to `send` and every event to `event`, then computes the next
    /// timeout.
    pub fn poll_by(
        &mut self,
        now: Time,
        mut send: impl FnMut(&[u8], FarEnd),
        mut event: impl FnMut(PeerEvent),
    ) {
        self.poll_ice(now, &mut send, &mut event);
        let mut dtls_timeout = self.poll_dtls(now, &mut send, &mut event);
        // Data is sealed record by record, because DTLS keeps few of them.
        while self.setup.seal_data(now) {
            dtls_timeout = self.poll_dtls(now, &mut send, &mut event);
        }
        let ice_timeout = self
            .setup
            .ice
            .poll_timeout()
            .map_or(Time::MAX, |at| self.setup.epoch.time(at));
        let data_timeout = self.setup.data_transport();
        let data_timeout = data_timeout.and_then(|data| data.poll_timeout());
        let data_timeout = data_timeout.map_or(Time::MAX, |at| self.setup.epoch.time(at));
        self.next_timeout = ice_timeout
            .min(dtls_timeout)
            .min(data_timeout)
            .min(self.setup.silent_until)
            .min(self.setup.pathless_until)
            .max(now + Duration::from_millis(1));
        if let (false, Some(failure)) = (self.setup.failure_told, self.setup.failure) {
            self.setup.failure_told = true;
            event(PeerEvent::Failed(failure));
        }
    }

    pub fn next_timeout(&self) -> Time {
        self.next_timeout
    }

    /// Returns the destination of datagrams, once a path is nominated.
    pub fn remote(&self) -> Option<SocketAddr> {
        self.remote
    }

    /// Whether datagrams leave in a TCP connection.
    pub fn is_stream(&self) -> bool {
        self.is_stream
    }

    /// Returns the local end that datagrams leave from.
    pub fn via(&self) -> Via {
        self.setup.via
    }

    /// Returns the sealer for RTP; `None` until the keys are available.
    pub fn sealer(&self) -> Option<&Sealer> {
        self.sealer.as_ref()
    }

    /// Prefetches what opening a packet needs.
    pub fn prefetch_opener(&self) {
        net::prefetch(&self.opener, usize::MAX);
    }

    /// Prefetches what sealing a packet needs.
    pub fn prefetch_sending(&self) {
        net::prefetch(&self.remote, usize::MAX);
        net::prefetch(&self.sealer, usize::MAX);
    }

    /// Returns the sealer for RTCP, whose packet index the sealer keeps.
    pub fn sealer_mut(&mut self) -> Option<&mut Sealer> {
        self.sealer.as_mut()
    }

    pub fn opener(&mut self) -> Option<&mut Opener> {
        self.opener.as_mut()
    }

    pub fn is_connected(&self) -> bool {
        self.sealer.is_some() && self.setup.failure.is_none()
    }

    pub fn nominated_at(&self) -> Option<Time> {
        self.setup.nominated_at
    }

    pub fn connected_at(&self) -> Option<Time> {
        self.setup.connected_at
    }

    /// Returns the round trip of a STUN check that was answered since the last call.
    pub fn poll_stun_rtt(&mut self) -> Option<Duration> {
        let responses = self.setup.ice.nominated_pair_responses_received()?;
        if responses == self.setup.responses_seen {
            return None;
        }
        self.setup.responses_seen = responses;
        self.setup.ice.nominated_pair_rtt()
    }

    fn poll_ice(
        &mut self,
        now: Time,
        send: &mut impl FnMut(&[u8], FarEnd),
        event: &mut impl FnMut(PeerEvent),
    ) {
        while let Some(happened) = self.setup.ice.poll_event() {
            match happened {
                IceAgentEvent::NominatedSend {
                    proto,
                    source,
                    destination,
                } => {
                    let end = self.setup.far_end(proto, source, destination);
                    (self.remote, self.setup.via) = (Some(end.address), end.via);
                    self.is_stream = matches!(end.via, Via::Tcp(_));
                    self.setup.is_restarting = false;
                    self.setup.nominated_at.get_or_insert(now);
                    self.setup.start_dtls(now);
                    event(PeerEvent::Nominated(end));
                }
                IceAgentEvent::IceConnectionStateChange(state) if state.is_disconnected() => {
                    self.setup.fail(PeerFailure::IceDisconnected)
                }
                _ => {}
            }
        }
        while let Some(transmit) = self.setup.ice.poll_transmit() {
            let (proto, source) = (transmit.proto, transmit.source);
            let to = self.setup.far_end(proto, source, transmit.destination);
            send(&transmit.contents, to);
        }
    }

    /// Returns when DTLS must be called again.
    fn poll_dtls(
        &mut self,
        now: Time,
        send: &mut impl FnMut(&[u8], FarEnd),
        event: &mut impl FnMut(PeerEvent),
    ) -> Time {
        if !self.setup.dtls_started {
            return Time::MAX;
        }
        let mut buffer = [0; DTLS_BUFFER];
        loop {
            match self.setup.dtls.poll_output(&mut buffer) {
                Output::Packet(packet) => {
                    if let Some(address) = self.remote {
                        let via = self.setup.via;
                        send(packet, FarEnd { via, address });
                    }
                }
                Output::Timeout(at) => return self.setup.epoch.time(at),
                Output::ApplicationData(packet) => self.setup.handle_data(packet, now),
                Output::PeerCert(der) => self.setup.check_certificate(der),
                Output::KeyingMaterial(material, profile) => {
                    let keyed =
                        self.install_keys(&material, profile) && self.setup.failure.is_none();
                    self.setup.connected_at = self.setup.connected_at.or(keyed.then_some(now));
                    keyed.then(|| event(PeerEvent::Connected));
                }
                Output::CloseNotify => self.setup.fail(PeerFailure::ClosedByRemote),
                Output::BufferTooSmall { .. } => {
                    // This cannot happen with the default MTU. A record that does not fit means a
                    // broken session and is no reason for a larger buffer.
                    self.setup.fail(PeerFailure::Dtls);
                    return Time::MAX;
                }
                _ => {}
            }
        }
    }

    fn install_keys(&mut self, material: &[u8], profile: SrtpProfile) -> bool {
        let profile = match profile {
            SrtpProfile::AEAD_AES_128_GCM => Profile::AeadAes128Gcm,
            SrtpProfile::AEAD_AES_256_GCM => Profile::AeadAes256Gcm,
            SrtpProfile::AES128_CM_SHA1_80 => Profile::Aes128CmHmacSha1_80,
            _ => {
                self.setup.fail(PeerFailure::Dtls);
                return false;
            }
        };
        let role = if self.setup.dtls_active {
            DtlsRole::Client
        } else {
            DtlsRole::Server
        };
        match srtp::session(profile, material, role) {
            Ok((sealer, opener)) => {
                self.sealer = Some(sealer);
                self.opener = Some(opener);
                true
            }
            Err(_) => {
                self.setup.fail(PeerFailure::Dtls);
                false
            }
        }
    }
}

impl PeerSetup {
    fn handle_stun(&mut self, datagram: &[u8], from: FarEnd, now: Time) -> bool {
        let Ok(message) = StunMessage::parse(datagram) else {
            return false;
        };
        let (proto, destination) = match from.via {
            Via::Udp => (Protocol::Udp, self.local_address_towards(from.address)),
            Via::Tcp(local) => (Protocol::Tcp, local),
            Via::Relay(relayed) => (Protocol::Udp, relayed),
        };
        let packet = StunPacket {
            proto,
            source: from.address,
            destination,
            message,
        };
        let taken = self.ice.handle_packet(self.epoch.instant(now), packet);
        if taken && self.ice.ice_lite() {
            self.silent_until = now + LITE_SILENCE_MAX;
        }
        taken
    }

    /// Translates the agent's notion of a pair: its destination, and the local candidate that it
    /// leaves from.
    fn far_end(&self, proto: Protocol, source: SocketAddr, address: SocketAddr) -> FarEnd {
        let via = match proto {
            Protocol::Tcp => Via::Tcp(source),
            _ if self.relayed.contains(&source) => Via::Relay(source),
            _ => Via::Udp,
        };
        FarEnd { via, address }
    }

    fn local_address_towards(&self, remote: SocketAddr) -> SocketAddr {
        self.other_local_address
            .filter(|other| other.is_ipv6() == remote.is_ipv6())
            .unwrap_or(self.local_address)
    }

    fn handle_dtls(&mut self, datagram: &[u8], now: Time) -> bool {
        if !self.dtls_started {
            // The other side may finish its checks, and start DTLS, before our path is nominated.
            if self.early_dtls.len() == EARLY_DTLS_MAX {
                return false;
            }
            self.early_dtls.push(datagram.to_vec());
            return true;
        }
        if self.failure.is_some() {
            return false;
        }
        let alive = self.dtls.handle_timeout(self.epoch.instant(now)).is_ok()
            && self.dtls.handle_packet(datagram).is_ok();
        if !alive {
            self.fail(PeerFailure::Dtls);
        }
        alive
    }

    fn data_transport(&mut self) -> Option<&mut DataTransport> {
        self.data.as_mut()?.transport.as_deref_mut()
    }

    fn handle_data(&mut self, packet: &[u8], now: Time) {
        // The other side is not authenticated until the keys are available.
        let is_proved = self.connected_at.is_some() && self.failure.is_none();
        let Some(data) = self.data.as_mut().filter(|_| is_proved) else {
            return;
        };
        let (role, dtls_active) = (data.role, self.dtls_active);
        data.transport
            .get_or_insert_with(|| Box::new(DataTransport::new(role, dtls_active)))
            .handle_packet(packet, self.epoch.instant(now));
    }

    /// Hands the next packet of the data channels to DTLS. Returns `false` if there is none.
    fn seal_data(&mut self, now: Time) -> bool {
        let instant = self.epoch.instant(now);
        if self.failure.is_some() {
            return false;
        }
        let packet = self
            .data_transport()
            .and_then(|data| data.poll_transmit(instant));
        let Some(packet) = packet else { return false };
        if self.dtls.send_application_data(&packet).is_err() {
            self.fail(PeerFailure::Dtls);
        }
        true
    }

    fn start_dtls(&mut self, now: Time) {
        if self.dtls_started {
            return;
        }
        self.dtls_started = true;
        if self.dtls.handle_timeout(self.epoch.instant(now)).is_err() {
            self.fail(PeerFailure::Dtls);
        }
        for datagram in std::mem::take(&mut self.early_dtls) {
            self.handle_dtls(&datagram, now);
        }
    }

    fn check_certificate(&mut self, der: &[u8]) {
        if fingerprint(der) != self.remote_fingerprint {
            self.fail(PeerFailure::FingerprintMismatch);
        }
    }

    /// Records a failure. Only the first one is kept, because later ones follow from it.
    fn fail(&mut self, failure: PeerFailure) {
        self.failure.get_or_insert(failure);
    }
}

/// Returns the local user name fragment in a binding request. It distinguishes several connections
/// on one socket.
pub fn local_ufrag_of_check(datagram: &[u8]) -> Option<&str> {
    let message = StunMessage::parse(datagram).ok()?;
    if !message.is_binding_request() {
        return None;
    }
    message.username()?.split_once(':').map(|(local, _)| local)
}

fn creds(credentials: &IceCredentials) -> IceCreds {
    IceCreds {
        ufrag: credentials.ufrag.clone(),
        pass: credentials.password.clone(),
    }
}

fn ice_agent(parameters: &PeerParameters) -> IceAgent {
    let mut ice = IceAgent::new(creds(&parameters.local));
    ice.set_initial_stun_rto(STUN_RTO);
    // Checks are answered in microseconds here. Pacing them at the RFC's 50 ms would be most of the
    // time to connect.
    ice.set_timing_advance(Duration::from_millis(5));
    ice.set_controlling(parameters.ice_controlling);
    ice.set_remote_credentials(creds(&parameters.remote));
    if let Ok(candidate) = Candidate::host(parameters.local_address, Protocol::Udp) {
        ice.add_local_candidate(candidate);
    }
    for address in &parameters.remote_candidates {
        if let Ok(candidate) = Candidate::host(*address, Protocol::Udp) {
            ice.add_remote_candidate(candidate);
        }
    }
    ice
}
