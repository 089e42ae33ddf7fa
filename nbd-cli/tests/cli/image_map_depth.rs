//! The layers that `image map` names, beside qemu-img.

use crate::support::image::{json, ours, write};
use crate::support::{Disk, peer};
use crate::tools;

#[test]
fn a_part_that_no_layer_has_is_at_the_last_layer_that_was_asked() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let path = |name: &str| disk.beside(name);
    let over = |below: &str, above: &str, size: &str| {
        let (below, above) = (path(below), path(above));
        peer(
            &qemu_img,
            &["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &above, size],
        );
    };
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &path("base"), "1M"]);
    write(&qemu_io, &path("base"), "write -P 1 0 64k");
    over("base", "middle", "2M");
    write(&qemu_io, &path("middle"), "write -P 2 128k 64k");
    write(&qemu_io, &path("middle"), "write -z 1984k 64k");
    over("middle", "short", "1500k");
    write(&qemu_io, &path("short"), "write -z 1408k 64k");
    over("short", "top", "3M");
    write(&qemu_io, &path("top"), "write -P 3 2M 64k");
    for name in ["base", "middle", "short", "top"] {
        let theirs = json(&qemu_img, &["map", "--output=json", &path(name)]);
        assert_eq!(ours(&["map", "--json", &path(name)]), theirs, "{name}");
    }
}
