//! Servers with TLS, and clients of peers with a selectable TLS version.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::{Disk, Outcome, PROGRAM, Server, run};

#[path = "../../../../nbd-server/tests/support/credentials.rs"]
#[allow(dead_code, unreachable_pub)]
pub(crate) mod credentials;

use credentials::{Authority, Maker, Role, Validity};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Directories with certificates: what an administrator hands out, and what others try.
#[derive(Debug)]
pub(crate) struct Certificates {
    root: TempDir,
    pub(crate) authority: Authority,
}

impl Certificates {
    /// `None`, with a word about it, if the tool is missing.
    pub(crate) fn make(maker: Maker) -> Option<Self> {
        super::tool(maker.program())?;
        let root = tempfile::tempdir().expect("a directory");
        let authority = Authority::new(maker, root.path(), "Test authority");
        let certificates = Self { root, authority };
        let good = certificates.path("good");
        certificates.authority.issue(Role::Server, "localhost", Validity::Now, &good);
        certificates.authority.issue(Role::Client, "alice", Validity::Now, &good);
        Some(certificates)
    }

    /// Certificates from whichever tool there is.
    pub(crate) fn any() -> Option<Self> {
        Maker::ALL.into_iter().find(|maker| maker.is_installed()).and_then(Self::make)
    }

    /// The directory with everything a server and a client need.
    pub(crate) fn good(&self) -> PathBuf {
        self.path("good")
    }

    /// A place beside it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A client of the authority whose certificate has expired.
    pub(crate) fn expired(&self) -> PathBuf {
        let directory = self.path("expired");
        self.authority.issue(Role::Client, "alice", Validity::Expired, &directory);
        directory
    }

    /// A client that another authority vouches for, which knows the right one.
    pub(crate) fn stranger(&self, maker: Maker) -> PathBuf {
        let directory = self.path("stranger");
        std::fs::create_dir(&directory).expect("a directory");
        let other = Authority::new(maker, &directory, "Another authority");
        other.issue(Role::Client, "alice", Validity::Now, &directory);
        std::fs::copy(self.path("ca-cert.pem"), directory.join("ca-cert.pem")).expect("a copy");
        directory
    }

    /// A client that has nothing to show.
    pub(crate) fn nobody(&self) -> PathBuf {
        let directory = self.path("nobody");
        std::fs::create_dir(&directory).expect("a directory");
        std::fs::copy(self.path("ca-cert.pem"), directory.join("ca-cert.pem")).expect("a copy");
        directory
    }
}

/// `nbd-cli serve` of a disk over TLS, with its log.
#[derive(Debug)]
pub(crate) struct TlsServer {
    pub(crate) server: Server,
    pub(crate) disk: Disk,
    log: PathBuf,
}

impl TlsServer {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let disk = Disk::sparse();
        let (log, socket) = (PathBuf::from(disk.beside("log")), disk.beside("socket"));
        let mut command = Command::new(PROGRAM);
        command.args(["-v", "serve", "--socket", &socket]).args(arguments).arg(disk.path());
        command.stderr(std::fs::File::create(&log).expect("a log"));
        Self { server: Server::start(&mut command, PathBuf::from(socket)), disk, log }
    }

    /// Waits for a line of the log with all of these.
    #[track_caller]
    pub(crate) fn expect_log(&self, parts: &[&str]) {
        let start = Instant::now();
        loop {
            let log = std::fs::read_to_string(&self.log).expect("a log");
            if log.lines().any(|line| parts.iter().all(|part| line.contains(part))) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "no line with {parts:?} in:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Has the credentials read again, and waits until they are.
    pub(crate) fn reload(&self, said: &str) {
        self.server.signal(Signal::HUP);
        self.expect_log(&[said]);
    }

    /// The URI for a client with the certificates of another directory.
    pub(crate) fn uri_with(&self, directory: &Path) -> String {
        format!(
            "nbds+unix:///?socket={}&tls-certificates={}&tls-hostname=localhost",
            self.server.socket().display(),
            directory.display()
        )
    }

    /// The URI for a user with a file of keys.
    pub(crate) fn uri_of_user(&self, user: &str, keys: &Path) -> String {
        let socket = self.server.socket().display();
        format!("nbds+unix://{user}@/?socket={socket}&tls-psk-file={}", keys.display())
    }
}

/// Versions that a client can be held to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Version {
    Tls1_2,
    Tls1_3,
}

impl Version {
    pub(crate) const ALL: [Self; 2] = [Self::Tls1_2, Self::Tls1_3];

    /// As the server's log has it.
    pub(crate) const fn in_log(self) -> &'static str {
        match self {
            Self::Tls1_2 => "TLSv1.2",
            Self::Tls1_3 => "TLSv1.3",
        }
    }

    /// GnuTLS's priority string.
    pub(crate) const fn priority(self) -> &'static str {
        match self {
            Self::Tls1_2 => "NORMAL:-VERS-TLS1.3",
            Self::Tls1_3 => "NORMAL:-VERS-ALL:+VERS-TLS1.3",
        }
    }

    /// Runs a GnuTLS program that cannot be told a priority: its system's settings are replaced.
    pub(crate) fn hold(self, disk: &Disk, command: &mut Command) -> Outcome {
        let settings = disk.beside("gnutls");
        // 1.3 is what they speak if nobody holds them back.
        let text = match self {
            Self::Tls1_2 => "[overrides]\ndisabled-version = tls1.3\n",
            Self::Tls1_3 => "",
        };
        std::fs::write(&settings, text).expect("settings");
        run(command.env("GNUTLS_SYSTEM_PRIORITY_FILE", settings).stdin(Stdio::null()))
    }
}

/// Compares what the server serves with its disk, by qemu-img. `credentials` are the properties of
/// the TLS object that follow its id.
pub(crate) fn compare_by_qemu_img(
    qemu_img: &Path,
    server: &TlsServer,
    credentials: &str,
    image: &str,
) -> Outcome {
    let kind = if credentials.contains("username") { "tls-creds-psk" } else { "tls-creds-x509" };
    let object = format!("{kind},id=t,endpoint=client,{credentials}");
    let socket = server.server.socket().display();
    let source = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket},\
         file.tls-creds=t{image}"
    );
    let copy = server.disk.beside("qemu-copy.img");
    let arguments = ["convert", "--object", &object, "--image-opts", &source, "-O", "raw", &copy];
    let outcome = run(Command::new(qemu_img).args(arguments));
    if outcome.code == Some(0) {
        server.disk.assert_equals(copy);
    }
    outcome
}
