//! A server is killed while a bitmap records changes: the next server and QEMU have all of them.

use rustix::process::Signal;

use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer, says};
use crate::tools;

/// What qemu-img says of the bitmap that is in use.
const IN_USE: &str = "in-use";

#[test]
fn changes_noted_by_a_server_that_was_killed_are_there_for_qemu() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", nbdinfo = "nbdinfo");
    for durability in ["process", "power"] {
        let disk = Disk::sparse();
        let image = disk.blank("disk.qcow2", 0);
        let sidecar = format!("{image}.dirty");
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
        peer(&qemu_img, &["bitmap", "--add", &image, "backup"]);
        let write = |uri: &str, place: &str| {
            let command = format!("write -P 7 {place} 64k");
            peer(&qemu_io, &["-f", "raw", "-c", &command, "-c", "flush", uri]);
        };
        let arguments = ["--format", "qcow2", "--bitmap-durability", durability, &image];

        let mut server = Server::ours(&arguments);
        write(server.uri(), "1M");
        server.signal(Signal::KILL);
        server.wait();
        let info = peer(&qemu_img, &["info", &image]);
        assert!(info.contains(IN_USE) && std::path::Path::new(&sidecar).exists(), "{info}");

        let server = Server::ours(&arguments);
        write(server.uri(), "5M");
        server.end();
        let info = peer(&qemu_img, &["info", &image]);
        assert!(!info.contains(IN_USE) && !std::path::Path::new(&sidecar).exists(), "{info}");
        peer(&qemu_img, &["check", "-q", &image]);

        let judge = Server::qemu_nbd(&qemu_nbd, "", &["-r", "-f", "qcow2", "-B", "backup", &image]);
        let map = peer(&nbdinfo, &["--map=qemu:dirty-bitmap:backup", judge.uri()]);
        let dirty = map.lines().filter(|line| line.trim_end().ends_with("dirty"));
        let places: Vec<&str> = dirty.filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(places, ["1048576", "5242880"], "{durability}: {map}");
    }
}

#[test]
fn without_durability_nothing_stands_beside_the_image_and_the_bitmap_stays_in_use() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.blank("disk.qcow2", 0);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
    peer(&qemu_img, &["bitmap", "--add", &image, "backup"]);
    let mut server = Server::ours(&["--format", "qcow2", "--bitmap-durability", "none", &image]);
    peer(&qemu_io, &["-f", "raw", "-c", "write 0 64k", server.uri()]);
    assert!(!std::path::Path::new(&format!("{image}.dirty")).exists());
    server.signal(Signal::KILL);
    server.wait();
    assert!(peer(&qemu_img, &["info", &image]).contains(IN_USE));
    Server::ours(&["--format", "qcow2", &image]).end();
    assert!(peer(&qemu_img, &["info", &image]).contains(IN_USE), "nobody knows what has changed");
}

#[test]
fn one_warning_says_that_bitmaps_cannot_be_kept_beside_the_image() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.blank("disk.qcow2", 0);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "1M"]);
    peer(&qemu_img, &["bitmap", "--add", &image, "backup"]);
    let serve = |more: &[&str]| {
        nbd_cli(&[&["serve", "--run", "true", "--format", "qcow2", &image], more].concat())
    };
    let warnings = |more: &[&str]| {
        let said = serve(more);
        assert_eq!(said.code, Some(0), "{said:?}");
        said.stderr.lines().filter(|line| line.contains("survive")).count()
    };
    // A directory with the name of an unfinished file does not matter.
    std::fs::create_dir(format!("{image}.dirty.new")).expect("a directory");
    assert_eq!(warnings(&[]), 0);
    assert_eq!(warnings(&["--bitmap-durability", "process"]), 0);
    // One in the place of the file does, also for a user who may do everything: what was asked for
    // is not given up with a mere warning.
    let in_the_way = format!("{image}.dirty");
    std::fs::create_dir(&in_the_way).expect("a directory");
    assert_eq!(warnings(&[]), 1);
    assert_eq!(warnings(&["--bitmap-durability", "none"]), 0);
    for durability in ["power", "process"] {
        says(serve(&["--bitmap-durability", durability]), &["is a directory", "would not survive"]);
    }
    std::fs::remove_dir(&in_the_way).expect("an empty directory");
    assert_eq!(warnings(&["--bitmap-durability", "power"]), 0);
}

/// After a crash a bitmap is recovered only from a file that nobody else can have written.
#[test]
fn bits_that_others_may_have_written_are_not_recovered() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.blank("disk.qcow2", 0);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "1M"]);
    peer(&qemu_img, &["bitmap", "--add", &image, "backup"]);
    let mut server = Server::ours(&["--format", "qcow2", &image]);
    peer(&qemu_io, &["-f", "raw", "-c", "write 0 64k", server.uri()]);
    server.signal(Signal::KILL);
    server.wait();
    let sidecar = format!("{image}.dirty");
    let list = || nbd_cli(&["bitmap", "list", "--json", &image]).success();
    let mode = |mode| {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&sidecar, permissions).expect("a mode");
    };
    mode(0o666);
    assert!(list().contains("chmod 600"), "{}", list());
    mode(0o600);
    assert!(!list().contains("chmod"), "{}", list());
    if std::os::unix::fs::chown(&sidecar, Some(12_345), None).is_ok() {
        assert!(list().contains("belongs to user 12345"), "{}", list());
        let server = Server::ours(&["--format", "qcow2", &image]);
        server.end();
        assert!(peer(&qemu_img, &["info", &image]).contains(IN_USE), "nobody knows what changed");
        assert!(std::path::Path::new(&sidecar).exists(), "it is somebody else's");
    }
}

#[test]
fn a_server_says_that_bitmaps_could_not_be_stored_at_its_end_and_fails() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", prlimit = "prlimit");
    let disk = Disk::sparse();
    let image = disk.blank("disk.qcow2", 0);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
    peer(&qemu_io, &["-f", "qcow2", "-c", "write -P 1 0 1M", &image]);
    peer(&qemu_img, &["bitmap", "--add", &image, "backup"]);
    // The file cannot grow, as on a full disk.
    let length = std::fs::metadata(&image).expect("an image").len();
    let (socket, said, file) = (disk.beside("socket"), disk.beside("said"), disk.beside("config"));
    let export = format!("[[export]]\nsource = \"{image}\"\nformat = \"qcow2\"\n");
    std::fs::write(&file, format!("socket = \"{socket}\"\n{export}")).expect("room");
    for options in [&["--socket", &socket, "--format", "qcow2", &image][..], &["--config", &file]] {
        let mut command = std::process::Command::new(&prlimit);
        command.arg(format!("--fsize={length}:")).arg(PROGRAM).arg("serve").args(options);
        command.stderr(std::fs::File::create(&said).expect("room"));
        let mut server = Server::start(&mut command, socket.clone().into());
        peer(&qemu_io, &["-f", "raw", "-c", "write -P 7 0 64k", server.uri()]);
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(1), "{options:?}");
        let said = std::fs::read_to_string(&said).expect("text");
        assert!(said.contains("could not be closed properly"), "{said}");
        assert!(said.contains("no space") || said.contains("larger"), "{said}");
        assert!(peer(&qemu_img, &["info", &image]).contains(IN_USE));
    }
    // With room, what was kept beside the image is stored.
    Server::ours(&["--format", "qcow2", &image]).end();
    assert!(!peer(&qemu_img, &["info", &image]).contains(IN_USE));
}
