//! `map --chart`.

use crate::support::{Disk, PROGRAM, Server, image, is_sparse_here, nbd_cli, peer, run, says};
use crate::tools;

fn chart(server: &Server, arguments: &[&str], locale: &str) -> String {
    let mut command = std::process::Command::new(PROGRAM);
    command.env("LC_ALL", locale).arg("map").arg("--chart").args(arguments).arg(server.uri());
    run(&mut command).success()
}

#[test]
fn each_line_is_a_part_of_the_disk() {
    let disk = Disk::sparse();
    if is_sparse_here(&disk).is_none() {
        return;
    }
    let server = Server::ours(&[disk.path()]);
    let text = chart(&server, &[], "C.UTF-8");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], format!("       0  {}", "█".repeat(64)));
    assert_eq!(lines[2], format!("      1M  {}", "·".repeat(64)));
    assert_eq!(lines[8], format!("      4M  {}{}", "█".repeat(8), "·".repeat(56)));
    assert!(text.contains("data: 1.1 MiB (13.3 %)"), "{text}");
    let plain = chart(&server, &[], "C");
    assert!(plain.is_ascii(), "{plain}");
}

#[test]
fn colours_only_when_asked_for_or_on_a_terminal() {
    let server = Server::ours(&["memory:1M"]);
    assert!(!chart(&server, &[], "C").contains('\x1b'));
    assert!(chart(&server, &["--color", "always"], "C").contains('\x1b'));
}

#[test]
fn the_chart_of_an_image_tells_its_layers_apart() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let [base, overlay] = ["base.qcow2", "overlay.qcow2"].map(|name| disk.beside(name));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "8M"]);
    image::write(&qemu_io, &base, "write -P 1 0 2M");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay]);
    image::write(&qemu_io, &overlay, "write -P 2 1M 512k");
    image::write(&qemu_io, &overlay, "write -z 4M 512k");
    let drawn = |path: &str| {
        let mut command = std::process::Command::new(PROGRAM);
        run(command.env("LC_ALL", "C").args(["image", "map", "--chart", path])).success()
    };
    let text = drawn(&overlay);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], format!("       0  {}", "%".repeat(64)));
    assert_eq!(lines[2], format!("      1M  {}", "#".repeat(64)));
    assert_eq!(lines[3], format!("   1536K  {}", "%".repeat(64)));
    assert_eq!(lines[4], format!("      2M  {}", ".".repeat(64)));
    assert_eq!(lines[8], format!("      4M  {}", "o".repeat(64)));
    for total in ["in this layer: 512.0 KiB", "in a backing layer: 1.5 MiB", "zero: 512.0 KiB"] {
        assert!(text.contains(total), "{text}");
    }
    // The same from a server that tells the layers.
    let server = Server::ours(&["--allocation-depth", "--read-only", &overlay]);
    assert_eq!(drawn(server.uri()), text);
    let both = nbd_cli(&["image", "map", "--chart", "--json", &overlay]);
    assert!(both.stderr.contains("cannot be used with"), "{both:?}");
    says(nbd_cli(&["image", "map", "--chart", "/nowhere"]), &["/nowhere"]);
}
