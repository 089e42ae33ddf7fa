//! Bitmaps of a running export: added ones are offered, removed ones are not, and during a
//! checkpoint the disk's own export does not offer its bitmap.

use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

#[test]
fn contexts_come_and_go_with_bitmaps_and_checkpoints() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "64M"]);
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let say = |arguments: &[&str]| {
        nbd_cli(&[&["control", "--json", &control][..], arguments].concat()).success()
    };
    let offers = |name: &str| {
        let found = nbd_cli(&["list-meta", server.uri()]).success();
        found.lines().any(|line| line == format!("qemu:dirty-bitmap:{name}"))
    };
    let reply = say(&["bitmap-add", "vm", "daily"]);
    assert!(reply.contains("qemu:dirty-bitmap:daily"), "{reply}");
    say(&["bitmap-add", "vm", "weekly"]);
    assert!(offers("daily") && offers("weekly"));

    for outcome in ["failure", "success"] {
        say(&["checkpoint-start", "vm", "--bitmap", "daily"]);
        assert!(!offers("daily") && offers("weekly"));
        for refused in
            [["bitmap-merge", "vm", "weekly", "daily"], ["bitmap-merge", "vm", "daily", "weekly"]]
        {
            says(
                nbd_cli(&[&["control", &control][..], &refused].concat()),
                &["'daily'", "checkpoint"],
            );
        }
        let view = nbd_cli(&["list-meta", &server.uri_of("vm.checkpoint")]).success();
        assert!(view.contains("qemu:dirty-bitmap:daily"), "{view}");
        say(&["checkpoint-end", "vm", outcome]);
        assert!(offers("daily"));
    }
    say(&["bitmap-remove", "vm", "daily"]);
    assert!(!offers("daily") && offers("weekly"));
    server.end();
}
