//! Peers and images for the tests.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nbd_client::Connector;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

/// How long a peer may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server program that listens on a unix socket and is killed with this value.
pub(crate) struct Peer {
    directory: TempDir,
    child: Option<Child>,
    /// With which arguments to start it again.
    command: (PathBuf, Vec<String>),
}

/// True if a program can be found. Without it the caller prints that and skips its test, but
/// fails where CI is set.
pub(crate) fn have(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).is_file());
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{program} is not installed");
        #[allow(clippy::print_stdout, reason = "a test says why it did nothing")]
        {
            println!("skipped: {program} is not installed");
        }
    }
    found
}

impl Peer {
    /// Starts a program whose arguments may contain `{socket}` and `{directory}`.
    pub(crate) async fn start(
        program: &str,
        arguments: &[&str],
        prepare: impl FnOnce(&Path),
    ) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        prepare(directory.path());
        let socket = directory.path().join("s");
        let fill = |argument: &&str| {
            argument
                .replace("{socket}", &socket.to_string_lossy())
                .replace("{directory}", &directory.path().to_string_lossy())
        };
        let arguments = arguments.iter().map(fill).collect();
        let program = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
            .map(|directory| Path::new(directory).join(program))
            .into_iter()
            .find(|path| path.is_file())
            .unwrap_or_else(|| program.into());
        let mut peer = Self { directory, child: None, command: (program, arguments) };
        peer.restart().await;
        peer
    }

    /// Starts the program again on the same socket and waits until it listens.
    pub(crate) async fn restart(&mut self) {
        self.stop().await;
        drop(std::fs::remove_file(self.socket()));
        let (program, arguments) = &self.command;
        let child = Command::new(program)
            .args(arguments.iter().map(OsStr::new))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("the program was found");
        self.child = Some(child);
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(self.socket()).await.is_err() {
            assert!(Instant::now() < deadline, "{program:?} {arguments:?} does not listen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Kills the program, as a crash would.
    pub(crate) async fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill().await);
        }
        self.kill_background();
    }

    /// Some programs leave for the background; those write their process id into `{directory}/pid`.
    fn kill_background(&self) {
        let path = self.directory.path().join("pid");
        if let Ok(pid) = std::fs::read_to_string(&path) {
            drop(std::process::Command::new("kill").arg(pid.trim()).status());
            drop(std::fs::remove_file(path));
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A connector to the default export.
    pub(crate) fn connector(&self) -> Connector {
        self.connector_to("")
    }

    /// A connector to an export.
    pub(crate) fn connector_to(&self, export: &str) -> Connector {
        let uri = format!("nbd+unix:///{export}?socket={}", self.socket().display());
        uri.parse().expect("a URI")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill_background();
    }
}

/// `qemu-nbd` with a raw image `disk` of the given contents.
pub(crate) async fn qemu_nbd(options: &[&str], contents: &[u8]) -> Peer {
    let base = ["-f", "raw", "-t", "-e", "8", "-k", "{socket}"];
    let arguments: Vec<&str> =
        base.iter().chain(options).copied().chain(["{directory}/disk"]).collect();
    let contents = contents.to_vec();
    Peer::start("qemu-nbd", &arguments, move |directory| write_disk(directory, &contents)).await
}

/// `nbdkit` with a plugin and its parameters; a file `disk` is there for the file plugin.
pub(crate) async fn nbdkit(options: &[&str], contents: &[u8]) -> Peer {
    let base = ["-f", "-U", "{socket}"];
    let arguments: Vec<&str> = base.iter().chain(options).copied().collect();
    let contents = contents.to_vec();
    Peer::start("nbdkit", &arguments, move |directory| write_disk(directory, &contents)).await
}

fn write_disk(directory: &Path, contents: &[u8]) {
    std::fs::write(directory.join("disk"), contents).expect("room in the temporary directory");
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64 / 8).flat_map(|index| (index * 8).to_be_bytes()).collect()
}

/// `length` bytes at `offset`.
pub(crate) fn span(offset: u64, length: impl TryInto<u64>) -> std::ops::Range<u64> {
    let Ok(length) = length.try_into() else { panic!("a length") };
    offset..offset + length
}
