//! A real S3 store: one for all tests of this program.
//!
//! It is SeaweedFS on loopback, which `cargo xtask peers` lays in `target/seaweedfs`, unless
//! `NBD_TEST_STORE` is the address of another one with a bucket `bucket`, for which
//! `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` are right. `cargo xtask soak --only ceph` gives
//! that of a Ceph.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::PROGRAM;
use super::seaweedfs::{PATIENCE, answers, arguments, free_ports, make_bucket, s3, sockets};

const KEY_ID: &str = "AKIATESTKEY";
const SECRET: &str = "s3cr3t of the tests";
/// The user without rights, for tests that root runs.
const NOBODY: u32 = 65534;

/// Runs the store until the test program is gone, however it ends: then its standard input ends.
const KEEPER: &str = r#"
"$@" </dev/null >log 2>&1 &
store=$!
cat >/dev/null
kill -KILL $store
wait $store 2>/dev/null
rm -rf "$PWD" $SOCKETS
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
        let ports = free_ports::<8>().expect("ports");
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "sh"]).arg(for_anyone(program, &directory));
        command.args(arguments(&directory, &ports)).current_dir(&directory);
        // Signals of the terminal are for the tests.
        command
            .env("HOME", &directory)
            .env("SOCKETS", sockets(&ports).join(" "))
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
        wait_until_ready(&mut keeper, &directory, &ports)?;
        let endpoint = format!("http://127.0.0.1:{}", s3(&ports));
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

/// Waits until the store has a bucket, and answers.
fn wait_until_ready(keeper: &mut Child, directory: &Path, ports: &[u16]) -> Result<(), String> {
    let (start, mut is_made) = (Instant::now(), false);
    loop {
        // A store that has one is of another program.
        is_made = is_made || make_bucket(ports).is_ok_and(|it| it == "201");
        if is_made && answers(ports) {
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
