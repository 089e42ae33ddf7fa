//! TLS as configured by `--object`, `--tls-creds`, `--tls-authz` and `--tls-hostname`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use nbd_proto::NbdUri;
use nbd_server::tls::{
    Authorization as Allowed, ClientCertificates, CredentialSource, Matching, Rule, TlsCredentials,
    TlsMode, Verdict,
};

use super::error::CommandLineError;
use super::objects::{Authorization, CredentialsKind, PSK_FILE};
use super::options::Options;
use crate::key_values::KeyValues;

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

    /// Adds TLS to the URI of `-L`, if it is wanted.
    ///
    /// # Errors
    ///
    /// If an option is missing or is for a server.
    pub fn secure(&self, uri: &mut NbdUri) -> Result<(), CommandLineError> {
        let Some(id) = &self.tls_creds else { return Ok(()) };
        uri.tls.hostname.clone_from(&self.tls_hostname);
        self.objects.secure(id, uri).map_err(CommandLineError::new)
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
            if options.tls_authz.is_some() && !verify_peer {
                return Err("--tls-authz needs the certificates of clients, but they are not \
                            asked for one with verify-peer=off"
                    .to_owned());
            }
            CredentialSource::X509 {
                directory: credentials.directory.clone(),
                key_password: options.objects.key_password(password.as_deref())?,
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
