//! Results of the callbacks of one TLS handshake, for the log.

use std::fmt;
use std::sync::OnceLock;

use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::ssl::{Ssl, SslRef};

static INDEX: OnceLock<Index<Ssl, Notes>> = OnceLock::new();

/// Notes that are attached to the connection's state in the TLS library. Each is written once: the
/// first refusal counts.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    user: OnceLock<String>,
    name: OnceLock<String>,
    refusal: OnceLock<String>,
}

/// The authenticated identity of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeerIdentity {
    /// None: it was not requested.
    Anonymous,
    /// The owner of a certificate with this distinguished name.
    Certificate(String),
    /// A user with a pre-shared key.
    User(String),
}

/// Text of a peer that is safe to print: what is not plain is escaped.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match nbd_proto::codec::is_plain(character) {
            true => out.push(character),
            false => out.extend(character.escape_debug()),
        }
    }
    out
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("a client without a certificate"),
            Self::Certificate(name) => f.write_str(&printable(name)),
            Self::User(name) => write!(f, "the user \"{}\"", printable(name)),
        }
    }
}

impl Notes {
    /// Attaches notes to a connection.
    pub(super) fn attach(ssl: &mut SslRef) -> Result<(), ErrorStack> {
        let index = match INDEX.get() {
            Some(index) => *index,
            None => {
                let index = Ssl::new_ex_index()?;
                *INDEX.get_or_init(|| index)
            }
        };
        ssl.set_ex_data(index, Self::default());
        Ok(())
    }

    /// The notes of a connection.
    pub(crate) fn of(ssl: &SslRef) -> Option<&Self> {
        ssl.ex_data(*INDEX.get()?)
    }

    /// Records that the client named this user, for whom there is a key.
    pub(super) fn set_user(&self, user: String) {
        let _ = self.user.set(user);
    }

    pub(super) fn user(&self) -> Option<&str> {
        self.user.get().map(String::as_str)
    }

    /// Records the name in the client's valid certificate; the client may connect.
    pub(super) fn set_name(&self, name: String) {
        let _ = self.name.set(name);
    }

    /// Records that the client is refused.
    pub(super) fn set_refusal(&self, refusal: String) {
        let _ = self.refusal.set(refusal);
    }

    pub(super) fn refusal(&self) -> Option<String> {
        self.refusal.get().cloned()
    }

    /// The client's identity, after the handshake.
    pub(crate) fn identity(&self) -> PeerIdentity {
        match (self.user.get(), self.name.get()) {
            (Some(user), _) => PeerIdentity::User(user.clone()),
            (None, Some(name)) => PeerIdentity::Certificate(name.clone()),
            (None, None) => PeerIdentity::Anonymous,
        }
    }
}
