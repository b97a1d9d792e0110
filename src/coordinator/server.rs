//! The coordinator's port: HTTP, with TLS if a certificate is given.
//!
//! A stranger costs little and bounded memory. [`crate::http`] limits the number of connections and
//! their times. A body has a time limit, too. A request without a token is answered before a byte
//! of its body is read. A body whose declared length is too long is refused at once.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{self, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{StreamExt, stream};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, trace, warn};

use super::access::{CoordinatorAccess, Denied};
use super::desk::{Desk, DeskFailure, DeskHandle};
use super::document::{self, About};
use super::page;
use super::protocol::{
    self, BEAT_BYTES_MAX, BeatMessage, Job, MalformedMessage, ProberReport, ProtocolMessage,
    REGISTER_BYTES_MAX, REPORT_BYTES_MAX, RefusalMessage, Register, TokensRequest,
};
use super::result::Merged;
use super::state::{RefusedRequest, RunPhase, RunState};
use super::tokens::Mint;
use crate::http::{self, Limits};
use crate::metrics_page;
use crate::plan::Plan;
use crate::report::{Judging, TargetInfo};

/// Largest number of connections: two for each prober of the largest run, and as many again for
/// viewers.
pub const CONNECTIONS_MAX: usize = 1_024;
const LISTEN_BACKLOG: i32 = 1_024;
/// Largest number of bytes of all bodies that are being read: four of the longest reports.
const BODIES_BYTES_MAX: usize = 4 * REPORT_BYTES_MAX;
/// Time limit for a whole body. It allows for a report of megabytes from a host whose uplink is
/// full of its own media.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Age at which a result is merged again.
const RESULT_FRESH: Duration = Duration::from_secs(1);

/// Reason why the coordinator does not listen. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "{0} is in use: stop what listens there, or choose another --coordinator-port (0 takes any)"
    )]
    InUse(SocketAddr),
    #[error("{0} is not allowed: ports below 1024 need root, or choose another --coordinator-port")]
    Forbidden(SocketAddr),
    #[error(
        "{0} is no address of this host: give --coordinator-bind one that `ip address` shows, or 0.0.0.0"
    )]
    NotOurs(SocketAddr),
    #[error("cannot listen on {address}: {cause}")]
    Other {
        address: SocketAddr,
        cause: io::Error,
    },
}

/// Binds the port.
pub fn listen(address: SocketAddr) -> Result<std::net::TcpListener, ListenError> {
    let bind = || {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        // A restarted coordinator finds connections of its predecessor that are still closing.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(LISTEN_BACKLOG)?;
        Ok(socket.into())
    };
    bind().map_err(|cause: io::Error| match cause.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(address),
        io::ErrorKind::PermissionDenied => ListenError::Forbidden(address),
        io::ErrorKind::AddrNotAvailable => ListenError::NotOurs(address),
        _ => ListenError::Other { address, cause },
    })
}

/// Reason why the given files cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
pub enum UnusableTls {
    #[error("--tls-cert {}: {cause}", certificate.display())]
    Chain {
        certificate: PathBuf,
        cause: pem::Error,
    },
    #[error("--tls-cert {}: no certificate in PEM is in it", certificate.display())]
    NoCertificate { certificate: PathBuf },
    #[error("--tls-key {}: {cause}", key.display())]
    Key { key: PathBuf, cause: pem::Error },
    #[error(
        "--tls-cert {} and --tls-key {} do not go together: {cause}",
        certificate.display(),
        key.display()
    )]
    Mismatch {
        certificate: PathBuf,
        key: PathBuf,
        cause: rustls::Error,
    },
}

/// Creates the TLS acceptor.
///
/// # Errors
/// A file cannot be read, or is not what its flag says.
pub fn tls(certificate: &Path, key: &Path) -> Result<TlsAcceptor, UnusableTls> {
    let (certificate, key) = (certificate.to_owned(), key.to_owned());
    let chain = CertificateDer::pem_file_iter(&certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = match chain {
        Ok(chain) => chain,
        Err(cause) => return Err(UnusableTls::Chain { certificate, cause }),
    };
    if chain.is_empty() {
        return Err(UnusableTls::NoCertificate { certificate });
    }
    let private_key = match PrivateKeyDer::from_pem_file(&key) {
        Ok(private_key) => private_key,
        Err(cause) => return Err(UnusableTls::Key { key, cause }),
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_single_cert(chain, private_key)
        .map_err(|cause| UnusableTls::Mismatch {
            certificate,
            key,
            cause,
        })?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// State that request handlers need.
#[derive(Clone)]
pub struct Site {
    pub desk: DeskHandle,
    access: Arc<CoordinatorAccess>,
    /// Signs room tokens. `None`: there is no API key to sign with.
    mint: Option<Arc<Mint>>,
    /// One permit for each byte of a body that is being read.
    bodies: Arc<Semaphore>,
    refused_connections: Arc<AtomicU64>,
    exhibit: Arc<Exhibit>,
    shown: Arc<Mutex<Option<ShownResult>>>,
}

/// Parts of a result that are not the hosts' measurements.
pub struct Exhibit {
    /// Limits of one host, from the flags.
    pub plan: Plan,
    pub judging: Judging,
    pub target: TargetInfo,
    /// Start of the run since 1970.
    pub started: Duration,
}

impl Exhibit {
    /// `now_us` is the current time, or the end of the run if it is over.
    pub fn about<'a>(&'a self, now_us: u64, notes: &'a [String]) -> About<'a> {
        About {
            plan: &self.plan,
            judging: &self.judging,
            target: &self.target,
            started: self.started,
            finished: Duration::from_micros(now_us),
            series: &[],
            server: None,
            notes,
        }
    }
}

/// A result that has been merged. Merging takes time, so requests within the same second get the
/// same result.
struct ShownResult {
    at: Instant,
    body: Bytes,
}

impl Site {
    pub fn new(
        desk: DeskHandle,
        access: CoordinatorAccess,
        mint: Option<Mint>,
        exhibit: Exhibit,
    ) -> Site {
        Site {
            desk,
            access: Arc::new(access),
            mint: mint.map(Arc::new),
            bodies: Arc::new(Semaphore::new(BODIES_BYTES_MAX)),
            refused_connections: Arc::new(AtomicU64::new(0)),
            exhibit: Arc::new(exhibit),
            shown: Arc::new(Mutex::new(None)),
        }
    }

    /// Returns the result so far. Only one request merges at a time, on a blocking thread.
    async fn result(&self) -> Result<Bytes, RefusalAnswer> {
        let mut shown = self.shown.lock().await;
        if let Some(shown) = shown
            .as_ref()
            .filter(|shown| shown.at.elapsed() < RESULT_FRESH)
        {
            return Ok(shown.body.clone());
        }
        let (state, now_us) = self
            .desk
            .call(|desk| (desk.state.clone(), desk.now_us()))
            .await?;
        let exhibit = self.exhibit.clone();
        let merging = tokio::task::spawn_blocking(move || {
            let merged = Merged::new(&state, &exhibit.judging);
            Bytes::from(document::result(
                &merged,
                &state,
                &exhibit.about(now_us, &[]),
            ))
        });
        let failed = |_| {
            RefusalAnswer::refusal(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the result cannot be merged".to_owned(),
            )
        };
        let body = merging.await.map_err(failed)?;
        *shown = Some(ShownResult {
            at: Instant::now(),
            body: body.clone(),
        });
        Ok(body)
    }

    /// Reads the whole body. Refuses it if it is too long, too slow, or too much together with the
    /// others.
    async fn body(&self, request: Request, most: usize) -> Result<ReceivedBody, RefusalAnswer> {
        let too_long = || {
            RefusalAnswer::refusal(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("a body of more than {most} bytes"),
            )
        };
        if request.body().size_hint().lower() > most as u64 {
            return Err(too_long());
        }
        let mut stream = request.into_body().into_data_stream();
        let mut received = ReceivedBody::default();
        let read = async {
            while let Some(part) = stream.next().await {
                let part = part.map_err(|_| {
                    RefusalAnswer::refusal(
                        StatusCode::BAD_REQUEST,
                        "the body ended too early".to_owned(),
                    )
                })?;
                if received.bytes.len() + part.len() > most {
                    return Err(too_long());
                }
                let room = self
                    .bodies
                    .clone()
                    .try_acquire_many_owned(part.len() as u32);
                let room = room.map_err(|_| {
                    RefusalAnswer::refusal(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "too much is being sent at once: try again".to_owned(),
                    )
                })?;
                received.room.push(room);
                received.bytes.extend_from_slice(&part);
            }
            Ok(())
        };
        let timely = tokio::time::timeout(BODY_TIMEOUT, read).await;
        timely.unwrap_or_else(|_| {
            Err(RefusalAnswer::refusal(
                StatusCode::REQUEST_TIMEOUT,
                "the body took too long".to_owned(),
            ))
        })?;
        Ok(received)
    }

    async fn read<M: ProtocolMessage>(
        &self,
        request: Request,
        most: usize,
    ) -> Result<M, RefusalAnswer> {
        let received = self.body(request, most).await?;
        protocol::read(&received.bytes).map_err(RefusalAnswer::from)
    }
}

/// A body with its permits for bytes that are read at once.
#[derive(Default)]
struct ReceivedBody {
    bytes: Vec<u8>,
    room: Vec<OwnedSemaphorePermit>,
}

/// An answer to a request that was refused or failed.
struct RefusalAnswer {
    status: StatusCode,
    refusal: RefusalMessage,
}

impl RefusalAnswer {
    fn refusal(status: StatusCode, error: String) -> RefusalAnswer {
        RefusalAnswer {
            status,
            refusal: RefusalMessage { error },
        }
    }
}

impl From<MalformedMessage> for RefusalAnswer {
    fn from(malformed: MalformedMessage) -> RefusalAnswer {
        RefusalAnswer::refusal(StatusCode::BAD_REQUEST, malformed.to_string())
    }
}

impl From<DeskFailure> for RefusalAnswer {
    fn from(failure: DeskFailure) -> RefusalAnswer {
        let status = match &failure {
            DeskFailure::Refused(RefusedRequest::Malformed(_)) => StatusCode::BAD_REQUEST,
            DeskFailure::Refused(RefusedRequest::Unknown(_)) => StatusCode::NOT_FOUND,
            DeskFailure::Refused(RefusedRequest::Conflict(_)) => StatusCode::CONFLICT,
            DeskFailure::NotJournaled(_) | DeskFailure::Closing => StatusCode::SERVICE_UNAVAILABLE,
        };
        let text = match failure {
            DeskFailure::Refused(refused) => refused.to_string(),
            DeskFailure::NotJournaled(problem) => format!("{problem}: not taken, try again"),
            DeskFailure::Closing => "the coordinator is going".to_owned(),
        };
        RefusalAnswer::refusal(status, text)
    }
}

impl From<Denied> for RefusalAnswer {
    fn from(denied: Denied) -> RefusalAnswer {
        let status = if denied.wants_token() {
            StatusCode::UNAUTHORIZED
        } else {
            StatusCode::FORBIDDEN
        };
        RefusalAnswer::refusal(status, denied.text().to_owned())
    }
}

impl IntoResponse for RefusalAnswer {
    fn into_response(self) -> Response {
        warn!(
            status = self.status.as_u16(),
            why = self.refusal.error,
            "refused a request"
        );
        let mut response = (self.status, json(&self.refusal)).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                header::HeaderValue::from_static("Bearer"),
            );
        }
        response
    }
}

fn json(message: &impl Serialize) -> Response {
    match serde_json::to_vec(message) {
        Ok(body) => (
            [(header::CONTENT_TYPE, "application/json")],
            Bytes::from(body),
        )
            .into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

type Answered = Result<Response, RefusalAnswer>;

/// All routes of the port.
pub fn routes(site: Site) -> Router {
    let guarded = Router::new()
        .route("/register", post(register))
        .route("/job/{prover_id}", get(job))
        .route("/tokens/{prover_id}", post(tokens))
        .route("/beat/{prover_id}", post(beat))
        .route("/report/{prover_id}", post(report))
        .route("/leave/{prover_id}", post(leave))
        .route("/result", get(result))
        .route("/cancel", post(cancel))
        .route("/events", get(events))
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(
            site.clone(),
            must_be_admitted,
        ));
    Router::new()
        .merge(guarded)
        .route("/health", get(health))
        .route("/", get(live_page))
        .with_state(site)
}

async fn must_be_admitted(
    extract::State(site): extract::State<Site>,
    headers: HeaderMap,
    request: Request,
    next: Next,
) -> Response {
    match site.access.admits(&headers) {
        Ok(()) => next.run(request).await,
        Err(denied) => RefusalAnswer::from(denied).into_response(),
    }
}

/// Serves the live page. It contains nothing of the run. The run's state comes with the events, for
/// which the page needs the token.
async fn live_page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, page::POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, page::HTML).into_response()
}

/// Sends one event a second until the run is over.
async fn events(extract::State(site): extract::State<Site>) -> Response {
    let mut interval = tokio::time::interval(page::INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let stream = stream::unfold(Some((site, interval)), next_event);
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

type Watching = (Site, tokio::time::Interval);

async fn next_event(
    watching: Option<Watching>,
) -> Option<(Result<String, Infallible>, Option<Watching>)> {
    let (site, mut interval) = watching?;
    interval.tick().await;
    let show = |state: &RunState, now_us: u64, exhibit: &Exhibit, merged: Option<&Merged>| {
        let target = exhibit.plan.target.to_string();
        page::event(
            state,
            &exhibit.judging,
            &target,
            exhibit.started.as_micros() as u64,
            now_us,
            merged,
        )
    };
    let exhibit = site.exhibit.clone();
    let under_way = move |desk: &mut Desk| match desk.state.phase() {
        RunPhase::Over => Err(Box::new((desk.state.clone(), desk.now_us()))),
        _ => Ok(show(&desk.state, desk.now_us(), &exhibit, None)),
    };
    match site.desk.call(under_way).await.ok()? {
        Ok(event) => Some((Ok(event), Some((site, interval)))),
        Err(over) => {
            let ((state, now_us), exhibit) = (*over, site.exhibit.clone());
            let merging = move || {
                show(
                    &state,
                    now_us,
                    &exhibit,
                    Some(&Merged::new(&state, &exhibit.judging)),
                )
            };
            let event = tokio::task::spawn_blocking(merging).await.ok()?;
            Some((Ok(event), None))
        }
    }
}

async fn metrics(extract::State(site): extract::State<Site>) -> Answered {
    let text = site
        .desk
        .call(|desk| page::metrics(&desk.state, desk.now_us()))
        .await?;
    Ok(([(header::CONTENT_TYPE, metrics_page::CONTENT_TYPE)], text).into_response())
}

async fn register(extract::State(site): extract::State<Site>, request: Request) -> Answered {
    let register: Register = site.read(request, REGISTER_BYTES_MAX).await?;
    let registered = site
        .desk
        .call(move |desk| desk.register(&register))
        .await??;
    Ok(json(&registered))
}

async fn job(
    extract::State(site): extract::State<Site>,
    extract::Path(id): extract::Path<String>,
) -> Answered {
    let job = site.desk.call(move |desk| desk.job(&id)).await??;
    match &job.throng {
        Some(job) => info!(
            vantage = vantage(job),
            stages = job.stages.len(),
            "handed out a job"
        ),
        None if job.ready => info!(room = job.room, "handed out a job to a prober of voicegw"),
        None => trace!("a prober waits for its job"),
    }
    Ok(json(&job))
}

async fn tokens(
    extract::State(site): extract::State<Site>,
    extract::Path(id): extract::Path<String>,
    request: Request,
) -> Answered {
    let request: TokensRequest = site.read(request, REGISTER_BYTES_MAX).await?;
    let job = site.desk.call(move |desk| desk.job(&id)).await??;
    let mint = site.mint.as_ref().ok_or_else(|| {
        RefusedRequest::Conflict(
            "this coordinator has no API key: give each prober its own".to_owned(),
        )
    });
    let job = job.throng.ok_or_else(|| {
        RefusedRequest::Conflict(
            "not everybody is in yet: ask for the job until it is ready".to_owned(),
        )
    });
    let (mint, job) = (
        mint.map_err(DeskFailure::from)?,
        job.map_err(DeskFailure::from)?,
    );
    let (from, count) = (request.from, request.count);
    let tokens = mint.tokens(&job, request).map_err(DeskFailure::from)?;
    debug!(
        vantage = vantage(&job),
        from, count, "handed out room tokens"
    );
    Ok(json(&tokens))
}

fn vantage(job: &Job) -> Option<&str> {
    job.vantages.get(job.me as usize).map(String::as_str)
}

async fn beat(
    extract::State(site): extract::State<Site>,
    extract::Path(id): extract::Path<String>,
    request: Request,
) -> Answered {
    let received_at_us = site.desk.now_us();
    let beat: BeatMessage = site.read(request, BEAT_BYTES_MAX).await?;
    let mut reply = site
        .desk
        .call(move |desk| desk.beat(&id, &beat, received_at_us))
        .await??;
    reply.replied_at_us = site.desk.now_us();
    Ok(json(&reply))
}

async fn report(
    extract::State(site): extract::State<Site>,
    extract::Path(id): extract::Path<String>,
    request: Request,
) -> Answered {
    let report: ProberReport = site.read(request, REPORT_BYTES_MAX).await?;
    let reported = site
        .desk
        .call(move |desk| desk.report(&id, &report))
        .await??;
    Ok(json(&reported))
}

async fn result(extract::State(site): extract::State<Site>) -> Answered {
    let body = site.result().await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

async fn leave(
    extract::State(site): extract::State<Site>,
    extract::Path(id): extract::Path<String>,
) -> Answered {
    let departed = site.desk.call(move |desk| desk.leave(&id)).await??;
    Ok(json(&departed))
}

async fn cancel(extract::State(site): extract::State<Site>) -> Answered {
    let cancelled = site
        .desk
        .call(|desk| desk.cancel("cancelled by POST /cancel"))
        .await??;
    Ok(json(&cancelled))
}

async fn health(extract::State(site): extract::State<Site>) -> Answered {
    let health = site.desk.call(|desk| desk.health()).await?;
    let status = if health.ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    Ok((status, json(&health)).into_response())
}

/// Serves until `stop` is set or its sender is dropped. Then it finishes the requests under way.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    site: Site,
    stop: watch::Receiver<bool>,
) {
    let limits = Limits {
        connections: CONNECTIONS_MAX,
        head_timeout: http::HEAD_TIMEOUT,
        // A viewer of the page sends nothing.
        sending_is_life: true,
        refused: site.refused_connections.clone(),
    };
    http::serve(listener, tls, routes(site), limits, stop).await;
}
