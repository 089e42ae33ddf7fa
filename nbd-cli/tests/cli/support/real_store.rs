//! A real S3 store: one for all tests of this program.
//!
//! It is SeaweedFS on loopback, which `cargo xtask peers` lays in `target/seaweedfs`, unless
//! `NBD_TEST_STORE` is the address of another one with a bucket `bucket`, for which
//! `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` are right. `cargo xtask soak --only ceph` gives
//! that of a Ceph.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::PROGRAM;

const KEY_ID: &str = "AKIATESTKEY";
const SECRET: &str = "s3cr3t of the tests";
/// How long the store may take to start.
const PATIENCE: Duration = Duration::from_secs(30);
/// The user without rights, for tests that root runs.
const NOBODY: u32 = 65534;

/// Runs the store until the test program is gone, however it ends: then its standard input ends.
const KEEPER: &str = r#"
"$@" </dev/null >log 2>&1 &
store=$!
cat >/dev/null
kill -KILL $store
wait $store 2>/dev/null
rm -rf "$PWD"
for port in $PORTS; do rm -f /tmp/seaweedfs-*-"$port".sock; done
"#;

/// A running store with a bucket `bucket`.
#[derive(Debug)]
pub(crate) struct RealStore {
    endpoint: String,
    key_id: String,
    secret: String,
    /// Its end is the end of a store that was started here.
    _keeper: Option<ChildStdin>,
}

impl RealStore {
    /// The store of this test program, which the first test starts. Without it a test cannot judge
    /// anything: it says so and passes.
    pub(crate) fn of_all_tests() -> Option<&'static Self> {
        static STORE: OnceLock<Option<Result<RealStore, String>>> = OnceLock::new();
        let store = STORE.get_or_init(|| {
            if let Some(given) = Self::given() {
                return Some(Ok(given));
            }
            let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
            let program = target.join("seaweedfs/bin/weed");
            // Another program may take a port in the meantime.
            let start = || Self::start(&program).or_else(|_| Self::start(&program));
            program.is_file().then(start)
        });
        if store.is_none() {
            eprintln!("skipped: SeaweedFS is missing; `cargo xtask peers` installs it");
        }
        store.as_ref().map(|store| store.as_ref().unwrap_or_else(|log| panic!("no store: {log}")))
    }

    /// The store that the environment names.
    fn given() -> Option<Self> {
        let endpoint = std::env::var("NBD_TEST_STORE").ok()?;
        let [key_id, secret] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
            .map(|name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set")));
        Some(Self { endpoint, key_id, secret, _keeper: None })
    }

    /// Starts a store, or returns what it said instead.
    fn start(program: &Path) -> Result<Self, String> {
        let directory =
            tempfile::Builder::new().prefix("seaweedfs").tempdir().expect("a directory");
        let directory = directory.keep();
        let ports = free_ports();
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "sh"]).arg(for_anyone(program, &directory));
        command.args(arguments(&directory, ports)).current_dir(&directory);
        // Signals of the terminal are for the tests.
        command
            .env("HOME", &directory)
            .env("PORTS", ports.map(|port| port.to_string()).join(" "))
            .process_group(0)
            .stdin(Stdio::piped());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&directory, Some(NOBODY), Some(NOBODY)).expect("root");
            command.uid(NOBODY).gid(NOBODY);
        }
        let identities = format!(
            r#"{{"identities":[{{"name":"tests","actions":["Admin"],
                "credentials":[{{"accessKey":"{KEY_ID}","secretKey":"{SECRET}"}}]}}]}}"#
        );
        std::fs::write(directory.join("s3.json"), identities).expect("it is written");
        let mut keeper = command.stdout(Stdio::null()).spawn().expect("a shell");
        let stdin = keeper.stdin.take().expect("its input");
        wait_until_ready(&mut keeper, &directory, ports)?;
        let endpoint = format!("http://127.0.0.1:{}", ports[6]);
        let (key_id, secret) = (KEY_ID.to_owned(), SECRET.to_owned());
        Ok(Self { endpoint, key_id, secret, _keeper: Some(stdin) })
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The program, with the address and the keys of the store, and a cache in `home`.
    pub(crate) fn command(&self, home: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.env_remove("AWS_PROFILE").env("AWS_ENDPOINT_URL", self.endpoint());
        command.env("AWS_ACCESS_KEY_ID", &self.key_id).env("AWS_SECRET_ACCESS_KEY", &self.secret);
        command.env("HOME", home).env("CACHE_DIRECTORY", home).env("XDG_STATE_HOME", home);
        command
    }
}

/// The program where another user can run it: directories of this user may be closed to others.
fn for_anyone(program: &Path, directory: &Path) -> PathBuf {
    if !rustix::process::geteuid().is_root() {
        return program.to_owned();
    }
    std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)).expect("a directory");
    let linked = directory.join("weed");
    if std::fs::hard_link(program, &linked).is_err() {
        std::fs::copy(program, &linked).expect("room");
    }
    linked
}

fn free_ports() -> [u16; 8] {
    let listeners = [(); 8].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    listeners.map(|listener| listener.local_addr().expect("an address").port())
}

fn arguments(directory: &Path, ports: [u16; 8]) -> Vec<String> {
    let directory = directory.display();
    let mut arguments = vec![
        "-logtostderr".to_owned(),
        "server".to_owned(),
        format!("-dir={directory}"),
        format!("-filer.localSocket={directory}/filer"),
        format!("-s3.localSocket={directory}/s3"),
        format!("-s3.config={directory}/s3.json"),
    ];
    let names = ["master.port", "volume.port", "filer.port", "s3.port"]
        .map(|name| [name.to_owned(), name.to_owned() + ".grpc"]);
    let names = names.iter().flatten();
    arguments.extend(names.zip(ports).map(|(name, port)| format!("-{name}={port}")));
    let others = [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=1024",
        // A few MiB are accepted even on a disk that is nearly full.
        "-volume.minFreeSpace=0",
    ];
    arguments.extend(others.map(str::to_owned));
    arguments
}

/// Waits until the store has a bucket, and answers.
fn wait_until_ready(keeper: &mut Child, directory: &Path, ports: [u16; 8]) -> Result<(), String> {
    let (start, mut has_bucket) = (Instant::now(), false);
    loop {
        has_bucket =
            has_bucket || ask(ports[4], "POST /buckets/bucket/").is_ok_and(|it| it == "201");
        if has_bucket && ask(ports[6], "GET /").is_ok_and(|it| it.starts_with(['2', '4'])) {
            return Ok(());
        }
        // The keeper removes the directory when the store is to end, and never before.
        let log = std::fs::read_to_string(directory.join("log")).unwrap_or_default();
        let has_ended = keeper.try_wait().expect("a child").is_some();
        if has_ended || log.contains("address already in use") || start.elapsed() > PATIENCE {
            return Err(log);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The status of a reply.
fn ask(port: u16, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "{request} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(String::from_utf8_lossy(&head[9..]).into_owned())
}
