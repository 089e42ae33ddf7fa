//! The command blocks of README.md and of the documents in `docs/`, pasted into a shell.
//!
//! The `sh` blocks of a document run one after the other, as one script. A block marked `sh manual`
//! needs a network, a machine or an installation of its own and is not run.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use crate::support::{PROGRAM, nbd_cli, run};
use crate::tools;

/// Every document whose commands a test below runs, or one in `rbd.rs`.
const DOCUMENTS: [(&str, &str); 17] = [
    ("README.md", include_str!("../../../README.md")),
    ("docs/backup.md", include_str!("../../../docs/backup.md")),
    ("docs/backup-repository.md", include_str!("../../../docs/backup-repository.md")),
    ("docs/bench.md", include_str!("../../../docs/bench.md")),
    ("docs/ceph.md", include_str!("../../../docs/ceph.md")),
    ("docs/control.md", include_str!("../../../docs/control.md")),
    ("docs/copy.md", include_str!("../../../docs/copy.md")),
    ("docs/images.md", include_str!("../../../docs/images.md")),
    ("docs/inspect.md", include_str!("../../../docs/inspect.md")),
    ("docs/mount.md", include_str!("../../../docs/mount.md")),
    ("docs/nbdkit.md", include_str!("../../../docs/nbdkit.md")),
    ("docs/object-storage.md", include_str!("../../../docs/object-storage.md")),
    ("docs/qemu-img.md", include_str!("../../../docs/qemu-img.md")),
    ("docs/qemu-nbd.md", include_str!("../../../docs/qemu-nbd.md")),
    ("docs/restore.md", include_str!("../../../docs/restore.md")),
    ("docs/serve.md", include_str!("../../../docs/serve.md")),
    ("docs/tls.md", include_str!("../../../docs/tls.md")),
];

/// The `sh` blocks of a text, one after the other.
fn commands(text: &str) -> String {
    let blocks = text.split("\n```sh\n").skip(1);
    blocks.filter_map(|block| block.split("```").next()).collect()
}

/// Runs the commands of a document in a directory of its own; its `/tmp` is that directory too.
#[track_caller]
pub(crate) fn paste(document: &str) {
    paste_in(document, &[]);
}

/// Like [`paste`], with these environment variables.
#[track_caller]
fn paste_in(document: &str, environment: &[(&str, &str)]) {
    let (_, text) = DOCUMENTS.iter().find(|(name, _)| *name == document).expect("in the list");
    let script = commands(text);
    assert!(!script.is_empty(), "{document} has no commands");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_str().expect("a plain name");
    let script = script.replace("/tmp/", &format!("{path}/"));
    std::os::unix::fs::symlink(PROGRAM, directory.path().join("nbd-cli")).expect("a link");
    let paths = std::env::var("PATH").unwrap_or_default();
    // Every command counts, not only the last.
    let mut shell = Command::new("bash");
    shell.args(["-euc", &script]).current_dir(&directory).env("PATH", format!("{path}:{paths}"));
    shell.envs(environment.iter().copied());
    let outcome = run(&mut shell);
    end_servers(directory.path());
    assert_eq!(outcome.code, Some(0), "{document}: {script}\n{outcome:?}");
}

/// Ends the servers that a script left running when it failed.
fn end_servers(directory: &Path) {
    for entry in directory.read_dir().expect("the directory").flatten() {
        let file = entry.path();
        if file.extension() == Some(OsStr::new("control")) {
            nbd_cli(&[OsStr::new("control"), file.as_os_str(), OsStr::new("shutdown")]);
        }
        if file.extension() != Some(OsStr::new("pid")) || is_unlocked(&file) {
            continue;
        }
        let pid = std::fs::read_to_string(&file).unwrap_or_default();
        let pid = pid.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

/// Whether no server runs that holds the lock on its process id file: the id may be another
/// program's by now.
fn is_unlocked(file: &Path) -> bool {
    let file = std::fs::File::open(file).expect("the process id file");
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).is_ok()
}

#[test]
fn readme_commands_run() {
    paste("README.md");
}

#[test]
fn readme_commands_of_serving_run() {
    tools!(_img = "qemu-img", _io = "qemu-io", _nbdinfo = "nbdinfo", _nbdcopy = "nbdcopy");
    paste("docs/serve.md");
}

#[test]
fn readme_commands_of_tls_run() {
    paste("docs/tls.md");
}

#[test]
fn readme_commands_of_images_run() {
    paste("docs/images.md");
}

#[cfg(feature = "object-storage")]
#[test]
fn readme_commands_of_object_stores_run() {
    let store = nbd_objects::testing::TestStore::start().expect("a port");
    let cache = tempfile::tempdir().expect("a directory");
    let environment = [
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_ENDPOINT_URL", &store.endpoint()),
        ("CACHE_DIRECTORY", cache.path().to_str().expect("a plain name")),
    ];
    paste_in("docs/object-storage.md", &environment);
}

#[test]
fn readme_commands_of_backups_run() {
    paste("docs/backup.md");
}

#[test]
fn readme_commands_of_the_control_socket_run() {
    paste("docs/control.md");
}

#[test]
fn readme_commands_of_load_run() {
    paste("docs/bench.md");
}

#[cfg(feature = "mount")]
#[test]
fn readme_commands_of_mounts_run() {
    tools!(_mke2fs = "mke2fs");
    if crate::support::mount::can_mount() {
        paste("docs/mount.md");
    }
}

#[test]
fn readme_commands_of_qemu_img_run() {
    paste("docs/qemu-img.md");
}

#[test]
fn readme_commands_of_qemu_nbd_run() {
    paste("docs/qemu-nbd.md");
}

#[test]
fn readme_commands_of_inspecting_run() {
    paste("docs/inspect.md");
}

#[test]
fn readme_commands_of_copying_run() {
    paste("docs/copy.md");
}

#[cfg(feature = "object-storage")]
#[test]
fn readme_commands_of_repositories_run() {
    paste("docs/backup-repository.md");
}

#[test]
fn readme_commands_of_restoring_run() {
    paste("docs/restore.md");
}

#[test]
fn readme_commands_in_place_of_nbdkit_run() {
    paste("docs/nbdkit.md");
}

/// The table of guides leads to every document.
#[test]
fn readme_guides_are_complete() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let guides = std::fs::read_to_string(docs.join("guides.md")).expect("the guides");
    let left_out = ["guides.md", "control.md", "experiments.md"];
    for entry in docs.read_dir().expect("docs/") {
        let name = entry.expect("an entry").file_name().into_string().expect("a plain name");
        let is_listed = guides.contains(&format!("]({name})"));
        assert!(is_listed || left_out.contains(&name.as_str()), "guides.md has no link to {name}");
    }
}

#[test]
fn readme_documents_with_commands_are_all_run() {
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    for entry in documents.read_dir().expect("docs/") {
        let name = entry.expect("an entry").file_name().into_string().expect("a plain name");
        let text = std::fs::read_to_string(documents.join(&name)).expect("a document");
        let is_run = DOCUMENTS.iter().any(|(document, _)| *document == format!("docs/{name}"));
        assert!(is_run || commands(&text).is_empty(), "no test runs the commands of docs/{name}");
    }
}

#[test]
fn readme_is_short_and_opens_with_code() {
    let (_, text) = DOCUMENTS[0];
    let lines = text.lines().count();
    assert!(lines <= 120, "{lines} lines, more than 120: move details to docs/");
    let code = text.lines().position(|line| line == "```rust").expect("Rust code");
    assert!(code < lines / 2, "the Rust code begins at line {code}");
}
