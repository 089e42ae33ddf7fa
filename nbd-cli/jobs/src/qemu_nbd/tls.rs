//! TLS as configured by `--object`, `--tls-creds`, `--tls-authz` and `--tls-hostname`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use nbd_client::{TlsOptions, VerifyPeer};
use nbd_server::tls::{
    Authorization as Allowed, ClientCertificates, CredentialSource, Matching, Rule, TlsCredentials,
    TlsMode, Verdict,
};

use super::error::CommandLineError;
use super::objects::{Authorization, CredentialsKind};
use super::options::Options;
use crate::key_values::KeyValues;

const PSK_FILE: &str = "keys.psk";
/// The default user of a client's key.
const DEFAULT_USER: &str = "qemu";
/// Longest file with rules that is read, in bytes.
const MAX_RULES_LEN: u64 = 1 << 20;

impl Options {
    /// Returns what the server requires of its clients, and reads the credentials.
    ///
    /// # Errors
    ///
    /// If credentials are missing, unreadable or for another purpose.
    pub fn server_tls(&self) -> Result<TlsMode, CommandLineError> {
        for_server(self).map_err(CommandLineError::new)
    }

    /// Returns the TLS settings of `-L`; `None`: without TLS.
    ///
    /// # Errors
    ///
    /// If an option is missing or is for a server.
    pub fn client_tls(&self) -> Result<Option<TlsOptions>, CommandLineError> {
        for_client(self).map_err(CommandLineError::new)
    }
}

/// The server's requirements.
fn for_server(options: &Options) -> Result<TlsMode, String> {
    let Some(id) = &options.tls_creds else { return Ok(TlsMode::Off) };
    let credentials = options.objects.credentials(id, options.list)?;
    let source = match &credentials.kind {
        CredentialsKind::Psk { .. } if options.tls_authz.is_some() => {
            return Err("--tls-authz needs certificates: a pre-shared key has no distinguished \
                        name, and its file is the list of users"
                .to_owned());
        }
        CredentialsKind::Psk { user: Some(_) } => {
            return Err("'username' is for clients; a server knows every user of keys.psk".into());
        }
        CredentialsKind::Psk { user: None } => {
            CredentialSource::Psk { file: credentials.directory.join(PSK_FILE) }
        }
        CredentialsKind::X509 { verify_peer, password } => {
            refuse_password(options, password.as_deref())?;
            if options.tls_authz.is_some() && !verify_peer {
                return Err("--tls-authz needs the certificates of clients, but they are not \
                            asked for one with verify-peer=off"
                    .to_owned());
            }
            CredentialSource::X509 {
                directory: credentials.directory.clone(),
                client_certificates: match verify_peer {
                    true => ClientCertificates::Required,
                    false => ClientCertificates::NotAsked,
                },
                authorization: match &options.tls_authz {
                    Some(id) => allowed(options.objects.authorization(id)?)?,
                    None => Allowed::Everyone,
                },
            }
        }
    };
    TlsCredentials::load(source).map(TlsMode::Require).map_err(|error| error.to_string())
}

/// The TLS settings of `-L`.
fn for_client(options: &Options) -> Result<Option<TlsOptions>, String> {
    let Some(id) = &options.tls_creds else { return Ok(None) };
    let credentials = options.objects.credentials(id, options.list)?;
    let tls = TlsOptions::new(nbd_client::TlsMode::Require);
    let tls = match &credentials.kind {
        CredentialsKind::Psk { user } => tls
            .pre_shared_keys(credentials.directory.join(PSK_FILE))
            .user(user.as_deref().unwrap_or(DEFAULT_USER)),
        CredentialsKind::X509 { verify_peer, password } => {
            refuse_password(options, password.as_deref())?;
            let verify = if *verify_peer { VerifyPeer::Required } else { VerifyPeer::Off };
            tls.certificates(&credentials.directory).verify_peer(verify)
        }
    };
    Ok(Some(match &options.tls_hostname {
        Some(name) => tls.hostname(name),
        None => tls,
    }))
}

fn refuse_password(options: &Options, password: Option<&str>) -> Result<(), String> {
    match password {
        None => Ok(()),
        Some(id) if !options.objects.has_secret(id) => Err(format!("No secret with id '{id}'")),
        Some(_) => Err("'passwordid' is not supported: private keys must not be encrypted; keep \
                        the key in a file that only the server can read"
            .to_owned()),
    }
}

fn allowed(authorization: &Authorization) -> Result<Allowed, String> {
    Ok(match authorization {
        Authorization::Simple(identity) => Allowed::Rules {
            rules: vec![Rule::new(identity, Matching::Exact, Verdict::Allow)],
            otherwise: Verdict::Deny,
        },
        Authorization::List { rules, otherwise } => {
            Allowed::Rules { rules: rules.clone(), otherwise: *otherwise }
        }
        Authorization::ListFile(path) => {
            let wrong = |why: String| format!("cannot use '{}': {why}", path.display());
            let text = read_rules(path).map_err(|error| wrong(error.to_string()))?;
            let mut properties = KeyValues::from_json(&text).map_err(wrong)?;
            let list = Authorization::list(&mut properties).map_err(wrong)?;
            if let Some(key) = properties.left_over() {
                return Err(wrong(format!("'{key}' is unexpected")));
            }
            allowed(&list)?
        }
    })
}

fn read_rules(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(MAX_RULES_LEN + 1).read_to_string(&mut text)?;
    match read as u64 > MAX_RULES_LEN {
        true => Err(std::io::Error::other(format!("it has more than {MAX_RULES_LEN} bytes"))),
        false => Ok(text),
    }
}
