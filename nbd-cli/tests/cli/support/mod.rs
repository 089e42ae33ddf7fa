//! Shared code of the tests: running programs, servers that end with the test, disks.

mod disk;
pub(crate) mod http;
pub(crate) mod image;
mod initramfs;
pub(crate) mod loop_device;
pub(crate) mod machine;
#[cfg(feature = "mount")]
pub(crate) mod mount;
pub(crate) mod qemu_img;
pub(crate) mod qemu_nbd;
#[path = "../../support/random.rs"]
pub(crate) mod random;
#[cfg(feature = "object-storage")]
pub(crate) mod real_store;
#[cfg(feature = "mount")]
pub(crate) mod recording;
#[cfg(feature = "object-storage")]
mod seaweedfs;
mod server;
pub(crate) mod service_manager;
pub(crate) mod tls;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

pub(crate) use disk::{Disk, is_sparse_here};
pub(crate) use server::Server;

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_nbd-cli");

/// What a program said and how it ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// The standard output of a run that must have succeeded.
    #[track_caller]
    pub(crate) fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// What a run that must have succeeded printed, as JSON.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        serde_json::from_str(&self.success()).expect("JSON")
    }

    /// The error of a run that must have failed with one sentence.
    #[track_caller]
    pub(crate) fn failure(self) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "one sentence is enough: {self:?}");
        assert!(self.stderr.starts_with("nbd-cli: "), "{self:?}");
        self.stderr
    }
}

/// Checks that a run failed with one sentence that contains all of these.
#[track_caller]
pub(crate) fn says(outcome: Outcome, parts: &[&str]) {
    let error = outcome.failure();
    for part in parts {
        assert!(error.contains(part), "'{part}' is missing in: {error}");
    }
}

/// Runs a program to its end.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("text on standard output"),
        stderr: String::from_utf8(output.stderr).expect("text on standard error"),
    }
}

/// Runs `nbd-cli`, which must succeed and print JSON.
#[cfg(feature = "object-storage")]
#[track_caller]
pub(crate) fn json(arguments: &[&str]) -> Value {
    nbd_cli(arguments).json()
}

/// Runs `nbd-cli`.
#[track_caller]
pub(crate) fn nbd_cli<S: AsRef<OsStr>>(arguments: &[S]) -> Outcome {
    run(Command::new(PROGRAM).args(arguments))
}

/// `nbd-cli` as a terminal starts it. What shells start in the background, a test program too,
/// inherits that SIGINT is ignored, and the program would leave it so.
pub(crate) fn in_foreground() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal=INT,QUIT,HUP", PROGRAM]);
    command
}

/// Finds a peer tool. If it is missing the test cannot judge anything: it says so and passes, but
/// fails where everything is expected to be installed.
pub(crate) fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "{name} is not installed");
        eprintln!("skipped: {name} is not installed");
    }
    found
}

/// Runs a peer tool that must succeed and returns its standard output.
#[track_caller]
pub(crate) fn peer<S: AsRef<OsStr>>(tool: &Path, arguments: &[S]) -> String {
    run(Command::new(tool).args(arguments)).success()
}

/// Finds tools or ends the test.
#[macro_export]
macro_rules! tools {
    ($($variable:ident = $name:literal),+) => {
        $(let Some($variable) = $crate::support::tool($name) else { return };)+
    };
}
