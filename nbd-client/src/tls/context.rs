//! Credentials from files, as an OpenSSL context.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nbd_proto::limits::MAX_PSK_FILE_LEN;
use nbd_proto::tls::{
    CA_CERTIFICATE_FILE, CA_REVOCATION_FILE, CLIENT_CERTIFICATE_FILE, CLIENT_KEY_FILE, KeyPassword,
    PSK_FILE, PreSharedKey, PreSharedKeys,
};
use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{
    Ssl, SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode, SslOptions, SslVerifyMode,
    SslVersion,
};
use openssl::x509::store::{X509Lookup, X509StoreBuilder};
use openssl::x509::verify::{X509CheckFlags, X509VerifyFlags};
use openssl::x509::{X509, X509StoreContextRef};

use super::explain::{self, Identity};
use super::session::Session;
use super::settings::{Credentials, Setup};
use super::{KeySource, TlsError, VerifyPeer};

/// Suites of TLS 1.3. AES-128 first: external pre-shared keys are bound to SHA-256, and the default
/// order then selects ChaCha20, which is several times slower on processors with AES.
const SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";

/// Suites of TLS 1.2 with certificates: all with forward secrecy and authenticated encryption.
const CERTIFICATE_CIPHERS: &str =
    "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aNULL:!aPSK";

/// Suites of TLS 1.2 with pre-shared keys. Only these: with OpenSSL's default list, servers choose
/// certificates. Those with a key exchange come first.
const KEY_CIPHERS: &str = "DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:\
                           kECDHEPSK:kDHEPSK:kPSK:!eNULL:!3DES";

/// The files in which Linux distributions and BSDs store the authorities that a machine trusts.
const SYSTEM_AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Largest file with certificates or keys that is read, in bytes.
const MAX_PEM_LEN: u64 = 8 * 1024 * 1024;

/// Loaded credentials.
#[derive(Clone)]
pub(crate) struct Context {
    context: SslContext,
    peer: Peer,
    identity: Arc<Identity>,
}

/// The server's name.
#[derive(Clone)]
enum Peer {
    Certificate { name: Option<String>, verify: VerifyPeer, trusted: Arc<str> },
    PreSharedKey,
}

impl Context {
    /// Reads the files.
    pub(crate) fn load(setup: &Setup) -> Result<Self, TlsError> {
        match &setup.credentials {
            Credentials::X509 { directory, key_password, server_name, verify } => {
                let own = directory.as_deref().map(|it| (it, key_password.as_ref()));
                Self::x509(own, server_name.clone(), *verify)
            }
            Credentials::PreSharedKey { keys: KeySource::File(file), user } => {
                let (keys, path) = keys_in(file)?;
                Self::key(&keys, user.as_deref(), &path)
            }
            Credentials::PreSharedKey { keys: KeySource::Memory(keys), user } => {
                Self::key(keys, user.as_deref(), Path::new("keys in memory"))
            }
        }
    }

    fn x509(
        own: Option<(&Path, Option<&KeyPassword>)>,
        name: Option<String>,
        verify: VerifyPeer,
    ) -> Result<Self, TlsError> {
        let mut builder = builder(CERTIFICATE_CIPHERS)?;
        let directory = own.map(|(directory, _)| directory);
        let mut trusted: Arc<str> = "the system's list of authorities".into();
        let mut identity = Identity::Nobody { directory: directory.map(Path::to_owned) };
        if let Some((directory, password)) = own {
            if verify == VerifyPeer::Required {
                let path = directory.join(CA_CERTIFICATE_FILE);
                builder.set_cert_store(authorities(directory, &path)?.build());
                trusted = format!("'{}'", path.display()).into();
            }
            if let Some(own) = own_certificate(&mut builder, directory, password)? {
                identity = own;
            }
        } else if verify == VerifyPeer::Required {
            builder.set_cert_store(system_authorities()?.build());
        }
        let peer = Peer::Certificate { name, verify, trusted };
        Ok(Self { context: builder.build(), peer, identity: Arc::new(identity) })
    }

    /// `path` stands for the keys in messages.
    fn key(keys: &PreSharedKeys, user: Option<&str>, path: &Path) -> Result<Self, TlsError> {
        let (user, key) = choose(keys, user, path)?;
        let mut builder = builder(KEY_CIPHERS)?;
        let identity = Identity::PreSharedKey { user: String::from_utf8_lossy(&user).into() };
        builder.set_psk_client_callback(move |_, _, name, secret| {
            // The name ends with a NUL byte.
            let room = name.get_mut(..=user.len()).ok_or_else(ErrorStack::get)?;
            for (place, byte) in room.iter_mut().zip(user.iter().chain(&[0])) {
                *place = *byte;
            }
            let key = key.expose();
            secret.get_mut(..key.len()).ok_or_else(ErrorStack::get)?.copy_from_slice(key);
            Ok(key.len())
        });
        Ok(Self {
            context: builder.build(),
            peer: Peer::PreSharedKey,
            identity: Arc::new(identity),
        })
    }

    /// Creates a session for one connection.
    pub(crate) fn session(&self) -> Result<Session, TlsError> {
        let mut ssl = Ssl::new(&self.context).map_err(internal)?;
        let failure = Arc::new(OnceLock::new());
        match &self.peer {
            Peer::Certificate { name, verify, trusted } => {
                expect_name(&mut ssl, name.as_deref(), *verify).map_err(internal)?;
                let (failure, trusted) = (Arc::clone(&failure), Arc::clone(trusted));
                let wanted = name.clone().unwrap_or_default();
                let mode = match verify {
                    VerifyPeer::Required => SslVerifyMode::PEER,
                    VerifyPeer::Off => SslVerifyMode::NONE,
                };
                let verify = *verify;
                ssl.set_verify_callback(mode, move |good, store: &mut X509StoreContextRef| {
                    good || verify == VerifyPeer::Off
                        || explain::is_missing_revocation_list(store)
                        || {
                            failure.get_or_init(|| explain::certificate(store, &wanted, &trusted));
                            false
                        }
                });
            }
            Peer::PreSharedKey => {
                let failure = Arc::clone(&failure);
                // A server sends a certificate only if it does not use the key.
                ssl.set_verify_callback(SslVerifyMode::PEER, move |_, _| {
                    failure.get_or_init(|| TlsError::NotPreSharedKey);
                    false
                });
            }
        }
        let is_keyed = matches!(self.peer, Peer::PreSharedKey);
        Session::new(ssl, Arc::clone(&self.identity), failure, is_keyed).map_err(internal)
    }
}

fn builder(ciphers: &str) -> Result<SslContextBuilder, TlsError> {
    let build = || {
        let mut builder = SslContext::builder(SslMethod::tls_client())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        builder.set_options(SslOptions::NO_COMPRESSION | SslOptions::NO_RENEGOTIATION);
        builder.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
        builder.set_ciphersuites(SUITES)?;
        builder.set_cipher_list(ciphers)?;
        Ok(builder)
    };
    build().map_err(internal)
}

/// Sets the server's name, for the server (SNI) and for the check of its certificate.
fn expect_name(ssl: &mut Ssl, name: Option<&str>, verify: VerifyPeer) -> Result<(), ErrorStack> {
    let Some(name) = name else { return Ok(()) };
    let address = name.parse::<IpAddr>();
    if verify == VerifyPeer::Required {
        let parameters = ssl.param_mut();
        parameters.set_hostflags(X509CheckFlags::NO_PARTIAL_WILDCARDS);
        match address {
            Ok(address) => parameters.set_ip(address)?,
            Err(_) => parameters.set_host(name)?,
        }
    }
    if address.is_err() {
        ssl.set_hostname(name)?;
    }
    Ok(())
}

fn authorities(directory: &Path, path: &Path) -> Result<X509StoreBuilder, TlsError> {
    const WHAT: &str = "the authorities' certificates";
    let bad = |why: String| TlsError::BadFile { what: WHAT, path: path.to_owned(), why };
    let mut store = X509StoreBuilder::new().map_err(internal)?;
    for certificate in certificates(path, WHAT)? {
        store.add_cert(certificate).map_err(|error| bad(explain::reason(&error)))?;
    }
    let path = directory.join(CA_REVOCATION_FILE);
    if path.exists() {
        revocations(&mut store, &path)?;
    }
    Ok(store)
}

fn revocations(store: &mut X509StoreBuilder, path: &Path) -> Result<(), TlsError> {
    const WHAT: &str = "the list of revoked certificates";
    let bad = |why: String| TlsError::BadFile { what: WHAT, path: path.to_owned(), why };
    read(path, WHAT, MAX_PEM_LEN)?;
    if path.to_str().is_none_or(|name| name.contains('\0')) {
        return Err(bad("its path is not UTF-8".to_owned()));
    }
    let lookup = store.add_lookup(X509Lookup::file()).map_err(internal)?;
    let count = lookup
        .load_crl_file(path, SslFiletype::PEM)
        .map_err(|error| bad(format!("it is not a PEM list ({})", explain::reason(&error))))?;
    if count < 1 {
        return Err(bad("it has no list".to_owned()));
    }
    store.set_flags(X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL).map_err(internal)
}

fn system_authorities() -> Result<X509StoreBuilder, TlsError> {
    let mut store = X509StoreBuilder::new().map_err(internal)?;
    match SYSTEM_AUTHORITIES.iter().find(|path| Path::new(path).is_file()) {
        Some(path) => {
            let lookup = store.add_lookup(X509Lookup::file()).map_err(internal)?;
            lookup.load_cert_file(path, SslFiletype::PEM).map_err(|error| TlsError::BadFile {
                what: "the system's list of authorities",
                path: path.into(),
                why: explain::reason(&error),
            })?;
        }
        None => store.set_default_paths().map_err(internal)?,
    }
    Ok(store)
}

/// Loads the client's certificate and key if there are any.
fn own_certificate(
    builder: &mut SslContextBuilder,
    directory: &Path,
    password: Option<&KeyPassword>,
) -> Result<Option<Identity>, TlsError> {
    const WHAT: &str = "the client's certificate";
    let (path, key_path) =
        (directory.join(CLIENT_CERTIFICATE_FILE), directory.join(CLIENT_KEY_FILE));
    if !path.exists() && !key_path.exists() {
        return Ok(None);
    }
    let mut chain = certificates(&path, WHAT)?.into_iter();
    let Some(leaf) = chain.next() else { return Ok(None) };
    let key = private_key(&key_path, password)?;
    if !leaf.public_key().is_ok_and(|public| public.public_eq(&key)) {
        let why = format!("it does not belong to {CLIENT_CERTIFICATE_FILE} beside it");
        return Err(TlsError::BadFile { what: KEY, path: key_path, why });
    }
    let bad = |error: ErrorStack| {
        let why = explain::reason(&error);
        TlsError::BadFile { what: WHAT, path: path.clone(), why }
    };
    builder.set_certificate(&leaf).map_err(bad)?;
    for certificate in chain {
        builder.add_extra_chain_cert(certificate).map_err(bad)?;
    }
    builder.set_private_key(&key).map_err(bad)?;
    let now = Asn1Time::days_from_now(0).map_err(internal)?;
    let expired = (leaf.not_after() < now.as_ref()).then(|| leaf.not_after().to_string());
    Ok(Some(Identity::Certificate { path, expired }))
}

const KEY: &str = "the key of the client's certificate";

fn private_key(path: &Path, password: Option<&KeyPassword>) -> Result<PKey<Private>, TlsError> {
    let text = read(path, KEY, MAX_PEM_LEN)?;
    warn_if_public(path);
    let mut is_encrypted = false;
    // Without a callback OpenSSL would ask for a password on the terminal.
    let key = PKey::private_key_from_pem_callback(&text, |buffer| {
        is_encrypted = true;
        Ok(password.map_or(0, |password| password.copy_to(buffer)))
    });
    key.map_err(|_| TlsError::BadFile {
        what: KEY,
        path: path.to_owned(),
        why: match (is_encrypted, password) {
            (false, _) => "it is not a private key in PEM form",
            (true, None) => {
                "it is encrypted, and its password is not given: give it, or store the key without a \
                 pass phrase, readable by its user only"
            }
            (true, Some(_)) => "it is encrypted, and the password does not open it: give the right one",
        }
        .to_owned(),
    })
}

fn certificates(path: &Path, what: &'static str) -> Result<Vec<X509>, TlsError> {
    let bad = |why: String| TlsError::BadFile { what, path: path.to_owned(), why };
    let text = read(path, what, MAX_PEM_LEN)?;
    let certificates = X509::stack_from_pem(&text).map_err(|error| {
        bad(format!("it has no PEM certificates ({})", explain::reason(&error)))
    })?;
    if certificates.is_empty() {
        return Err(bad("it has no PEM certificate".to_owned()));
    }
    Ok(certificates)
}

/// Reads a file of pre-shared keys, or the one of the default name in a directory. Returns its
/// path, too.
fn keys_in(file: &Path) -> Result<(PreSharedKeys, PathBuf), TlsError> {
    let path = if file.is_dir() { file.join(PSK_FILE) } else { file.to_owned() };
    let text = read(&path, "the pre-shared keys", MAX_PSK_FILE_LEN)?;
    warn_if_public(&path);
    match PreSharedKeys::parse(&text) {
        Ok(keys) => Ok((keys, path)),
        Err(source) => Err(TlsError::BadKeyFile { path, source }),
    }
}

/// Selects the user whose key is used: the requested one, or the only one.
fn choose(
    keys: &PreSharedKeys,
    user: Option<&str>,
    path: &Path,
) -> Result<(Box<[u8]>, PreSharedKey), TlsError> {
    const MOST: usize = 8;
    let quoted = keys.users().take(MOST).map(|user| format!("'{}'", user.escape_ascii()));
    let mut users = quoted.collect::<Vec<_>>().join(", ");
    if keys.users().nth(MOST).is_some() {
        users += " and more";
    }
    let path = PathBuf::from(path);
    let mut all = keys.users();
    let name = match (user, all.next(), all.next()) {
        (Some(user), ..) => user.as_bytes(),
        (None, Some(only), None) => only,
        (None, ..) => return Err(TlsError::NoUser { path, users }),
    };
    match keys.key_of(name) {
        Some(key) => Ok((name.into(), key.clone())),
        None => {
            let user = name.escape_ascii().to_string();
            Err(TlsError::UnknownUser { path, user, users })
        }
    }
}

fn read(path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>, TlsError> {
    let read = || {
        let mut text = Vec::new();
        File::open(path)?.take(limit + 1).read_to_end(&mut text)?;
        if text.len() as u64 > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too large for that"));
        }
        Ok(text)
    };
    read().map_err(|source| TlsError::File {
        what,
        path: path.to_owned(),
        source: Arc::new(source),
    })
}

fn warn_if_public(path: &Path) {
    let mode = path.metadata().map_or(0, |metadata| metadata.permissions().mode());
    if mode & 0o004 != 0 {
        tracing::warn!(
            "'{}' holds a secret and is readable by every user: chmod 600 it",
            path.display()
        );
    }
}

/// Handles errors that only occur when memory is exhausted or the library is broken.
fn internal(error: ErrorStack) -> TlsError {
    TlsError::Failed(explain::reason(&error))
}
