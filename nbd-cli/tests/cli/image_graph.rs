//! `image info --graph`.

use std::process::Command;

use crate::support::{Disk, Outcome, PROGRAM, Server, nbd_cli, peer, run, says};
use crate::tools;

fn graph(path: &str, locale: &str) -> Outcome {
    run(Command::new(PROGRAM).env("LC_ALL", locale).args(["image", "info", "--graph", path]))
}

#[test]
fn the_whole_chain_is_drawn_with_its_data_files() {
    tools!(qemu_img = "qemu-img", touch = "touch");
    let disk = Disk::sparse();
    let [base, middle, top] = ["base.raw", "middle.qcow2", "top.qcow2"].map(|it| disk.beside(it));
    peer(&qemu_img, &["create", "-q", "-f", "raw", &base, "8M"]);
    let create = ["create", "-q", "-f", "qcow2"];
    let data = format!("data_file={},data_file_raw=off", disk.beside("middle.data"));
    peer(&qemu_img, &[&create[..], &["-b", &base, "-F", "raw", "-o", &data, &middle]].concat());
    peer(&qemu_img, &[&create[..], &["-b", &middle, "-F", "qcow2", &top]].concat());
    peer(&qemu_img, &["snapshot", "-c", "one", &top]);
    peer(&touch, &["-d", "2020-02-29 12:00:00 UTC", &top]);
    let drawn = graph(&top, "C").success();
    assert!(drawn.is_ascii(), "{drawn}");
    let mut rest = drawn.as_str();
    for part in [
        "top.qcow2 ",
        "qcow2, 8.0 MiB, ",
        "changed 2020-02-29 12:00:00 UTC ",
        "snapshots: 1 ",
        "\n  | backing file\n+-+-",
        "middle.qcow2 ",
        "\n  | data file\n  | +-",
        "middle.data ",
        "\n  | backing file\n+-+-",
        "base.raw ",
        "| raw, 8.0 MiB, ",
        " taken ",
        ".......",
    ] {
        let at = rest.find(part).unwrap_or_else(|| panic!("no {part:?} in {drawn}"));
        rest = &rest[at + part.len()..];
    }
    assert!(drawn.lines().all(|line| line.chars().count() <= 80), "{drawn}");
    let unicode = graph(&top, "C.UTF-8").success();
    assert_eq!(unicode.matches('┌').count(), 4, "{unicode}");
    // What cannot be opened is an error, as with --backing-chain.
    std::fs::remove_file(&base).expect("a file");
    says(graph(&top, "C"), &["base.raw"]);
    let both = nbd_cli(&["image", "info", "--graph", "--json", &top]);
    assert!(both.stderr.contains("cannot be used with"), "{both:?}");
}

#[test]
fn info_draws_what_image_info_draws_also_of_images_in_use() {
    let disk = Disk::sparse();
    let [base, top] = ["base.raw", "top.qcow2"].map(|it| disk.beside(it));
    nbd_cli(&["image", "create", "-f", "raw", &base, "8M"]).success();
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", &base, "-F", "raw", &top]).success();
    let drawn = nbd_cli(&["image", "info", "--graph", &top]).success();
    assert!(drawn.contains("backing file") && drawn.contains("base.raw"), "{drawn}");
    let server = Server::ours(&[&top]);
    let info = |words: &[&str]| nbd_cli(&[&["info"], words].concat());
    assert_eq!(info(&["--graph", &top]).success(), drawn);
    let export = info(&["--graph", server.uri()]).success();
    assert_eq!(info(&[server.uri(), "--graph"]).success(), export);
    assert!(export.contains("raw, 8.0 MiB"), "{export}");
    for wrong in [&["--graph", &top, server.uri()][..], &["--graph"], &[]] {
        assert_ne!(info(wrong).code, Some(0), "{wrong:?}");
    }
    says(info(&["--graph", "/nonexistent.qcow2"]), &["/nonexistent.qcow2"]);
    server.end();
}

#[test]
fn an_export_is_a_box_without_what_only_files_have() {
    let server = Server::ours(&["memory:1M"]);
    let drawn = graph(server.uri(), "C").success();
    assert!(drawn.contains("| raw, 1.0 MiB ") && !drawn.contains("changed"), "{drawn}");
}
