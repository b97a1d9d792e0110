//! Finds the proxy for requests and WebSockets from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
//! NO_PROXY, as curl reads them. Both use the same one.
//!
//! This host itself, and so the embedded SFU, is never reached through a proxy. Media never is.

use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

use http::{HeaderValue, Uri};
use hyper_util::client::proxy::matcher::Matcher;

use crate::plan::is_loopback_host;

/// A proxy on the way to a server.
#[derive(Clone, Debug)]
pub struct ProxyRoute {
    /// `http://proxy:3128`, without credentials.
    uri: Uri,
    authorization: Option<HeaderValue>,
    /// Environment variable that names the proxy, as it was spelt.
    variable: &'static str,
}

/// Why a proxy cannot be used. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyFault {
    /// The value is not shown, because it may hold a password.
    #[error(
        "{variable} is set, and its value is no address of a proxy: write http://HOST:PORT, unset it, or put the server into NO_PROXY"
    )]
    Unreadable { variable: &'static str },
    #[error(
        "{variable} names {proxy}, and throng speaks plain HTTP with a proxy only: write http://HOST:PORT, or put the server into NO_PROXY"
    )]
    Unspoken {
        variable: &'static str,
        proxy: String,
    },
    #[error(
        "the proxy {proxy} ({variable}) cannot be reached ({cause}): correct {variable}, or put the server into NO_PROXY"
    )]
    Away {
        variable: &'static str,
        proxy: String,
        cause: String,
    },
    #[error(
        "the proxy {proxy} ({variable}) took the connection (TCP was open), and its answer about {target} did not come within {} s: is the proxy stuck, or the server behind it? Correct {variable}, or put the server into NO_PROXY", after.as_secs_f64()
    )]
    Silent {
        variable: &'static str,
        proxy: String,
        target: String,
        after: Duration,
    },
    #[error(
        "the proxy {proxy} ({variable}) does not connect us to {target} ({answer}): have it allowed, or put the server into NO_PROXY"
    )]
    Refused {
        variable: &'static str,
        proxy: String,
        target: String,
        answer: String,
    },
}

/// What the environment says about proxies.
struct ProxyRules {
    http: Option<(&'static str, String)>,
    https: Option<(&'static str, String)>,
    exceptions: Vec<ProxyException>,
}

/// An entry of NO_PROXY.
struct ProxyException {
    /// Host, domain, address or network; `*` for everything.
    host: String,
    /// `None`: all ports.
    port: Option<u16>,
}

impl ProxyRules {
    fn read(env: &dyn Fn(&str) -> Option<String>) -> ProxyRules {
        let first = |names: [&'static str; 2]| {
            let mut found = names.into_iter().map(|name| (name, env(name)));
            found.find_map(|(name, value)| {
                let value = value?.trim().to_owned();
                (!value.is_empty()).then_some((name, value))
            })
        };
        // A server that starts programs by CGI passes on a header of the request as HTTP_PROXY.
        if env("REQUEST_METHOD").is_some() {
            return ProxyRules {
                http: None,
                https: None,
                exceptions: Vec::new(),
            };
        }
        let all = first(["ALL_PROXY", "all_proxy"]);
        let exceptions = first(["NO_PROXY", "no_proxy"]);
        let exceptions = exceptions.map_or_else(Vec::new, |(_, list)| {
            let entries = list.split([',', ' ']).map(str::trim);
            entries
                .filter(|entry| !entry.is_empty())
                .map(ProxyException::read)
                .collect()
        });
        ProxyRules {
            http: first(["HTTP_PROXY", "http_proxy"]).or_else(|| all.clone()),
            https: first(["HTTPS_PROXY", "https_proxy"]).or(all),
            exceptions,
        }
    }

    fn route(&self, uri: &Uri) -> Result<Option<ProxyRoute>, ProxyFault> {
        let is_https = uri.scheme_str() == Some("https");
        let named = if is_https { &self.https } else { &self.http };
        let Some((variable, value)) = named else {
            return Ok(None);
        };
        if self.exceptions.iter().any(|one| one.covers(uri)) {
            return Ok(None);
        }
        let unreadable = ProxyFault::Unreadable { variable };
        let found = Matcher::builder()
            .all(value.as_str())
            .build()
            .intercept(uri);
        let found = found.ok_or_else(|| unreadable.clone())?;
        let route = ProxyRoute {
            uri: found.uri().clone(),
            authorization: found.basic_auth().cloned(),
            variable,
        };
        // The library takes a port that is none for none.
        let authority = route.uri.authority();
        let is_whole = authority.is_some_and(|authority| {
            let rest = authority.as_str().strip_prefix(authority.host());
            !route.host().is_empty() && (rest == Some("") || authority.port_u16().is_some())
        });
        if !is_whole {
            return Err(unreadable);
        }
        if route.uri.scheme_str() == Some("http") {
            Ok(Some(route))
        } else {
            Err(ProxyFault::Unspoken {
                variable: route.variable,
                proxy: route.name(),
            })
        }
    }
}

impl ProxyException {
    fn read(entry: &str) -> ProxyException {
        // An IPv6 address has colons of its own, so its port wants brackets.
        let split = entry
            .rsplit_once(':')
            .filter(|(host, _)| host.ends_with(']') || !host.contains(':'));
        let port = split.and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let (host, port) = port.map_or((entry, None), |(host, port)| (host, Some(port)));
        ProxyException {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
        }
    }

    fn covers(&self, uri: &Uri) -> bool {
        let default = if uri.scheme_str() == Some("https") {
            443
        } else {
            80
        };
        if self
            .port
            .is_some_and(|port| port != uri.port_u16().unwrap_or(default))
        {
            return false;
        }
        // `*.example.com` is often written for `.example.com`.
        let host = self.host.strip_prefix('*').unwrap_or(&self.host);
        let any_proxy = Matcher::builder().all("http://proxy").no(host).build();
        host.is_empty() || any_proxy.intercept(uri).is_none()
    }
}

impl ProxyRoute {
    /// Returns the proxy for this address; `None` for a direct connection.
    ///
    /// # Errors
    /// Returns an error if the named proxy cannot be used.
    pub fn to(http_url: &str) -> Result<Option<ProxyRoute>, ProxyFault> {
        static RULES: OnceLock<ProxyRules> = OnceLock::new();
        let Ok(uri) = http_url.parse::<Uri>() else {
            return Ok(None);
        };
        if uri.host().is_none_or(is_loopback_host) {
            return Ok(None);
        }
        let rules = RULES.get_or_init(|| ProxyRules::read(&|name| std::env::var(name).ok()));
        rules.route(&uri)
    }

    /// The route that HTTP_PROXY would name.
    #[cfg(test)]
    pub(super) fn named(proxy: &str) -> ProxyRoute {
        let rules = ProxyRules::read(&|name| (name == "HTTP_PROXY").then(|| proxy.to_owned()));
        let route = rules.route(&Uri::from_static("http://sfu.test"));
        route.unwrap().unwrap()
    }

    pub(super) fn host(&self) -> &str {
        let host = self.uri.host().unwrap_or_default();
        host.trim_start_matches('[').trim_end_matches(']')
    }

    pub(super) fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(80)
    }

    pub(super) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    fn name(&self) -> String {
        self.uri.to_string().trim_end_matches('/').to_owned()
    }

    pub(super) fn away(&self, cause: impl Into<String>) -> ProxyFault {
        ProxyFault::Away {
            variable: self.variable,
            proxy: self.name(),
            cause: cause.into(),
        }
    }

    pub(super) fn refused(&self, target: &str, answer: impl Into<String>) -> ProxyFault {
        ProxyFault::Refused {
            variable: self.variable,
            proxy: self.name(),
            target: target.to_owned(),
            answer: answer.into(),
        }
    }

    pub(super) fn silent(&self, target: &str, after: Duration) -> ProxyFault {
        ProxyFault::Silent {
            variable: self.variable,
            proxy: self.name(),
            target: target.to_owned(),
            after,
        }
    }

    /// Returns the proxy in the form that the HTTP client of requests takes.
    pub(super) fn for_requests(&self) -> Option<reqwest::Proxy> {
        let proxy = reqwest::Proxy::all(self.name()).ok()?;
        Some(match &self.authorization {
            Some(value) => proxy.custom_http_auth(value.clone()),
            None => proxy,
        })
    }
}

impl fmt::Display for ProxyRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.variable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(variables: &[(&str, &str)], url: &str) -> Result<Option<String>, ProxyFault> {
        let env = |name: &str| {
            let found = variables.iter().find(|(given, _)| *given == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let route = ProxyRules::read(&env).route(&url.parse().unwrap())?;
        Ok(route.map(|route| route.to_string()))
    }

    #[test]
    fn the_variable_is_named_as_it_is_spelt() {
        let url = "http://10.9.9.9:7880";
        for (name, url) in [
            ("HTTP_PROXY", url),
            ("http_proxy", url),
            ("ALL_PROXY", url),
            ("all_proxy", url),
            ("HTTPS_PROXY", "https://sfu.test"),
            ("https_proxy", "https://sfu.test"),
        ] {
            let found = route(&[(name, "http://me:secret@proxy:3128")], url).unwrap();
            assert_eq!(found, Some(format!("http://proxy:3128 ({name})")));
            // Without a scheme it is a plain proxy.
            let found = route(&[(name, "proxy:3128")], url).unwrap();
            assert_eq!(found, Some(format!("http://proxy:3128 ({name})")));
        }
        assert_eq!(route(&[("HTTPS_PROXY", "http://p:1")], url), Ok(None));
        assert_eq!(route(&[("HTTP_PROXY", "")], url), Ok(None));
    }

    #[test]
    fn no_proxy_takes_everything_hosts_networks_and_ports() {
        let sfu = "http://sfu.example.com:7880";
        let ip = "http://10.9.9.9:7880";
        for (list, url, is_direct) in [
            ("*", ip, true),
            ("*", sfu, true),
            ("foo, *", ip, true),
            ("10.9.9.9", ip, true),
            ("10.9.9.9:7880", ip, true),
            ("10.9.9.9:7881", ip, false),
            ("10.0.0.0/8", ip, true),
            ("foo 10.9.9.9", ip, true),
            ("sfu.example.com:7880", sfu, true),
            ("sfu.example.com:80", sfu, false),
            (".example.com", sfu, true),
            ("*.example.com", sfu, true),
            ("example.com:7880", sfu, true),
            ("ample.com", sfu, false),
            ("[2001:db8::1]:7880", "http://[2001:db8::1]:7880", true),
            ("2001:db8::1", "http://[2001:db8::1]:7880", true),
            ("sfu.example.com:443", "https://sfu.example.com", true),
            ("", ip, false),
        ] {
            for no_proxy in ["NO_PROXY", "no_proxy"] {
                let variables = [("ALL_PROXY", "http://proxy:9"), (no_proxy, list)];
                let found = route(&variables, url).unwrap();
                assert_eq!(found.is_none(), is_direct, "{list}: {url}");
            }
        }
    }

    #[test]
    fn a_proxy_that_cannot_be_read_is_refused_with_its_variable_and_without_its_value() {
        for value in [
            "foo bar",
            "http://:::",
            "http://127.0.0.1:99999",
            "http://me:secret@",
            "http://",
            "ftp://proxy:21",
        ] {
            let variables = [("http_proxy", value)];
            let fault = route(&variables, "http://10.9.9.9:7880").unwrap_err();
            assert_eq!(
                fault,
                ProxyFault::Unreadable {
                    variable: "http_proxy"
                },
                "{value}"
            );
            // It is not read where it is not used.
            let excepted = [variables[0], ("NO_PROXY", "10.0.0.0/8")];
            assert_eq!(route(&excepted, "http://10.9.9.9:7880"), Ok(None));
        }
        let socks = route(&[("ALL_PROXY", "socks5h://p:1")], "http://sfu.test");
        assert!(matches!(socks, Err(ProxyFault::Unspoken { .. })));
    }
}
