//! Images whose backing file is on a server, under all names that QEMU writes into images.

use crate::support::image::{are_equal, info, is_clean, ours, write};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

/// Every way to write the default export on a unix socket.
fn names(server: &Server) -> Vec<String> {
    let path = server.socket().display();
    let driver = format!(r#""driver":"nbd","server":{{"type":"unix","path":"{path}"}}"#);
    vec![
        server.uri().to_owned(),
        format!("nbd:unix:{path}"),
        format!(r#"json:{{"driver":"raw","file":{{{driver}}}}}"#),
        format!(r#"json:{{"file.driver":"nbd","file.path":"{path}"}}"#),
    ]
}

#[test]
fn names_that_qemu_writes_are_opened_if_the_image_is_trusted() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let server = Server::ours(&["--read-only", disk.path()]);
    let overlay = disk.beside("overlay.qcow2");
    for name in names(&server) {
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &name, "-F", "raw", &overlay]);
        assert_eq!(info(&qemu_img, &overlay)["backing-filename"], name);
        let compare = ["image", "compare", &overlay, disk.path()];
        let refused = nbd_cli(&compare);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        for part in ["are not allowed", "--trust-image"] {
            assert!(refused.stderr.contains(part), "{part}: {refused:?}");
        }
        nbd_cli(&[&compare[..], &["--trust-image"]].concat()).success();
        let chain = ours(&["info", "--json", "--backing-chain", "--trust-image", &overlay]);
        assert_eq!(chain[0]["backing-filename"], name);
        assert_eq!(chain[1]["filename"], server.uri(), "{chain}");
        assert_eq!(chain[1]["virtual-size"], 8 << 20);
        std::fs::remove_file(&overlay).expect("it is there");
    }
}

#[test]
fn a_name_with_host_port_and_export_leads_there() {
    tools!(qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let overlay = disk.beside("overlay.qcow2");
    let server = Server::qemu_nbd(&qemu_nbd, "disk", &["-r", "-f", "raw", disk.path()]);
    let path = server.socket().display();
    for name in [
        format!("nbd:unix:{path}:exportname=disk"),
        format!(r#"json:{{"driver":"nbd","path":"{path}","export":"disk"}}"#),
    ] {
        // QEMU takes the name of the driver for the format too.
        let arguments = ["create", "-q", "-f", "qcow2", "-u", "-b", &name, "-F", "nbd", &overlay];
        peer(&qemu_img, &[&arguments[..], &["8M"]].concat());
        nbd_cli(&["image", "compare", "--trust-image", &overlay, disk.path()]).success();
    }
    // Nobody listens there, and the sentence says where.
    for (name, part) in [
        ("nbd:127.0.0.1:1:exportname=a", "nbd://127.0.0.1:1/a"),
        ("nbd:127.0.0.1", "no port"),
        (r#"json:{"driver":"ssh","host":"a"}"#, "'ssh'"),
        (r#"json:{"driver":"nbd","host":"a","tls-creds":"b"}"#, "'tls-creds'"),
    ] {
        nbd_cli(&["image", "rebase", "-u", "-b", name, "-F", "raw", &overlay]).success();
        says(nbd_cli(&["image", "map", "--trust-image", &overlay]), &[part]);
    }
}

#[test]
fn an_overlay_of_an_export_is_made_and_takes_its_size() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let server = Server::ours(&["--read-only", disk.path()]);
    for (index, name) in names(&server).iter().enumerate() {
        let overlay = disk.beside(&format!("overlay{index}.qcow2"));
        let create = ["image", "create", "-f", "qcow2", "-b", name, "-F", "raw", &overlay];
        nbd_cli(&create).success();
        assert_eq!(info(&qemu_img, &overlay)["virtual-size"], 8 << 20);
        assert_eq!(info(&qemu_img, &overlay)["backing-filename"], *name);
        is_clean(&qemu_img, &overlay);
        are_equal(&qemu_img, &overlay, disk.path());
        write(&qemu_io, &overlay, "write -P 1 1M 64k");
    }
    let gone = names(&server).remove(1);
    server.end();
    let overlay = disk.beside("never.qcow2");
    let create = ["image", "create", "-f", "qcow2", "-b", &gone, "-F", "raw", &overlay];
    says(nbd_cli(&create), &["nbd+unix", "is the server running"]);
    assert!(!std::path::Path::new(&overlay).exists(), "nothing is left behind");
}

#[test]
fn rebase_from_a_file_to_a_server_and_back_keeps_the_disk() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (overlay, flat, old) =
        (disk.beside("overlay.qcow2"), disk.beside("flat.img"), disk.beside("old.img"));
    let mut content = disk.content().to_vec();
    content[1 << 20..2 << 20].fill(9);
    std::fs::write(&old, &content).expect("room");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", "old.img", "-F", "raw", &overlay]);
    write(&qemu_io, &overlay, "write -P 3 3M 100k");
    peer(&qemu_img, &["convert", "-O", "raw", &overlay, &flat]);

    let server = Server::ours(&["--read-only", disk.path()]);
    for name in names(&server) {
        let rebase = ["image", "rebase", "-b", &name, "-F", "raw", "--trust-image", &overlay];
        nbd_cli(&rebase).success();
        assert_eq!(info(&qemu_img, &overlay)["backing-filename"], name);
        is_clean(&qemu_img, &overlay);
        are_equal(&qemu_img, &overlay, &flat);
    }
    let back = ["image", "rebase", "-b", "old.img", "-F", "raw", &overlay];
    says(nbd_cli(&back), &["--trust-image"]);
    nbd_cli(&[&back[..], &["--trust-image"]].concat()).success();
    server.end();
    are_equal(&qemu_img, &overlay, &flat);
}

#[test]
fn a_commit_reaches_the_server() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (overlay, flat) = (disk.beside("overlay.qcow2"), disk.beside("flat.img"));
    let locked = Server::ours(&["--read-only", disk.path()]);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", locked.uri(), "-F", "raw", &overlay]);
    write(&qemu_io, &overlay, "write -P 3 3M 100k");
    write(&qemu_io, &overlay, "write -z 0 64k");
    peer(&qemu_img, &["convert", "-O", "raw", &overlay, &flat]);
    let commit = |options: &[&str]| nbd_cli(&[&["image", "commit", &overlay], options].concat());
    says(commit(&[]), &["--trust-image"]);
    says(commit(&["--trust-image"]), &["read-only", "nbd+unix"]);
    locked.end();

    let server = Server::ours(&[disk.path()]);
    let name = names(&server).remove(2);
    nbd_cli(&["image", "rebase", "-u", "-b", &name, "-F", "raw", &overlay]).success();
    commit(&["--trust-image"]).success();
    are_equal(&qemu_img, &overlay, &flat);
    is_clean(&qemu_img, &overlay);
    server.end();
    are_equal(&qemu_img, disk.path(), &flat);
}
