//! The examples of the crate `nbd-jobs`, against a running server.

use std::future::Future;

use crate::support::{Server, nbd_cli};

#[allow(dead_code, reason = "its main function is not called")]
#[path = "../../jobs/examples/copy.rs"]
mod copy;

#[allow(dead_code, reason = "its main function is not called")]
#[path = "../../jobs/examples/backup.rs"]
mod backup;

#[allow(dead_code, reason = "its main function is not called")]
#[path = "../../jobs/examples/control_socket.rs"]
mod control_socket;

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("a runtime").block_on(work)
}

fn run_copy(from: &str, to: &str) {
    let arguments = [from, to].map(ToOwned::to_owned);
    block_on(copy::run(arguments.into_iter())).expect("it is copied");
}

#[test]
fn copy_example_copies_to_a_server_and_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let (disk, back) = (directory.path().join("disk.img"), directory.path().join("back.img"));
    let content: Vec<u8> = (0..1_000_000_u32).map(|at| (at / 512 % 251) as u8).collect();
    std::fs::write(&disk, &content).expect("a disk");
    let server = Server::ours(&["memory:1000000"]);
    run_copy(disk.to_str().expect("a plain name"), server.uri());
    run_copy(server.uri(), back.to_str().expect("a plain name"));
    assert!(std::fs::read(&back).expect("the copy") == content);
    assert_eq!(
        directory.path().read_dir().expect("the directory").count(),
        2,
        "nothing else is left"
    );
}

fn run_backup(arguments: &[&str]) {
    let arguments: Vec<_> = arguments.iter().map(|&word| word.to_owned()).collect();
    block_on(backup::run(arguments.into_iter())).expect("it is backed up");
}

#[test]
fn backup_example_makes_a_full_and_an_incremental_backup_of_a_disk_in_use() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| {
        directory.path().join(name).into_os_string().into_string().expect("a plain name")
    };
    let (disk, control) = (path("disk.qcow2"), path("control"));
    nbd_cli(&["image", "create", "-f", "qcow2", &disk, "8M"]).success();
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let write = |byte: u8, length: usize| {
        std::fs::write(path("new.img"), vec![byte; length]).expect("a file");
        nbd_cli(&["copy", &path("new.img"), server.uri()]).success();
    };
    write(1, 2 << 20);
    run_backup(&[&control, "vm", &path("full.qcow2")]);
    write(2, 1 << 20);
    run_backup(&[&control, "vm", &path("next.qcow2"), &path("full.qcow2")]);
    write(3, 8 << 20);
    for (backup, ones_and_twos) in [("full.qcow2", [2 << 20, 0]), ("next.qcow2", [1 << 20; 2])] {
        nbd_cli(&["restore", &path(backup), &path("restored.img")]).success();
        let restored = std::fs::read(path("restored.img")).expect("the disk");
        let count = |wanted: u8| restored.iter().filter(|byte| **byte == wanted).count();
        assert_eq!([count(1), count(2)], ones_and_twos, "{backup}");
        assert_eq!((restored.len(), count(3)), (8 << 20, 0), "{backup}");
        std::fs::remove_file(path("restored.img")).expect("it is there");
    }
    let left = directory.path().read_dir().expect("the directory").flatten();
    let names: Vec<_> = left.map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.contains("partial")), "{names:?}");
}

#[test]
fn control_socket_example_lets_backup_and_control_work_on_a_server_of_ones_own() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| {
        directory.path().join(name).into_os_string().into_string().expect("a plain name")
    };
    let (disk, socket, control) = (path("disk.qcow2"), path("socket"), path("control"));
    nbd_cli(&["image", "create", "-f", "qcow2", &disk, "8M"]).success();
    let arguments = [disk, socket.clone(), control.clone()];
    let server = std::thread::spawn(move || {
        block_on(control_socket::run(arguments.into_iter())).map_err(|error| error.to_string())
    });
    let started = std::time::Instant::now();
    while !std::path::Path::new(&control).exists() && !server.is_finished() {
        assert!(started.elapsed() < std::time::Duration::from_secs(30), "it does not start");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    std::fs::write(path("new.img"), vec![5; 1 << 20]).expect("a file");
    nbd_cli(&["copy", &path("new.img"), &format!("nbd+unix:///disk?socket={socket}")]).success();
    let backup = ["backup", "--control", &control, "--export", "disk", "--bitmap", "daily"];
    nbd_cli(&[&backup[..], &[&path("full.qcow2")]].concat()).success();
    let listed = nbd_cli(&["control", &control, "list"]).success();
    assert!(listed.contains("daily"), "{listed}");
    nbd_cli(&["restore", &path("full.qcow2"), &path("restored.img")]).success();
    let restored = std::fs::read(path("restored.img")).expect("the disk");
    assert_eq!(restored.iter().filter(|byte| **byte == 5).count(), 1 << 20);
    nbd_cli(&["control", &control, "shutdown"]).success();
    server.join().expect("no panic").expect("it ends cleanly");
    assert!(!std::path::Path::new(&control).exists(), "the socket is removed");
}
