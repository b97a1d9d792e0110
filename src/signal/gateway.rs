//! Additions to every request for a gateway in front of the server: headers from the user, and the
//! token in the place that the gateway lets through.

use std::fmt;
use std::str::FromStr;

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::Secret;

/// Place of the access token in a request. LiveKit accepts it in either place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenPlace {
    /// `Authorization: Bearer`
    #[default]
    Header,
    /// `access_token=`, for gateways that use Authorization themselves.
    Query,
}

/// A header that the user gave. Its value is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct GivenHeader {
    name: HeaderName,
    value: HeaderValue,
}

/// Why a text cannot be used as a header. The message never repeats the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableHeader {
    #[error("takes NAME:VALUE, as 'X-Api-Key: abc'")]
    Malformed,
    #[error("names a header that belongs to the connection or to the WebSocket: leave it out")]
    NotYours,
}

impl FromStr for GivenHeader {
    type Err = UnusableHeader;

    fn from_str(text: &str) -> Result<GivenHeader, UnusableHeader> {
        const OURS: [HeaderName; 6] = [
            header::CONNECTION,
            header::UPGRADE,
            header::CONTENT_LENGTH,
            header::CONTENT_TYPE,
            header::TRANSFER_ENCODING,
            header::HOST,
        ];
        let (name, value) = text.split_once(':').ok_or(UnusableHeader::Malformed)?;
        let name: HeaderName = name.trim().parse().map_err(|_| UnusableHeader::Malformed)?;
        if OURS.contains(&name) || name.as_str().starts_with("sec-websocket") {
            return Err(UnusableHeader::NotYours);
        }
        let value = HeaderValue::from_str(value.trim());
        let mut value = value.map_err(|_| UnusableHeader::Malformed)?;
        value.set_sensitive(true);
        Ok(GivenHeader { name, value })
    }
}

impl fmt::Debug for GivenHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GivenHeader({}: ***)", self.name)
    }
}

impl GivenHeader {
    pub fn is_authorization(&self) -> bool {
        self.name == header::AUTHORIZATION
    }
}

/// Headers and token placement that a gateway in front of the server needs in every request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gateway {
    pub headers: Vec<GivenHeader>,
    pub token_in: TokenPlace,
}

/// Error returned for a token that no header can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the token holds characters that no token has: copy it again")]
pub struct UnsendableToken;

impl Gateway {
    /// Adds the user's headers, and the token where it travels in a header.
    pub(super) fn add_to(
        &self,
        headers: &mut HeaderMap,
        token: Option<&Secret>,
    ) -> Result<(), UnsendableToken> {
        for given in &self.headers {
            headers.append(given.name.clone(), given.value.clone());
        }
        let Some(token) = token.filter(|_| self.token_in == TokenPlace::Header) else {
            return Ok(());
        };
        let bearer = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
        let mut bearer = bearer.map_err(|_| UnsendableToken)?;
        bearer.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, bearer);
        Ok(())
    }

    /// Returns `path`, with the token where it travels in the query.
    pub(super) fn path(&self, path: &str, token: &Secret) -> String {
        match self.token_in {
            TokenPlace::Header => path.to_owned(),
            TokenPlace::Query => {
                let joint = if path.contains('?') { '&' } else { '?' };
                let token: String =
                    url::form_urlencoded::byte_serialize(token.expose().as_bytes()).collect();
                format!("{path}{joint}access_token={token}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_and_never_shown() {
        let given: GivenHeader = "Authorization:Basic bWU6c2VjcmV0".parse().unwrap();
        assert!(given.is_authorization() && !format!("{given:?}").contains("bWU6"));
        for (text, fault) in [
            ("no-colon", UnusableHeader::Malformed),
            (": x", UnusableHeader::Malformed),
            ("X: a\nb", UnusableHeader::Malformed),
            ("Upgrade: h2c", UnusableHeader::NotYours),
            ("Sec-WebSocket-Protocol: x", UnusableHeader::NotYours),
        ] {
            assert_eq!(text.parse::<GivenHeader>(), Err(fault), "{text}");
        }
    }

    #[test]
    fn the_token_travels_in_one_place() {
        let token = Secret::new("ey+J");
        let mut gateway = Gateway {
            headers: vec!["Authorization: Basic x".parse().unwrap()],
            token_in: TokenPlace::Query,
        };
        let mut headers = HeaderMap::new();
        gateway.add_to(&mut headers, Some(&token)).unwrap();
        assert_eq!(headers["authorization"], "Basic x");
        assert_eq!(
            gateway.path("/rtc?a=b", &token),
            "/rtc?a=b&access_token=ey%2BJ"
        );
        gateway = Gateway::default();
        headers.clear();
        gateway.add_to(&mut headers, Some(&token)).unwrap();
        assert_eq!(
            (
                headers["authorization"].to_str().unwrap(),
                gateway.path("/rtc", &token).as_str()
            ),
            ("Bearer ey+J", "/rtc")
        );
        assert!(
            gateway
                .add_to(&mut headers, Some(&Secret::new("a\nb")))
                .is_err()
        );
    }
}
