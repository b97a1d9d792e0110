//! Reads heads of HTTP answers directly: those to a WebSocket upgrade and to a proxy's `CONNECT`.
//! So it is known how far an answer came, what it said, and what followed.

use std::io;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Largest head that is read. A longer one is no answer to our request.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 100;
/// Number of bytes that are read of the text after a refusal.
const BODY_BYTES_MAX: usize = 16 << 10;
const READ_BYTES: usize = 1 << 10;

/// An answer's head, and the bytes that followed it.
pub(super) struct AnswerHead {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) rest: Vec<u8>,
}

/// Why there is no head.
#[derive(Debug)]
pub(super) enum NoHead {
    /// The bytes are no HTTP answer.
    NotHttp(Vec<u8>),
    Ended,
    Io(io::Error),
}

impl AnswerHead {
    /// Reads a head. Beyond it, at most the rest of the last read is taken.
    pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<AnswerHead, NoHead> {
        let mut bytes = Vec::new();
        loop {
            bytes.reserve(READ_BYTES);
            match stream.read_buf(&mut bytes).await {
                Ok(0) if bytes.is_empty() => return Err(NoHead::Ended),
                Ok(0) => return Err(NoHead::NotHttp(bytes)),
                Ok(_) => {}
                Err(error) => return Err(NoHead::Io(error)),
            }
            match AnswerHead::parse(&bytes) {
                Ok(Some(head)) => return Ok(head),
                Ok(None) if bytes.len() < HEAD_BYTES_MAX => {}
                _ => return Err(NoHead::NotHttp(bytes)),
            }
        }
    }

    /// Parses a head; `None` if it is incomplete.
    fn parse(bytes: &[u8]) -> Result<Option<AnswerHead>, httparse::Error> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(len) = response.parse(bytes)? else {
            return Ok(None);
        };
        let pairs = response.headers.iter().filter_map(|header| {
            let name = HeaderName::from_bytes(header.name.as_bytes()).ok()?;
            Some((name, HeaderValue::from_bytes(header.value).ok()?))
        });
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        Ok(Some(AnswerHead {
            status: response.code.unwrap_or_default(),
            headers,
            rest: bytes.get(len..).unwrap_or_default().to_vec(),
        }))
    }

    /// Reads the text after a refusal, as far as it comes. A proxy may keep the connection open.
    pub(super) async fn body(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
        let announced = self.headers.get(http::header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse().ok());
        let wanted = announced.unwrap_or(BODY_BYTES_MAX).min(BODY_BYTES_MAX);
        let mut body = std::mem::take(&mut self.rest);
        let reading = async {
            while body.len() < wanted {
                body.reserve(READ_BYTES);
                if !matches!(stream.read_buf(&mut body).await, Ok(1..)) {
                    return;
                }
            }
        };
        // The status is known, so the wait for its text is short.
        let _ = tokio::time::timeout(super::dial::REFUSAL_TEXT_WAIT, reading).await;
        body.truncate(wanted);
        if self.is_chunked() {
            unchunked(&body)
        } else {
            body
        }
    }

    fn is_chunked(&self) -> bool {
        let encoding = self.headers.get(http::header::TRANSFER_ENCODING);
        encoding.is_some_and(|value| value.as_bytes().ends_with(b"chunked"))
    }
}

/// Returns the text of all complete chunks (RFC 9112, section 7.1).
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    while let Ok(httparse::Status::Complete((at, len))) = httparse::parse_chunk_size(bytes) {
        let Some(chunk) = usize::try_from(len)
            .ok()
            .filter(|len| *len > 0)
            .and_then(|len| bytes.get(at..at.checked_add(len)?))
        else {
            break;
        };
        text.extend_from_slice(chunk);
        bytes = bytes.get(at + chunk.len() + 2..).unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<AnswerHead, NoHead> {
        let mut bytes = bytes;
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(AnswerHead::read(&mut bytes))
    }

    #[test]
    fn heads_of_both_versions_are_read_and_what_follows_is_kept() {
        for version in ["1.0", "1.1"] {
            let head = read(format!("HTTP/{version} 404 No\r\nServer: x\r\n\r\nrest").as_bytes());
            let head = head.unwrap_or_else(|fault| panic!("{fault:?}"));
            assert_eq!(
                (head.status, &head.headers["server"]),
                (404, &"x".parse::<HeaderValue>().unwrap())
            );
            assert_eq!(head.rest, b"rest");
        }
    }

    #[test]
    fn what_is_no_head_is_told_apart() {
        assert!(matches!(read(b""), Err(NoHead::Ended)));
        for bytes in [
            &b"HHHH"[..],
            b"220 mail ESMTP\r\n",
            &[21, 3, 1, 0, 2, 2, 70],
            b"HTTP/1.1 200",
        ] {
            assert!(matches!(read(bytes), Err(NoHead::NotHttp(had)) if had == bytes));
        }
        let endless = [b"HTTP/1.1 200 OK\r\n".to_vec(), b"A: b\r\n".repeat(4_000)].concat();
        assert!(matches!(read(&endless), Err(NoHead::NotHttp(_))));
    }

    #[test]
    fn chunks_become_their_text() {
        assert_eq!(
            unchunked(b"4\r\nfull\r\n3;x=y\r\n up\r\n0\r\n\r\n"),
            b"full up"
        );
        assert_eq!(unchunked(b"ffffffffffffffff\r\nx"), b"");
        assert_eq!(unchunked(b"5\r\nsho"), b"");
    }
}
