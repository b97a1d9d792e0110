//! Writes the lines that offers and answers share.

use std::fmt::Write as _;

use super::scan::*;
use super::*;

pub(super) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Audio => "audio",
        Kind::Video => "video",
    }
}

/// Appends text. Writing to a `String` cannot fail.
pub(super) fn push(sdp: &mut String, text: fmt::Arguments<'_>) {
    let _ = sdp.write_fmt(text);
}

pub(super) fn write_session<'a>(
    sdp: &mut String,
    local: &LocalTransport,
    version: u64,
    bundle: impl Iterator<Item = &'a str>,
) {
    push(
        sdp,
        format_args!(
            "v=0\r\no=- {} {version} IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE",
            local.session_id
        ),
    );
    for mid in bundle {
        push(sdp, format_args!(" {mid}"));
    }
    push(
        sdp,
        format_args!(
            "\r\na=msid-semantic: WMS *\r\na=fingerprint:{}\r\n",
            local.fingerprint
        ),
    );
}

pub(super) fn push_media_line(sdp: &mut String, codec: &SectionCodec) {
    push(
        sdp,
        format_args!("m={} 9 UDP/TLS/RTP/SAVPF", kind_name(codec.codec.kind())),
    );
    for payload_type in codec.payload_types() {
        push(sdp, format_args!(" {payload_type}"));
    }
    sdp.push_str("\r\n");
}

pub(super) fn push_transport(
    sdp: &mut String,
    local: &LocalTransport,
    setup: DtlsSetup,
    mid: &str,
    tagged: bool,
) {
    push(
        sdp,
        format_args!(
            "c=IN IP4 0.0.0.0\r\na=mid:{mid}\r\na=setup:{}\r\n",
            setup.as_str()
        ),
    );
    push(
        sdp,
        format_args!("a=ice-ufrag:{}\r\na=ice-pwd:{}\r\n", local.ufrag, local.pwd),
    );
    for candidate in local.candidates.iter().filter(|_| tagged) {
        push(sdp, format_args!("a={candidate}\r\n"));
    }
}

pub(super) fn push_application(
    sdp: &mut String,
    local: &LocalTransport,
    setup: DtlsSetup,
    mid: &str,
    tagged: bool,
    sctp_port: u16,
) {
    push(
        sdp,
        format_args!("m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n"),
    );
    push_transport(sdp, local, setup, mid, tagged);
    push(sdp, format_args!("a=sctp-port:{sctp_port}\r\n"));
}

pub(super) fn push_extensions(sdp: &mut String, extensions: &ExtensionIds) {
    for extension in Extension::ALL {
        if let Some(id) = extensions.id(extension) {
            push(sdp, format_args!("a=extmap:{id} {}\r\n", extension.uri()));
        }
    }
}

/// Appends the lines about a section's codec, and about the one that it wraps.
pub(super) fn push_codec(sdp: &mut String, codec: &SectionCodec) {
    codec
        .formats()
        .for_each(|format| push_format(sdp, format, &format.parameters));
}

pub(super) fn push_format(sdp: &mut String, codec: &SectionCodec, parameters: &str) {
    let payload_type = codec.payload_type;
    push(
        sdp,
        format_args!("a=rtpmap:{payload_type} {}\r\n", codec.map),
    );
    if !parameters.is_empty() {
        push(sdp, format_args!("a=fmtp:{payload_type} {parameters}\r\n"));
    }
    for feedback in RtcpFeedback::ALL
        .into_iter()
        .filter(|feedback| codec.feedback.contains(*feedback))
    {
        push(
            sdp,
            format_args!("a=rtcp-fb:{payload_type} {}\r\n", feedback.as_str()),
        );
    }
    if let Some(rtx) = codec.rtx_payload_type {
        push(
            sdp,
            format_args!(
                "a=rtpmap:{rtx} rtx/{}\r\na=fmtp:{rtx} apt={payload_type}\r\n",
                codec.codec.clock_rate()
            ),
        );
    }
}
