//! TLS code shared by client and server: the names of credential files, and the parser for files of
//! pre-shared keys.
//!
//! A certificate directory has the layout that QEMU and libnbd use: one directory can hold the
//! files of a server, of a client, or of both. Pre-shared keys are in a text file as psktool writes
//! it. This module opens no files.

mod key_file;
mod secret;

pub use self::key_file::{KeyFileError, KeyLineProblem, PreSharedKeys};
pub use self::secret::{KeyPassword, PreSharedKey};

/// Certificates of the trusted authorities, PEM.
pub const CA_CERTIFICATE_FILE: &str = "ca-cert.pem";
/// Certificates that the authorities have revoked, PEM; optional.
pub const CA_REVOCATION_FILE: &str = "ca-crl.pem";
/// The server's certificate and its intermediate certificates, PEM.
pub const SERVER_CERTIFICATE_FILE: &str = "server-cert.pem";
/// The private key of the server's certificate, PEM.
pub const SERVER_KEY_FILE: &str = "server-key.pem";
/// The client's certificate and its intermediate certificates, PEM.
pub const CLIENT_CERTIFICATE_FILE: &str = "client-cert.pem";
/// The private key of the client's certificate, PEM.
pub const CLIENT_KEY_FILE: &str = "client-key.pem";
/// Default name of the file of pre-shared keys in a directory.
pub const PSK_FILE: &str = "keys.psk";
