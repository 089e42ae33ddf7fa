//! `map --chart`.

use crate::support::{Disk, PROGRAM, Server, is_sparse_here, run};

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
