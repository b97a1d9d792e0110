//! Decides which certificates are trusted: Mozilla's, this host's (unless SSL_CERT_FILE or
//! SSL_CERT_DIR is set), and those that the user names (`--ca-cert`, SSL_CERT_FILE, SSL_CERT_DIR).
//! The process has one TLS configuration.
//!
//! A certificate that the user names is also trusted as the server's own certificate. The usual
//! recipe (`openssl req -x509`) makes one that is an authority (CA:TRUE) and a server certificate
//! at once.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, UNIX_EPOCH};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, OtherError,
    RootCertStore, SignatureScheme,
};

use crate::words;

const FILE_VARIABLE: &str = "SSL_CERT_FILE";
const DIRECTORY_VARIABLE: &str = "SSL_CERT_DIR";

/// The user's settings for certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustSpec {
    /// Files with additional trusted certificates.
    pub ca_files: Vec<PathBuf>,
    /// Whether to accept any certificate unchecked.
    pub insecure: bool,
}

/// Why certificates that the user named cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableTrust {
    #[error("{name} names {path}, which cannot be read ({cause}): correct it, or leave it out")]
    Unreadable {
        name: &'static str,
        path: String,
        cause: String,
    },
    #[error(
        "{name} names {path}, which holds no certificate (PEM, BEGIN CERTIFICATE): correct it, or leave it out"
    )]
    NoCertificate { name: &'static str, path: String },
    #[error(
        "{name} names {path}, and a certificate in it cannot be read ({cause}): make it anew, or leave it out"
    )]
    Malformed {
        name: &'static str,
        path: String,
        cause: String,
    },
}

/// Why a server is not trusted; follows `TLS with X failed: `.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsFault {
    #[error("its certificate has expired ({on}): renew it, or set this host's clock")]
    Expired { on: String },
    #[error("its certificate is not valid yet ({from}): check both clocks")]
    NotYetValid { from: String },
    #[error(
        "its certificate is for {presented}, and not for {expected}: use one of its names in the address, or have this one added"
    )]
    WrongName { expected: String, presented: String },
    #[error(
        "its certificate names no host at all (no subjectAltName; the common name does not count): make it anew with subjectAltName=DNS:{expected} (or IP:..)"
    )]
    NoName { expected: String },
    #[error(
        "its certificate is of an authority that nobody here trusts (or signed by itself): give --ca-cert FILE, or point SSL_CERT_FILE at its authority; --insecure does without the check"
    )]
    UnknownAuthority,
    #[error(
        "its certificate is issued by {issuer}, whose certificate the server does not send, and which is not among the trusted: have the server send its whole chain (certificate and intermediates in one file), or give --ca-cert FILE with the certificate of that issuer"
    )]
    MissingIssuer { issuer: String },
    #[error(
        "its certificate is one of an authority (CA:TRUE), which counts as a server's only where you name it: --ca-cert FILE or SSL_CERT_FILE"
    )]
    Authority,
    #[error(
        "its certificate is of X.509 version 1, which names no host: make it anew, of version 3 with a subjectAltName"
    )]
    OldVersion,
    #[error(
        "it wants a client certificate, and throng has none to give: use an address that asks for none"
    )]
    ClientCertificate,
    #[error(
        "the two have no version or cipher of TLS in common (throng speaks 1.2 and 1.3): look at the server's TLS settings"
    )]
    NothingInCommon,
    #[error("the server ended the handshake ({alert}): see its log")]
    Alert { alert: String },
    #[error("its certificate {0}: make it anew")]
    Certificate(&'static str),
    #[error("{0}")]
    Other(String),
}

static SPEC: OnceLock<TrustSpec> = OnceLock::new();

/// Sets what this process trusts. Call it before the first connection.
///
/// # Errors
/// Returns an error if a file that `spec` names cannot be used.
pub fn settle(spec: &TrustSpec) -> Result<(), UnusableTrust> {
    for path in &spec.ca_files {
        certificates("--ca-cert", path)?;
    }
    // The first call decides; a process has one user.
    let _ = SPEC.set(spec.clone());
    Ok(())
}

/// Checks, before TLS is needed, that the trusted certificates can be used.
pub(crate) fn must_be_usable() -> Result<(), UnusableTrust> {
    tls_config().map(drop)
}

pub(crate) fn tls_config() -> Result<Arc<ClientConfig>, UnusableTrust> {
    static CONFIG: OnceLock<Result<Arc<ClientConfig>, UnusableTrust>> = OnceLock::new();
    let build = || {
        let spec = SPEC.get().cloned().unwrap_or_default();
        build(&spec, &|name| std::env::var_os(name).map(PathBuf::from)).map(Arc::new)
    };
    CONFIG.get_or_init(build).clone()
}

/// Returns a configuration that trusts nobody, for connections without TLS where the trusted
/// certificates cannot be used.
pub(crate) fn trusting_nobody() -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3");
    let config = builder.with_root_certificates(RootCertStore::empty());
    Arc::new(config.with_no_client_auth())
}

fn build(
    spec: &TrustSpec,
    env: &dyn Fn(&str) -> Option<PathBuf>,
) -> Result<ClientConfig, UnusableTrust> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3");
    let verifier: Arc<dyn ServerCertVerifier> = if spec.insecure {
        Arc::new(Unchecked(
            provider
                .signature_verification_algorithms
                .supported_schemes(),
        ))
    } else {
        let named = named(spec, env)?;
        let mut roots = RootCertStore {
            roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
        };
        roots.add_parsable_certificates(named.iter().cloned());
        if env(FILE_VARIABLE).is_none() && env(DIRECTORY_VARIABLE).is_none() {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        let subjects = roots.roots.iter().map(|root| root.subject.to_vec());
        let subjects = subjects.collect();
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
        Arc::new(RootedOrNamed {
            subjects,
            inner: inner
                .build()
                .expect("there are roots, and no revocation lists"),
            named,
        })
    };
    Ok(builder
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(NoClientCertificate)))
}

/// Returns the certificates that the user names.
fn named(
    spec: &TrustSpec,
    env: &dyn Fn(&str) -> Option<PathBuf>,
) -> Result<Vec<CertificateDer<'static>>, UnusableTrust> {
    let mut named = Vec::new();
    for path in &spec.ca_files {
        named.extend(certificates("--ca-cert", path)?);
    }
    if let Some(path) = env(FILE_VARIABLE) {
        named.extend(certificates(FILE_VARIABLE, &path)?);
    }
    if let Some(directories) = env(DIRECTORY_VARIABLE) {
        for path in std::env::split_paths(&directories) {
            named.extend(certificates_below(&path)?);
        }
    }
    Ok(named)
}

fn certificates(
    name: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, UnusableTrust> {
    let shown = path.display().to_string();
    let text = std::fs::read(path).map_err(|error| UnusableTrust::Unreadable {
        name,
        path: shown.clone(),
        cause: super::link::plain(&error),
    })?;
    let malformed = |cause: String| UnusableTrust::Malformed {
        name,
        path: shown.clone(),
        cause,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| malformed(error.to_string()))?;
    if found.is_empty() {
        return Err(UnusableTrust::NoCertificate { name, path: shown });
    }
    let (usable, _) = RootCertStore::empty().add_parsable_certificates(found.iter().cloned());
    if usable == 0 {
        return Err(malformed("it is no X.509 certificate".into()));
    }
    Ok(found)
}

fn certificates_below(path: &Path) -> Result<Vec<CertificateDer<'static>>, UnusableTrust> {
    let loaded = rustls_native_certs::load_certs_from_paths(None, Some(path));
    let shown = path.display().to_string();
    if let Err(error) = std::fs::read_dir(path) {
        return Err(UnusableTrust::Unreadable {
            name: DIRECTORY_VARIABLE,
            path: shown,
            cause: super::link::plain(&error),
        });
    }
    if loaded.certs.is_empty() {
        return Err(UnusableTrust::NoCertificate {
            name: DIRECTORY_VARIABLE,
            path: shown,
        });
    }
    Ok(loaded.certs)
}

/// Trusts certificates that the roots have issued, and those that the user named.
#[derive(Debug)]
struct RootedOrNamed {
    inner: Arc<WebPkiServerVerifier>,
    /// Names of the authorities that are trusted, in DER.
    subjects: HashSet<Vec<u8>>,
    named: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for RootedOrNamed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let checked = self.inner.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match checked {
            // The inner verifier has checked the validity period before the issuer.
            Err(error) if is_of_issuer(&error) && self.named.contains(end_entity) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            Err(error) if is_unknown_issuer(&error) => {
                let missing = self.missing_issuer(end_entity, intermediates);
                Err(missing.map_or(error, |issuer| {
                    let missing = OtherError(Arc::new(MissingIssuer(issuer)));
                    rustls::Error::InvalidCertificate(CertificateError::Other(missing))
                }))
            }
            checked => checked,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// `--insecure`: accepts any server.
#[derive(Debug)]
struct Unchecked(Vec<SignatureScheme>);

impl ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}

/// Whether a server has asked this process for a client certificate. Alerts from then on may be
/// about that.
static ASKED_FOR_ONE: AtomicBool = AtomicBool::new(false);

/// Offers no client certificate, and records that one was asked for.
#[derive(Debug)]
struct NoClientCertificate;

impl ResolvesClientCert for NoClientCertificate {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        ASKED_FOR_ONE.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// The certificate of this issuer is neither sent nor trusted.
#[derive(Debug, thiserror::Error)]
#[error("the certificate of {0} is missing")]
struct MissingIssuer(String);

impl RootedOrNamed {
    /// Follows the chain that the server sent, and returns the issuer at which it breaks off.
    /// `None` if it ends with a certificate that is signed by itself, or below a trusted name.
    fn missing_issuer(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Option<String> {
        let sent: Vec<_> = intermediates
            .iter()
            .filter_map(|sent| webpki::EndEntityCert::try_from(sent).ok())
            .collect();
        let leaf = webpki::EndEntityCert::try_from(end_entity).ok()?;
        let (mut subject, mut issuer) = (leaf.subject(), leaf.issuer());
        // A chain has at most as many steps as certificates.
        for _ in 0..=sent.len() {
            if subject == issuer || self.subjects.contains(issuer) {
                return None;
            }
            let Some(next) = sent.iter().find(|sent| sent.subject() == issuer) else {
                return Some(name_of(issuer));
            };
            (subject, issuer) = (next.subject(), next.issuer());
        }
        None
    }
}

/// Returns the common name in a distinguished name (DER), as far as it has one, on one line.
fn name_of(distinguished: &[u8]) -> String {
    /// The object identifier 2.5.4.3, with its tag and length.
    const COMMON_NAME: [u8; 5] = [6, 3, 0x55, 4, 3];
    let at = distinguished
        .windows(COMMON_NAME.len())
        .position(|bytes| bytes == COMMON_NAME);
    let text = at.and_then(|at| {
        let value = distinguished.get(at + COMMON_NAME.len()..)?;
        let len = usize::from(*value.get(1)?);
        value.get(2..2 + len)
    });
    text.map_or_else(
        || "an authority without a name".to_owned(),
        |text| format!("'{}'", words::one_line(&String::from_utf8_lossy(text))),
    )
}

fn is_unknown_issuer(error: &rustls::Error) -> bool {
    matches!(
        error,
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)
    )
}

/// Whether the error is about the issuer of a certificate, and not about its validity period or
/// name.
fn is_of_issuer(error: &rustls::Error) -> bool {
    is_unknown_issuer(error) || webpki_error(error) == Some(webpki::Error::CaUsedAsEndEntity)
}

/// Returns the webpki error for which rustls has no variant of its own.
fn webpki_error(error: &rustls::Error) -> Option<webpki::Error> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.0.downcast_ref::<webpki::Error>().cloned()
        }
        _ => None,
    }
}

fn own_error(error: &rustls::Error) -> Option<&MissingIssuer> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.0.downcast_ref::<MissingIssuer>()
        }
        _ => None,
    }
}

impl TlsFault {
    pub(super) fn of(error: &rustls::Error) -> TlsFault {
        if let Some(MissingIssuer(issuer)) = own_error(error) {
            let issuer = issuer.clone();
            return TlsFault::MissingIssuer { issuer };
        }
        match (webpki_error(error), error) {
            (Some(webpki::Error::CaUsedAsEndEntity), _) => TlsFault::Authority,
            (Some(webpki::Error::UnsupportedCertVersion), _) => TlsFault::OldVersion,
            (_, rustls::Error::InvalidCertificate(fault)) => TlsFault::of_certificate(fault),
            (_, rustls::Error::AlertReceived(alert)) => TlsFault::of_alert(*alert),
            (_, rustls::Error::PeerIncompatible(_)) => TlsFault::NothingInCommon,
            (_, other) => TlsFault::Other(other.to_string()),
        }
    }

    fn of_certificate(fault: &CertificateError) -> TlsFault {
        match fault {
            CertificateError::ExpiredContext { not_after, .. } => TlsFault::Expired {
                on: date(*not_after),
            },
            CertificateError::Expired => TlsFault::Certificate("has no time at which it is valid"),
            CertificateError::NotValidYetContext { not_before, .. } => TlsFault::NotYetValid {
                from: date(*not_before),
            },
            CertificateError::NotValidForNameContext {
                expected,
                presented,
            } => {
                let expected = expected.to_str().into_owned();
                if presented.is_empty() {
                    return TlsFault::NoName { expected };
                }
                TlsFault::WrongName {
                    expected,
                    presented: presented_names(presented),
                }
            }
            CertificateError::UnknownIssuer => TlsFault::UnknownAuthority,
            CertificateError::BadEncoding => TlsFault::Certificate("cannot be read"),
            CertificateError::BadSignature => {
                TlsFault::Certificate("is not signed by whom it names")
            }
            CertificateError::Revoked => TlsFault::Certificate("has been revoked"),
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                TlsFault::Certificate("is not meant for servers (extended key usage)")
            }
            CertificateError::UnhandledCriticalExtension => {
                TlsFault::Certificate("has a critical extension that nobody knows")
            }
            CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
                TlsFault::Certificate("is signed in a way that is no longer trusted (or not known)")
            }
            _ => TlsFault::Certificate("is not accepted"),
        }
    }

    fn of_alert(alert: AlertDescription) -> TlsFault {
        let is_about_ours = matches!(
            alert,
            AlertDescription::HandshakeFailure
                | AlertDescription::BadCertificate
                | AlertDescription::NoCertificate
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::CertificateUnknown
        );
        if alert == AlertDescription::CertificateRequired
            || is_about_ours && ASKED_FOR_ONE.load(Ordering::Relaxed)
        {
            return TlsFault::ClientCertificate;
        }
        if alert == AlertDescription::ProtocolVersion {
            return TlsFault::NothingInCommon;
        }
        TlsFault::Alert {
            alert: alert_name(alert),
        }
    }
}

/// Returns an alert's name as RFC 8446 writes it: `handshake_failure`.
fn alert_name(alert: AlertDescription) -> String {
    let mut name = String::new();
    for letter in format!("{alert:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() && !name.ends_with(['_', 'C']) {
            name.push('_');
        }
        name.push(letter);
    }
    format!("alert {}", name.to_lowercase())
}

/// Returns a few names of a stranger's certificate, on one line. The library writes each with its
/// kind, which is dropped.
fn presented_names(presented: &[String]) -> String {
    const NAMES_MAX: usize = 5;
    let names = presented.iter().take(NAMES_MAX).map(|name| {
        let inner = name.split('"').nth(1).unwrap_or(name);
        inner.to_owned()
    });
    let more = if presented.len() > NAMES_MAX {
        ", .."
    } else {
        ""
    };
    let names: Vec<String> = names.collect();
    crate::words::one_line(&format!("{}{more}", names.join(", ")))
}

fn date(time: UnixTime) -> String {
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(time.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("throng-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, text).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn fault(spec: &TrustSpec, file: Option<&Path>, directory: Option<&Path>) -> String {
        let env = |name: &str| match name {
            FILE_VARIABLE => file.map(PathBuf::from),
            _ => directory.map(PathBuf::from),
        };
        build(spec, &env)
            .err()
            .map_or_else(String::new, |fault| fault.to_string())
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_with_who_names_it() {
        let folder = Folder::new("trust");
        let none = TrustSpec::default();
        let missing = folder.0.join("missing.pem");
        let empty = folder.write("empty.pem", "no certificate\n");
        let broken = folder.write(
            "broken.pem",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        );
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let good = folder.write("good.pem", &made.cert.pem());
        for (path, what) in [
            (&missing, "cannot be read (No such file or directory)"),
            (&empty, "holds no certificate"),
            (&broken, "it is no X.509 certificate"),
        ] {
            let by_flag = TrustSpec {
                ca_files: vec![good.clone(), path.clone()],
                insecure: false,
            };
            for (said, name) in [
                (fault(&by_flag, None, None), "--ca-cert names "),
                (fault(&none, Some(path), None), "SSL_CERT_FILE names "),
            ] {
                assert!(
                    said.starts_with(name)
                        && said.contains(what)
                        && said.contains(&*path.to_string_lossy()),
                    "{said}"
                );
            }
        }
        assert!(fault(&none, None, Some(&missing)).starts_with("SSL_CERT_DIR names "));
        assert_eq!(fault(&none, Some(&good), None), "");
    }

    #[test]
    fn alerts_have_the_names_of_the_rfc() {
        for (alert, name) in [
            (
                AlertDescription::HandshakeFailure,
                "alert handshake_failure",
            ),
            (
                AlertDescription::UnrecognisedName,
                "alert unrecognised_name",
            ),
            (AlertDescription::InternalError, "alert internal_error"),
        ] {
            assert_eq!(alert_name(alert), name);
        }
    }
}
