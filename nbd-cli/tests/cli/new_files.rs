//! New files are renamed when they are complete, however a command ends.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, PROGRAM, Server, in_foreground, nbd_cli, peer, run, says};
use crate::tools;

/// A server whose disk takes long to be read.
fn slow_server(nbdkit: &Path) -> Server {
    Server::nbdkit(nbdkit, &["--filter=delay", "pattern", "64M", "rdelay=3600"])
}

fn start(arguments: &[&str]) -> Child {
    let mut command = in_foreground();
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("nbd-cli")
}

/// Sends a signal when the command is at work on a file; returns how it ended and what it said.
fn interrupted(mut child: Child, partial: &str, signal: Signal) -> (Option<i32>, String) {
    wait_until("the command is at work", || Path::new(partial).exists());
    kill_process(Pid::from_child(&child), signal).expect("it runs");
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    (child.wait().expect("a child").code(), said)
}

fn names(directory: &Disk) -> Vec<String> {
    let directory = fs::read_dir(Path::new(directory.path()).parent().expect("a directory"));
    let name = |entry: std::io::Result<fs::DirEntry>| {
        entry.expect("an entry").file_name().into_string().expect("text")
    };
    let mut names: Vec<_> = directory.expect("a directory").map(name).collect();
    names.sort();
    names
}

#[test]
fn an_interrupted_command_leaves_nothing_of_a_new_file() {
    tools!(nbdkit = "nbdkit");
    let commands: [(&[&str], &str); 6] = [
        (&["copy", "URI", "TARGET"], "new.img"),
        (&["image", "convert", "-O", "raw", "URI", "TARGET"], "new.img"),
        (&["image", "convert", "-O", "qcow2", "URI", "TARGET"], "new.qcow2"),
        (&["restore", "--trust-image", "OVERLAY", "TARGET"], "new.img"),
        (&["restore", "--trust-image", "-O", "qcow2", "OVERLAY", "TARGET"], "new.qcow2"),
        (&["image", "create", "--preallocation", "full", "TARGET", "4G"], "new.img"),
    ];
    let cases = [Signal::INT, Signal::TERM, Signal::HUP].into_iter();
    for (signal, (command, target)) in
        cases.flat_map(|signal| commands.iter().map(move |command| (signal, *command)))
    {
        let directory = Disk::sparse();
        // nbdkit may abort when a client leaves it in the middle of a request.
        let server = slow_server(&nbdkit);
        let (target, overlay) = (directory.beside(target), directory.beside("overlay.qcow2"));
        let create = ["image", "create", "-f", "qcow2", "-F", "raw", "-b", server.uri(), &overlay];
        nbd_cli(&create).success();
        let word = |word: &&str| match *word {
            "URI" => server.uri().to_owned(),
            "TARGET" => target.clone(),
            "OVERLAY" => overlay.clone(),
            other => other.to_owned(),
        };
        let words: Vec<String> = command.iter().map(word).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (code, said) = interrupted(start(&words), &format!("{target}.partial"), signal);
        assert_eq!(code, Some(128 + signal.as_raw()), "{command:?}: {said}");
        assert_eq!(names(&directory), ["disk.img", "overlay.qcow2"], "{command:?}");
        for part in [&target, "interrupted by SIG"] {
            assert!(said.contains(part), "{command:?}: {said}");
        }
    }
}

/// A command that keeps no rate moves the disks of these tests in this time.
const LONG_ENOUGH: Duration = Duration::from_millis(500);

/// At one byte per second a disk takes years: what moves more is done before the signal comes.
#[test]
fn a_command_with_a_rate_moves_no_more_and_can_be_interrupted() {
    let directory = Disk::sparse();
    let (source, overlay) = (directory.beside("source.img"), directory.beside("overlay.qcow2"));
    fs::write(&source, vec![7; 8 << 20]).expect("a file");
    let create = ["image", "create", "-f", "qcow2", "-F", "raw", "-b", &source, &overlay];
    nbd_cli(&create).success();
    let server = Server::ours(&["--read-only", &source]);
    let backup_source = server.uri();
    for (command, target) in [
        (&["copy", &source][..], "new.img"),
        (&["image", "convert", "-O", "qcow2", &source], "new.qcow2"),
        (&["restore", "-O", "qcow2", &overlay], "new.qcow2"),
        (&["backup", backup_source], "new.qcow2"),
    ] {
        let target = directory.beside(target);
        let partial = format!("{target}.partial");
        let child = start(&[command, &["--rate", "1", &target]].concat());
        wait_until("the command is at work", || Path::new(&partial).exists());
        std::thread::sleep(LONG_ENOUGH);
        let (code, said) = interrupted(child, &partial, Signal::INT);
        assert_eq!(code, Some(128 + Signal::INT.as_raw()), "{command:?}: {said}");
        assert!(!Path::new(&target).exists(), "{command:?}");
        // An interrupted backup can be resumed.
        for left in [".partial", ".partial.json"] {
            let _ = fs::remove_file(format!("{target}{left}"));
        }
        nbd_cli(&[command, &["--rate", "1G", &target]].concat()).success();
        fs::remove_file(&target).expect("the copy");
    }
    let (base, overlay) = (directory.beside("base.img"), directory.beside("full.qcow2"));
    fs::write(&base, vec![0; 8 << 20]).expect("a file");
    nbd_cli(&["image", "create", "-f", "qcow2", "-F", "raw", "-b", &base, &overlay]).success();
    nbd_cli(&["image", "convert", "-U", "-n", "-O", "qcow2", &source, &overlay]).success();
    let child = start(&["image", "commit", "--rate", "1", &overlay]);
    wait_until("the commit is at work", || fs::read(&base).expect("the base")[0] == 7);
    std::thread::sleep(LONG_ENOUGH);
    let (code, said) = interrupted(child, &base, Signal::INT);
    assert_eq!(code, Some(128 + Signal::INT.as_raw()), "{said}");
    assert_eq!(fs::read(&base).expect("the base").last(), Some(&0));
    nbd_cli(&["image", "commit", "--rate", "1G", &overlay]).success();
    assert!(fs::read(&base).expect("the base") == fs::read(&source).expect("the source"));
    let refused = nbd_cli(&["copy", &source, "--rate", "0", "null:"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("no limit"), "{refused:?}");
}

#[test]
fn a_killed_command_leaves_only_the_temporary_name() {
    tools!(nbdkit = "nbdkit");
    for command in [&["copy"][..], &["image", "convert", "-O", "qcow2"]] {
        let directory = Disk::sparse();
        let server = slow_server(&nbdkit);
        let (new, partial) = (directory.beside("new"), directory.beside("new.partial"));
        let child = start(&[command, &[server.uri(), &new]].concat());
        interrupted(child, &partial, Signal::KILL);
        assert_eq!(names(&directory), ["disk.img", "new.partial"]);
        // What is left may be of use to somebody: it is not overwritten, and the way on is said.
        says(
            nbd_cli(&[command, &[directory.path(), &new]].concat()),
            &["new.partial", "remove it"],
        );
        fs::remove_file(&partial).expect("what is left");
        nbd_cli(&[command, &[directory.path(), &new]].concat()).success();
        assert_eq!(names(&directory), ["disk.img", "new"]);
    }
}

#[test]
fn the_disk_that_was_there_stays_until_the_copy_is_complete() {
    tools!(nbdkit = "nbdkit");
    for signal in [Signal::TERM, Signal::KILL] {
        let directory = Disk::sparse();
        let old = directory.beside("old.img");
        fs::write(&old, "what was there").expect("room");
        fs::set_permissions(&old, fs::Permissions::from_mode(0o640)).expect("its owner");
        let server = slow_server(&nbdkit);
        let child = start(&["copy", server.uri(), &old]);
        let (_, said) = interrupted(child, &directory.beside("old.img.partial"), signal);
        assert_eq!(fs::read(&old).expect("the file"), b"what was there");
        assert!(signal == Signal::KILL || said.contains("as it was before"), "{said}");
        let _ = fs::remove_file(directory.beside("old.img.partial"));
        nbd_cli(&["copy", directory.path(), &old]).success();
        directory.assert_equals(&old);
        assert_eq!(fs::metadata(&old).expect("the file").mode() & 0o7777, 0o640);
        assert_eq!(names(&directory), ["disk.img", "old.img"]);
    }
}

#[test]
fn a_link_stays_a_link_and_a_second_name_keeps_its_file() {
    let directory = Disk::sparse();
    let (old, link, second) =
        (directory.beside("old.img"), directory.beside("link"), directory.beside("second"));
    fs::write(&old, "what was there").expect("room");
    std::os::unix::fs::symlink("old.img", &link).expect("a link");
    nbd_cli(&["copy", directory.path(), &link]).success();
    assert!(fs::symlink_metadata(&link).expect("the link").is_symlink());
    directory.assert_equals(&old);
    fs::write(&old, "again").expect("room");
    fs::hard_link(&old, &second).expect("a second name");
    nbd_cli(&["copy", directory.path(), &old]).success();
    directory.assert_equals(&second);
    assert_eq!(fs::metadata(&old).expect("a file").nlink(), 2);
    // A link that leads nowhere is nobody's file.
    let nowhere = directory.beside("nowhere");
    std::os::unix::fs::symlink("missing", &nowhere).expect("a link");
    for command in [&["copy"][..], &["image", "convert"], &["restore", "-f", "raw"]] {
        let said = nbd_cli(&[command, &[directory.path(), &nowhere]].concat());
        says(said, &["nowhere", "symbolic link"]);
    }
    assert!(!Path::new(&directory.beside("missing")).exists());
}

#[test]
fn a_file_in_a_directory_that_may_not_be_written_to_is_changed_in_place() {
    tools!(setpriv = "setpriv");
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root to become another user");
        return;
    }
    let directory = Disk::sparse();
    let old = directory.beside("old.img");
    fs::write(&old, "what was there").expect("room");
    let inner = Path::new(&old).parent().expect("a directory");
    fs::set_permissions(inner, fs::Permissions::from_mode(0o555)).expect("its owner");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o666)).expect("its owner");
    // Where tests are built may be closed to other users: they get the program as an open file.
    let program = fs::File::open(PROGRAM).expect("the program");
    let copy = format!("exec /proc/self/fd/0 copy {} {old}", directory.path());
    let mut command = Command::new(&setpriv);
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", &copy]);
    let output = command.stdin(program).output().expect("setpriv");
    assert!(output.status.success(), "{output:?}");
    directory.assert_equals(&old);
    fs::set_permissions(inner, fs::Permissions::from_mode(0o755)).expect("its owner");
    assert_eq!(names(&directory), ["disk.img", "old.img"]);
}

#[test]
fn two_commands_that_make_the_same_file_do_not_mix() {
    tools!(nbdkit = "nbdkit");
    let directory = Disk::sparse();
    let (new, partial) = (directory.beside("new"), directory.beside("new.partial"));
    let server = slow_server(&nbdkit);
    let first = start(&["image", "convert", "-O", "qcow2", server.uri(), &new]);
    wait_until("the first is at work", || {
        nbd_cli(&["image", "info", &partial]).stderr.contains("in use")
            || Path::new(&partial).exists()
    });
    for command in [&["copy"][..], &["image", "convert"], &["restore", "-f", "raw"]] {
        says(nbd_cli(&[command, &[directory.path(), &new]].concat()), &["new", "new.partial"]);
    }
    interrupted(first, &partial, Signal::TERM);
    assert_eq!(names(&directory), ["disk.img"]);
}

#[test]
fn a_file_that_appears_meanwhile_is_kept_and_so_is_the_copy() {
    let directory = Disk::sparse();
    let (new, partial) = (directory.beside("new"), directory.beside("new.partial"));
    let mut command = Command::new(PROGRAM);
    command.args(["copy", "-", &new]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("nbd-cli");
    wait_until("the command is at work", || Path::new(&partial).exists());
    fs::write(&new, "somebody else's").expect("room");
    let mut input = child.stdin.take().expect("piped");
    std::io::Write::write_all(&mut input, directory.content()).expect("a reader");
    drop(input);
    let output = child.wait_with_output().expect("a child");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("new.partial") && said.contains("rename"), "{said}");
    assert_eq!(fs::read(&new).expect("the file"), b"somebody else's");
    directory.assert_equals(&partial);
}

#[test]
fn devices_and_pipes_are_never_replaced() {
    let directory = Disk::sparse();
    let pipe = directory.beside("pipe");
    run(Command::new("mkfifo").arg(&pipe)).success();
    for target in ["/dev/null", "/dev/stdout", &pipe] {
        for command in [
            &["image", "convert", directory.path(), target][..],
            &["restore", "-f", "raw", directory.path(), target],
            &["image", "create", target, "1M"],
            &["copy", directory.path(), target],
        ] {
            let said = nbd_cli(command).failure();
            assert!(said.contains(target) && !said.contains("remove"), "{command:?}: {said}");
        }
    }
    assert!(fs::metadata("/dev/null").expect("it is there").file_type().is_char_device());
    assert!(fs::metadata(&pipe).expect("it is there").file_type().is_fifo());
    assert_eq!(names(&directory), ["disk.img", "pipe"]);
}

#[test]
fn what_is_made_is_what_qemu_reads() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let new = directory.beside("new.qcow2");
    for command in [
        &["image", "convert", "-O", "qcow2"][..],
        &["image", "convert", "-O", "qcow2", "--flush"],
        &["restore", "-f", "raw", "-O", "qcow2", "--verify", "--quiet"],
    ] {
        nbd_cli(&[command, &[directory.path(), &new]].concat()).success();
        peer(&qemu_img, &["compare", "-f", "raw", "-F", "qcow2", directory.path(), &new]);
        assert_eq!(names(&directory), ["disk.img", "new.qcow2"]);
        fs::remove_file(&new).expect("the file");
    }
}
