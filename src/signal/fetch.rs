//! HTTP requests other than upgrades: to the room service, the probe, metrics pages and
//! coordinators. Each has a client of its own; all share one set of faults.

use std::net::SocketAddr;
use std::time::Duration;

use http::HeaderMap;

use super::link::{LinkEnd, LinkFault, LinkStage, RequestTimes};
use super::route::{ProxyFault, ProxyRoute};
use super::trust::{self, UnusableTrust};

/// Sends requests to one server. Cheap to clone; connections are pooled.
#[derive(Clone)]
pub(crate) struct Fetcher {
    http: reqwest::Client,
    /// Address as the user would write it.
    endpoint: String,
    secure: bool,
    /// Host and port, if the address has them.
    target: Option<(String, u16)>,
    times: RequestTimes,
    route: Result<Option<ProxyRoute>, ProxyFault>,
}

/// An answer of any status.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

/// Why there is no answer. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchFault {
    #[error(transparent)]
    Link(#[from] LinkFault),
    #[error(transparent)]
    Proxy(#[from] ProxyFault),
    #[error(transparent)]
    Trust(#[from] UnusableTrust),
    #[error("{endpoint} answers with more than {} MiB", bytes_max >> 20)]
    TooLong { endpoint: String, bytes_max: usize },
}

/// Longest wait for a connection that only shows whether there is one.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// Returns the host and port of a URL, the host as a known address if there is one.
fn target_of(url: &str, addresses: &[SocketAddr]) -> Option<(String, u16)> {
    if let Some(address) = addresses.first() {
        return Some((address.ip().to_string(), address.port()));
    }
    let url = url::Url::parse(url).ok()?;
    let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
    Some((host, url.port_or_known_default()?))
}

/// Whether a connection opens.
async fn opens(to_where: (String, u16)) -> bool {
    let connecting = tokio::net::TcpStream::connect(to_where);
    tokio::time::timeout(LOOK_TIMEOUT, connecting)
        .await
        .is_ok_and(|opened| opened.is_ok())
}

impl Fetcher {
    /// Makes a client for `url`; messages call it `endpoint`. Each request ends within `timeout`,
    /// and none follows a redirect. `addresses` are those of the host name, where they are known.
    pub(crate) fn new(
        endpoint: &str,
        url: &str,
        addresses: &[SocketAddr],
        timeout: Duration,
    ) -> Fetcher {
        let route = ProxyRoute::to(url);
        let times = RequestTimes {
            connect: timeout / 2,
            whole: timeout,
        };
        let secure = url.starts_with("https:");
        let mut builder = reqwest::Client::builder()
            .timeout(times.whole)
            .connect_timeout(times.connect)
            .redirect(reqwest::redirect::Policy::none())
            // `ProxyRoute` reads the environment, and never uses a proxy for this host.
            .no_proxy();
        // If there is no usable configuration, `send` refuses to use TLS.
        let config = trust::tls_config().unwrap_or_else(|_| trust::trusting_nobody());
        builder = builder.tls_backend_preconfigured((*config).clone());
        match route.as_ref().ok().and_then(Option::as_ref) {
            Some(proxy) => {
                if let Some(proxy) = proxy.for_requests() {
                    builder = builder.proxy(proxy);
                }
            }
            None => {
                let host = url::Url::parse(url).ok();
                if let Some(host) = host.as_ref().and_then(url::Url::host_str)
                    && !addresses.is_empty()
                {
                    builder = builder.resolve_to_addrs(host, addresses);
                }
            }
        }
        Fetcher {
            http: builder
                .build()
                .expect("a client with a given TLS configuration needs nothing from its host"),
            endpoint: endpoint.to_owned(),
            secure,
            target: target_of(url, addresses),
            times,
            route,
        }
    }

    pub(crate) fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        self.http.request(method, url)
    }

    /// Sends a request, and reads the whole answer unless that is longer than `bytes_max`.
    pub(crate) async fn send(
        &self,
        request: reqwest::RequestBuilder,
        bytes_max: usize,
    ) -> Result<Fetched, FetchFault> {
        self.route.clone()?;
        if self.secure {
            trust::must_be_usable()?;
        }
        let fault = |error: reqwest::Error| self.fault(&error);
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Err(self.of_stage(fault(error)).await),
        };
        let status = response.status().as_u16();
        let headers = std::mem::take(response.headers_mut());
        let mut body = Vec::new();
        while let Some(part) = response.chunk().await.map_err(fault)? {
            if body.len() + part.len() > bytes_max {
                return Err(FetchFault::TooLong {
                    endpoint: self.endpoint.clone(),
                    bytes_max,
                });
            }
            body.extend_from_slice(&part);
        }
        Ok(Fetched {
            status,
            headers,
            body,
        })
    }

    /// Names the stage of a connection that did not come about in time: the client has one time
    /// limit for TCP, for a proxy's tunnel and for TLS. A second connection tells them apart.
    async fn of_stage(&self, fault: FetchFault) -> FetchFault {
        let FetchFault::Link(LinkFault::Slow {
            endpoint,
            stage,
            after,
        }) = fault
        else {
            return fault;
        };
        let proxy = self.route.as_ref().ok().and_then(Option::as_ref);
        let to_where = proxy.map_or_else(
            || self.target.clone(),
            |proxy| Some((proxy.host().to_owned(), proxy.port())),
        );
        let is_open = match to_where {
            Some(to_where) if stage == LinkStage::Connect => opens(to_where).await,
            _ => stage != LinkStage::Connect,
        };
        match (proxy, is_open) {
            (Some(proxy), true) => proxy.silent(&endpoint, after).into(),
            (Some(proxy), false) => {
                let why = format!("no answer within {} s", after.as_secs_f64());
                proxy.away(why).into()
            }
            (None, _) => LinkFault::Slow {
                endpoint,
                stage: if stage == LinkStage::Connect && is_open && self.secure {
                    LinkStage::Tls
                } else {
                    stage
                },
                after,
            }
            .into(),
        }
    }

    fn fault(&self, error: &reqwest::Error) -> FetchFault {
        let end = LinkEnd {
            endpoint: &self.endpoint,
            secure: self.secure,
        };
        let fault = end.request(error, self.times);
        let Ok(Some(proxy)) = &self.route else {
            return fault.into();
        };
        // The client's error type for a tunnel is private, so its text is read.
        let tunnel = super::link::causes(error)
            .map(ToString::to_string)
            .find_map(|cause| cause.strip_prefix("tunnel error: ").map(str::to_owned));
        match (fault, tunnel) {
            (_, Some(why)) => proxy.refused(&self.endpoint, why).into(),
            (LinkFault::Refused { .. }, None) => proxy.away("connection refused").into(),
            (LinkFault::Unreachable { cause, .. } | LinkFault::Resolve { cause, .. }, None) => {
                proxy.away(cause).into()
            }
            (fault, None) => fault.into(),
        }
    }
}
