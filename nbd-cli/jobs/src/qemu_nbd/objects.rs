//! `--object`: secrets, TLS credentials and access lists, by their ids.

use std::collections::BTreeMap;
use std::path::PathBuf;

use imgfmt::Passphrase;
use nbd_proto::NbdUri;
use nbd_proto::tls::KeyPassword;
use nbd_proto::uri::Security;
use nbd_server::tls::{Matching, Rule, Verdict};

use crate::key_values::KeyValues;
use crate::secret::Secret;

/// The file with the keys of TLS credentials.
pub(super) const PSK_FILE: &str = "keys.psk";
/// The default user of a client's key.
const DEFAULT_USER: &str = "qemu";

/// The defined objects.
#[derive(Debug, Default)]
pub struct Objects {
    objects: BTreeMap<String, Object>,
}

/// An object whose properties were checked, but whose files were not read.
#[derive(Clone, Debug)]
pub(super) enum Object {
    Secret(Secret),
    TlsCredentials(TlsCredentials),
    Authorization(Authorization),
}

/// Credentials for one end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TlsCredentials {
    pub(super) endpoint: Endpoint,
    pub(super) directory: PathBuf,
    pub(super) kind: CredentialsKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Server,
    Client,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CredentialsKind {
    X509 { verify_peer: bool, password: Option<String> },
    Psk { user: Option<String> },
}

/// The authorized clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Authorization {
    /// Exactly this distinguished name.
    Simple(String),
    List {
        rules: Vec<Rule>,
        otherwise: Verdict,
    },
    /// A list in a JSON file.
    ListFile(PathBuf),
}

impl Objects {
    /// Defines the object of an `--object` option.
    ///
    /// # Errors
    ///
    /// A sentence about the invalid property.
    pub fn add(&mut self, text: &str) -> Result<(), String> {
        let mut properties = KeyValues::parse(text, Some("qom-type"))?;
        let kind = properties.take("qom-type").filter(|kind| !kind.is_empty());
        let kind = kind.ok_or_else(|| missing("qom-type"))?;
        let id = properties.take("id").ok_or_else(|| missing("id"))?;
        let object = match kind.as_str() {
            "secret" => Object::Secret(Secret::new(&mut properties)?),
            "tls-creds-x509" | "tls-creds-psk" => {
                Object::TlsCredentials(TlsCredentials::new(&kind, &mut properties)?)
            }
            "authz-simple" => {
                let identity = properties.take("identity").ok_or_else(|| missing("identity"))?;
                Object::Authorization(Authorization::Simple(identity))
            }
            "authz-list" => Object::Authorization(Authorization::list(&mut properties)?),
            "authz-list-file" => {
                let file = properties.take("filename").ok_or_else(|| missing("filename"))?;
                // Whether changes of the file take effect: it is read at the start only.
                if properties.take_switch("refresh")? == Some(true) {
                    return Err("refresh=on is not supported: the file is read once".to_owned());
                }
                Object::Authorization(Authorization::ListFile(file.into()))
            }
            _ => {
                return Err(format!(
                    "'qom-type' does not accept '{kind}'; there are secret, tls-creds-x509, \
                     tls-creds-psk, authz-simple, authz-list and authz-list-file"
                ));
            }
        };
        if let Some(key) = properties.left_over() {
            return Err(format!("Parameter '{key}' is unexpected for an object '{kind}'"));
        }
        match self.objects.insert(id.clone(), object) {
            None => Ok(()),
            Some(_) => Err(format!("there are two objects with the id '{id}'")),
        }
    }

    /// Returns the credentials of that id, which must be for the required end.
    ///
    /// # Errors
    ///
    /// A sentence if there are none, or they are for the other end.
    pub(super) fn credentials(&self, id: &str, as_client: bool) -> Result<&TlsCredentials, String> {
        let failed = |why: String| Err(format!("Failed to get TLS creds: {why}"));
        match self.objects.get(id) {
            None => failed(format!("No TLS credentials with id '{id}'")),
            Some(Object::TlsCredentials(credentials)) => {
                let needed = if as_client { Endpoint::Client } else { Endpoint::Server };
                match credentials.endpoint == needed {
                    true => Ok(credentials),
                    false => failed(format!("'{id}' is not for endpoint={}", needed.name())),
                }
            }
            Some(_) => failed(format!("Object with id '{id}' is not TLS credentials")),
        }
    }

    /// Adds the credentials of that id, which must be for a client, to the URI of an export.
    ///
    /// # Errors
    ///
    /// A sentence if there are none, or they cannot be used.
    pub fn secure(&self, id: &str, uri: &mut NbdUri) -> Result<(), String> {
        let credentials = self.credentials(id, true)?;
        uri.security = Security::Tls;
        match &credentials.kind {
            CredentialsKind::Psk { user } => {
                uri.tls.psk_file = Some(credentials.directory.join(PSK_FILE));
                uri.user = Some(user.as_deref().unwrap_or(DEFAULT_USER).to_owned());
            }
            CredentialsKind::X509 { verify_peer, password } => {
                uri.tls.key_password = self.key_password(password.as_deref())?;
                uri.tls.certificates = Some(credentials.directory.clone());
                uri.tls.verify_peer = Some(*verify_peer);
            }
        }
        Ok(())
    }

    /// Returns the password of a private key, the secret of the id `passwordid`.
    pub(super) fn key_password(&self, id: Option<&str>) -> Result<Option<KeyPassword>, String> {
        match id.map(|id| (id, self.objects.get(id))) {
            None => Ok(None),
            Some((_, Some(Object::Secret(secret)))) => secret.password().map(Some),
            Some((id, _)) => Err(format!("No secret with id '{id}'")),
        }
    }

    /// Returns the access list of that id.
    ///
    /// # Errors
    ///
    /// A sentence if there is none.
    pub(super) fn authorization(&self, id: &str) -> Result<&Authorization, String> {
        match self.objects.get(id) {
            Some(Object::Authorization(authorization)) => Ok(authorization),
            Some(_) => Err(format!("Object with id '{id}' does not authorize anybody")),
            None => Err(format!("No authorization object with id '{id}'")),
        }
    }

    /// Reads all secrets now, each once, and keeps them.
    ///
    /// # Errors
    ///
    /// A sentence if one cannot be read.
    pub fn load_secrets(&mut self) -> Result<(), String> {
        self.objects.values_mut().try_for_each(|object| match object {
            Object::Secret(secret) => secret.load(),
            _ => Ok(()),
        })
    }

    /// Returns the secret of that id, which is read unless it is known.
    ///
    /// # Errors
    ///
    /// A sentence if there is none, or it cannot be read.
    pub fn passphrase(&self, id: &str) -> Result<Passphrase, String> {
        match self.objects.get(id) {
            Some(Object::Secret(secret)) => secret.read(),
            _ => Err(format!("No secret with id '{id}'")),
        }
    }

    /// Returns the secret of that id, for a new image, as [`passphrase`](Self::passphrase) does.
    ///
    /// # Errors
    ///
    /// As [`passphrase`](Self::passphrase); or if it is not text.
    pub fn new_passphrase(&self, id: &str) -> Result<Passphrase, String> {
        match self.objects.get(id) {
            Some(Object::Secret(secret)) => {
                secret.read_text().map_err(|why| format!("the secret '{id}' cannot be used: {why}"))
            }
            _ => self.passphrase(id),
        }
    }

    /// Returns whether there are secrets.
    pub(super) fn has_secrets(&self) -> bool {
        self.objects.values().any(|object| matches!(object, Object::Secret(_)))
    }
}

impl Endpoint {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

impl TlsCredentials {
    fn new(kind: &str, properties: &mut KeyValues) -> Result<Self, String> {
        let endpoint = match properties.take("endpoint").as_deref() {
            // The default is QEMU's.
            None | Some("client") => Endpoint::Client,
            Some("server") => Endpoint::Server,
            Some(other) => return Err(not_accepted("endpoint", other)),
        };
        let directory = properties.take("dir").ok_or("Missing 'dir' property value")?.into();
        let verify_peer = properties.take_switch("verify-peer")?.unwrap_or(true);
        if properties.take("priority").is_some() {
            return Err("'priority' is not supported: its words are GnuTLS's".to_owned());
        }
        let kind = if kind == "tls-creds-psk" {
            CredentialsKind::Psk { user: properties.take("username") }
        } else {
            // Certificates are always verified.
            properties.take_switch("sanity-check")?;
            CredentialsKind::X509 { verify_peer, password: properties.take("passwordid") }
        };
        Ok(Self { endpoint, directory, kind })
    }
}

impl Authorization {
    /// A list of rules.
    ///
    /// # Errors
    ///
    /// A sentence about the invalid property.
    pub(super) fn list(properties: &mut KeyValues) -> Result<Self, String> {
        let otherwise = take_verdict(properties, "policy")?.unwrap_or(Verdict::Deny);
        let mut rules = Vec::new();
        loop {
            let mut rule = properties.take_below(&format!("rules.{}", rules.len()));
            if rule.is_empty() {
                return Ok(Self::List { rules, otherwise });
            }
            let name = rule.take("match").ok_or_else(|| missing("match"))?;
            let verdict = take_verdict(&mut rule, "policy")?.ok_or_else(|| missing("policy"))?;
            let matching = match rule.take("format").as_deref() {
                None | Some("exact") => Matching::Exact,
                Some("glob") => Matching::Pattern,
                Some(other) => return Err(not_accepted("format", other)),
            };
            if let Some(key) = rule.left_over() {
                return Err(format!("Parameter '{key}' is unexpected in a rule"));
            }
            rules.push(Rule::new(name, matching, verdict));
        }
    }
}

fn take_verdict(properties: &mut KeyValues, key: &str) -> Result<Option<Verdict>, String> {
    match properties.take(key).as_deref() {
        None => Ok(None),
        Some("allow") => Ok(Some(Verdict::Allow)),
        Some("deny") => Ok(Some(Verdict::Deny)),
        Some(other) => Err(not_accepted(key, other)),
    }
}

fn missing(key: &str) -> String {
    format!("Parameter '{key}' is missing")
}

fn not_accepted(key: &str, value: &str) -> String {
    format!("Parameter '{key}' does not accept value '{value}'")
}
