//! The command blocks of the README, pasted as a whole into a shell.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use crate::support::{PROGRAM, nbd_cli, run};
use crate::tools;

const README: &str = include_str!("../../../README.md");

/// The `sh` blocks below a heading, one behind the other.
fn blocks(heading: &str) -> String {
    let (_, section) = README.split_once(&format!("\n## {heading}\n")).expect("the heading");
    let section = section.split("\n## ").next().unwrap_or_default();
    let blocks = section.split("```sh\n").skip(1);
    blocks.filter_map(|block| block.split("```").next()).collect()
}

/// Runs a script in a folder of its own. What it keeps in shared folders is kept there too.
#[track_caller]
fn paste(script: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("a plain name");
    let script = script.replace("/tmp/", &format!("{path}/"));
    std::os::unix::fs::symlink(PROGRAM, folder.path().join("nbd-cli")).expect("a link");
    let paths = std::env::var("PATH").unwrap_or_default();
    // Every command counts, not only the last.
    let mut shell = Command::new("bash");
    shell.args(["-euc", &script]).current_dir(folder.path()).env("PATH", format!("{path}:{paths}"));
    let outcome = run(&mut shell);
    end_servers(folder.path());
    assert_eq!(outcome.code, Some(0), "{script}\n{outcome:?}");
}

/// Ends what a script that failed in the middle has left.
fn end_servers(folder: &Path) {
    for file in ["disk.pid", "vm.pid"] {
        let pid = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        let pid = pid.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
    let control = folder.join("nbd.control");
    if control.exists() {
        nbd_cli(&[OsStr::new("control"), control.as_os_str(), OsStr::new("shutdown")]);
    }
}

#[test]
fn a_real_disk_is_served_inspected_and_copied() {
    tools!(_qemu_img = "qemu-img", _nbdinfo = "nbdinfo", _nbdcopy = "nbdcopy");
    let script = blocks("A real disk");
    // A virtual machine does not end by itself.
    let lines = script.lines().filter(|line| !line.starts_with("qemu-system"));
    paste(&lines.collect::<Vec<_>>().join("\n"));
}

#[test]
fn a_qcow2_image_is_made_served_and_compared() {
    tools!(_qemu_io = "qemu-io");
    let script = blocks("A qcow2 image");
    let (script, _) = script.split_once("nbd-cli serve --run").expect("the command for a disk");
    paste(script);
}

#[test]
fn a_disk_in_use_is_backed_up_and_restored() {
    paste(&blocks("Incremental backups"));
}
