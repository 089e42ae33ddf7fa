//! A store, a program, and what happens between them.

mod cases;
mod judge;
mod live;
#[path = "../support/random.rs"]
mod random;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use nbd_objects::testing::{Contents, Fault, TestStore};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

pub(crate) use cases::is_thorough;
pub(crate) use judge::{judge, seed};
pub(crate) use random::noise;

/// Where the repository is.
pub(crate) const REPOSITORY: &str = "s3://bucket/repo";

/// What happens when a certain request arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The program is killed before the request has its effect.
    KilledBefore,
    /// The program is killed when the request has had its effect.
    KilledAfter,
    /// From this request on, the connection is lost.
    LostBefore,
    /// The request has its effect, and from its reply on the connection is lost.
    LostAfter,
    /// The request meets this fault, and those after it none.
    Once(Fault),
    /// This request and all after it meet this fault.
    Always(Fault),
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("text on standard output"),
            stderr: String::from_utf8(output.stderr).expect("text on standard error"),
        }
    }

    pub(crate) fn is_success(&self) -> bool {
        self.code == Some(0)
    }

    #[track_caller]
    pub(crate) fn success(self) -> String {
        assert!(self.is_success(), "{self:?}");
        self.stdout
    }

    /// Checks that it succeeded, or failed with one sentence for its user.
    #[track_caller]
    pub(crate) fn assert_is_clear(&self, context: &str) {
        if self.is_success() {
            return;
        }
        assert_eq!(self.code, Some(1), "{context}: {self:?}");
        let is_sentence = self.stderr.starts_with("nbd-cli: ")
            && self.stderr.lines().count() == 1
            && self.stderr.len() < 500;
        assert!(is_sentence, "{context}: {self:?}");
        for jargon in ["os error", "panicked", "Error {", "Some(", "hyper"] {
            assert!(!self.stderr.contains(jargon), "{context}: '{jargon}' in {self:?}");
        }
    }
}

/// A store with these objects, and a directory of its own for caches and records.
pub(crate) struct Scene {
    pub(crate) store: TestStore,
    directory: tempfile::TempDir,
    passphrase: Option<PathBuf>,
}

impl Scene {
    pub(crate) fn new(contents: &Contents, passphrase: Option<&Path>) -> Self {
        let store = TestStore::start().expect("a port");
        store.set_contents(contents);
        let directory = tempfile::tempdir().expect("a directory");
        Self { store, directory, passphrase: passphrase.map(Path::to_owned) }
    }

    /// A path in its directory.
    pub(crate) fn beside(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        path.to_str().expect("a temporary directory with a plain name").to_owned()
    }

    pub(crate) fn command<S: AsRef<str>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-cli"));
        let here = self.beside("");
        let here = here.trim_end_matches('/');
        command.args(arguments.iter().map(|it| it.as_ref().replace("{here}", here)));
        command.env_remove("AWS_PROFILE");
        command.env("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEKEY").env("AWS_SECRET_ACCESS_KEY", "s3cr3t");
        command.env("AWS_ENDPOINT_URL", self.store.endpoint()).env_remove("RUST_BACKTRACE");
        command.env("CACHE_DIRECTORY", self.beside("cache")).env("HOME", self.beside("home"));
        command.env("XDG_STATE_HOME", self.beside("state"));
        match &self.passphrase {
            Some(file) => command.env("NBD_PASSPHRASE_FILE", file),
            None => command.env_remove("NBD_PASSPHRASE_FILE"),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the program to its end, on a store without faults.
    #[track_caller]
    pub(crate) fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Outcome {
        self.store.fail(|_| Fault::None);
        Outcome::of(self.command(arguments).output().expect("the program"))
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.run(arguments).success();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The number of requests of a run on a store without faults.
    pub(crate) fn count<S: AsRef<str>>(&self, arguments: &[S]) -> usize {
        self.store.take_seen();
        self.run(arguments).success();
        self.store.take_seen().len()
    }

    /// Runs the program, whose `point`-th request, from 0, meets its fate. Returns how it ended and
    /// whether it came to that request.
    pub(crate) fn run_until<S: AsRef<str>>(
        &self,
        arguments: &[S],
        point: usize,
        fate: Fate,
    ) -> (Outcome, bool) {
        let (count, victim) = (Arc::new(AtomicUsize::new(0)), Arc::new(Victim::default()));
        let (counter, killer) = (Arc::clone(&count), Arc::clone(&victim));
        self.store.fail(move |_| {
            let number = counter.fetch_add(1, Ordering::SeqCst);
            match (number.cmp(&point), fate) {
                (std::cmp::Ordering::Less, _) | (std::cmp::Ordering::Greater, Fate::Once(_)) => {
                    Fault::None
                }
                (_, Fate::Once(fault) | Fate::Always(fault)) => fault,
                (std::cmp::Ordering::Equal, Fate::LostAfter) => Fault::ReplyLost,
                (_, Fate::LostBefore | Fate::LostAfter) => Fault::Dropped,
                (order, Fate::KilledBefore | Fate::KilledAfter) => {
                    killer.kill();
                    let acts = fate == Fate::KilledAfter && order.is_eq();
                    if acts { Fault::ReplyLost } else { Fault::Dropped }
                }
            }
        });
        let mut command = self.command(arguments);
        if !matches!(fate, Fate::KilledBefore | Fate::KilledAfter) {
            command.args(["--store-timeout", "900ms"]);
        }
        let child = command.spawn().expect("the program");
        victim.set(&child);
        let outcome = Outcome::of(child.wait_with_output().expect("its output"));
        (outcome, count.load(Ordering::SeqCst) > point)
    }
}

/// A program that may be killed before the test has taken notice of it. The handle is of this
/// program, even if its number is another's by then.
#[derive(Default)]
struct Victim {
    handle: Mutex<Option<OwnedFd>>,
    is_there: Condvar,
}

impl Victim {
    fn set(&self, child: &Child) {
        let handle = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).expect("a handle");
        *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
        self.is_there.notify_all();
    }

    fn kill(&self) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = self.is_there.wait_while(handle, |it| it.is_none());
        if let Some(handle) = &*handle.unwrap_or_else(PoisonError::into_inner) {
            // It may have ended.
            let _ = pidfd_send_signal(handle, Signal::KILL);
        }
    }
}
