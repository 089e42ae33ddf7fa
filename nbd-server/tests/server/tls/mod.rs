//! TLS: what the handshake lets through, and what it costs a client to misbehave in it.

mod client;
#[path = "../../support/credentials.rs"]
#[allow(dead_code)]
mod credentials;

mod handshake;
mod hook;
mod hostile;
mod memory;
mod reload;
mod selective;
mod stall;
mod transfers;

use std::path::Path;
use std::sync::Arc;

use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::tls::{
    Authorization, ClientCertificates, CredentialSource, TlsCredentials, TlsMode,
};
use nbd_server::{ExportRegistry, ServerConfig};

use crate::support::{TestServer, skip};
use credentials::{Authority, Maker, Role, Validity};

/// Size of the disk that is served, in bytes.
const DISK_LEN: u64 = 32 << 20;

/// A directory with everything a server and a client need; `None` if openssl is not installed.
fn certificates() -> Option<tempfile::TempDir> {
    if !Maker::Openssl.is_installed() {
        skip("openssl is not installed");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(Maker::Openssl, directory.path(), "Test authority");
    authority.issue(Role::Server, "localhost", Validity::Now, directory.path());
    authority.issue(Role::Client, "alice", Validity::Now, directory.path());
    Some(directory)
}

fn x509(directory: &Path, authorization: Authorization) -> TlsCredentials {
    let source = CredentialSource::X509 {
        directory: directory.to_path_buf(),
        key_password: None,
        client_certificates: ClientCertificates::Required,
        authorization,
    };
    TlsCredentials::load(source).unwrap()
}

/// Two users.
const KEYS: &str = "alice:00112233445566778899aabbccddeeff\nbob:ffeeddccbbaa99887766554433221100\n";
const ALICES_KEY: [u8; 16] = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff_u128.to_be_bytes();

/// Credentials with pre-shared keys, which need no tool, and the directory they are in.
fn psk() -> (tempfile::TempDir, TlsCredentials) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("keys.psk"), KEYS).unwrap();
    let file = directory.path().to_path_buf();
    (directory, TlsCredentials::load(CredentialSource::Psk { file }).unwrap())
}

/// A memory disk, served.
fn serve(tls: TlsMode) -> TestServer {
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(DISK_LEN)))).unwrap();
    serve_all(tls, exports)
}

fn serve_all(tls: TlsMode, exports: ExportRegistry) -> TestServer {
    let mut config = ServerConfig::default();
    config.tls = tls;
    TestServer::start(config, exports)
}
