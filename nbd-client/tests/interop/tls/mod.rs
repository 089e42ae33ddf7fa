//! TLS with common servers, and both kinds of credentials, valid and invalid.

#[path = "../../../../nbd-server/tests/support/credentials.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared by the tests of several crates")]
mod credentials;

mod broken;
mod matrix;
mod our_server;
mod refusals;

use std::path::PathBuf;

use nbd_client::{Connector, TlsMode, TlsOptions};
use tempfile::TempDir;

use crate::common::{Peer, have, nbdkit, qemu_nbd};
use credentials::{Authority, Maker, Role, Validity, add_psk_user};

/// The name in every server's certificate here.
const NAME: &str = "localhost";

/// The group ffdhe2048 of RFC 7919.
const DH_PARAMETERS: &str = "\
-----BEGIN DH PARAMETERS-----
MIIBDAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAgICAQA=
-----END DH PARAMETERS-----
";

/// A server program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    QemuNbd,
    Nbdkit,
}

impl Program {
    const ALL: [Self; 2] = [Self::QemuNbd, Self::Nbdkit];

    const fn name(self) -> &'static str {
        match self {
            Self::QemuNbd => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
        }
    }
}

/// The only version of TLS that a server has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    Tls12,
    Tls13,
}

/// How a server proves who it is, and asks of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    X509,
    PreSharedKey,
}

/// A directory with the credentials of a server and its clients.
struct Site {
    directory: TempDir,
    authority: Authority,
}

impl Site {
    /// Makes certificates with a tool, and keys with psktool; `None` if a tool is missing.
    fn new(maker: Maker) -> Option<Self> {
        if !have(maker.program()) || !have("psktool") {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let authority = directory.path().join("authority");
        std::fs::create_dir(&authority).unwrap();
        let authority = Authority::new(maker, &authority, "the authority of the test");
        let site = Self { directory, authority };
        site.authority.issue(Role::Server, NAME, Validity::Now, &site.path("server"));
        site.authority.issue(Role::Client, "a client", Validity::Now, &site.path("client"));
        std::fs::create_dir(site.path("keys")).unwrap();
        add_psk_user(&site.path("keys/keys.psk"), "alice");
        add_psk_user(&site.path("keys/keys.psk"), "bob:builder");
        // Without them qemu-nbd makes its own, which may take many seconds.
        for directory in ["server", "keys"] {
            std::fs::write(site.path(directory).join("dh-params.pem"), DH_PARAMETERS).unwrap();
        }
        Some(site)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts a server with the credentials of a directory.
    async fn serve(
        &self,
        program: Program,
        kind: Kind,
        version: Version,
        directory: &str,
        contents: &[u8],
    ) -> Peer {
        let directory = self.path(directory).to_str().unwrap().to_owned();
        match program {
            Program::QemuNbd => {
                let object = match kind {
                    // Its check wants "key encipherment", which is for RSA keys only.
                    Kind::X509 => "tls-creds-x509,sanity-check=off",
                    Kind::PreSharedKey => "tls-creds-psk",
                };
                let version = match version {
                    Version::Tls12 => "1.2",
                    Version::Tls13 => "1.3",
                };
                let object = format!(
                    "{object},id=t,endpoint=server,dir={directory},\
                     priority=NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK:-VERS-ALL:+VERS-TLS{version}"
                );
                qemu_nbd(&["--object", &object, "--tls-creds", "t"], contents).await
            }
            Program::Nbdkit => {
                // It has no option for the version. 1.3 is what it does by itself.
                let text = match version {
                    Version::Tls12 => "[overrides]\ndisabled-version = tls1.3\n",
                    Version::Tls13 => "",
                };
                let settings = self.path(&format!("{version:?}.conf"));
                std::fs::write(&settings, text).unwrap();
                let settings = format!("GNUTLS_SYSTEM_PRIORITY_FILE={}", settings.display());
                let credentials = match kind {
                    Kind::X509 => format!("--tls-certificates={directory}"),
                    Kind::PreSharedKey => format!("--tls-psk={directory}/keys.psk"),
                };
                let verify: &[&str] = if kind == Kind::X509 { &["--tls-verify-peer"] } else { &[] };
                let arguments: Vec<&str> =
                    [settings.as_str(), "nbdkit", "-f", "-U", "{socket}", "--tls=require"]
                        .into_iter()
                        .chain([credentials.as_str()])
                        .chain(verify.iter().copied())
                        .chain(["file", "{directory}/disk"])
                        .collect();
                let contents = contents.to_vec();
                Peer::start("env", &arguments, move |directory| {
                    std::fs::write(directory.join("disk"), contents).unwrap();
                })
                .await
            }
        }
    }

    /// The credentials of a client.
    fn options(&self, kind: Kind) -> TlsOptions {
        let options = TlsOptions::new(TlsMode::Require);
        match kind {
            Kind::X509 => options.certificates(self.path("client")).hostname(NAME),
            Kind::PreSharedKey => options.pre_shared_keys(self.path("keys")).user("alice"),
        }
    }

    fn connector(&self, peer: &Peer, kind: Kind) -> Connector {
        peer.connector().tls(self.options(kind))
    }
}

/// A server without TLS.
async fn plain(contents: &[u8]) -> Peer {
    nbdkit(&["file", "{directory}/disk"], contents).await
}
