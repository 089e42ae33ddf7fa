//! Images made and judged by QEMU's tools.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Background, Random, run, text, wait_until};

/// The tools that these tests need; says which are missing.
pub fn has_qemu() -> bool {
    super::has_tool("qemu-img") && super::has_tool("qemu-io")
}

/// Makes an image: `options` as for `-o`, or empty.
pub fn create(path: &Path, options: &str, size: &str) {
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([text(path), size]);
    run("qemu-img", &arguments);
}

/// Makes an overlay over a backing file in the same directory.
pub fn create_overlay(path: &Path, options: &str, backing: &Path, format: &str, size: &str) {
    let name = backing.file_name().unwrap().to_str().unwrap();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-b", name, "-F", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([text(path), size]);
    run("qemu-img", &arguments);
}

/// Runs commands of qemu-io.
pub fn io(path: &Path, format: &str, commands: &[String]) {
    for commands in commands.chunks(100) {
        let mut arguments = vec!["-f", format, "-d", "unmap"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(text(path));
        let output = Command::new("qemu-io").args(&arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("failed"), "{arguments:?}: {said}");
    }
}

/// Random commands of qemu-io that write, zero and discard, aligned to 512 bytes.
pub fn random_commands(random: &mut Random, size: u64, count: usize) -> Vec<String> {
    (0..count)
        .map(|_| {
            let offset = random.below(size / 512) * 512;
            let length = ((random.below(300) + 1) * 512).min(size - offset);
            match random.below(8) {
                0 => format!("write -z {offset} {length}"),
                1 => format!("write -z -u {offset} {length}"),
                2 => format!("discard {offset} {length}"),
                _ => format!("write -P {} {offset} {length}", random.below(255) + 1),
            }
        })
        .collect()
}

/// The content of an image as QEMU reads it.
pub fn content(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("content");
    let _ = std::fs::remove_file(&raw);
    run("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", text(path), text(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

/// Fails unless `qemu-img check` finds nothing to complain about, not even a leak.
pub fn check(path: &Path) {
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
}

/// What QEMU says about a bitmap: the dirty parts, offset and length.
pub fn dirty(path: &Path, bitmap: &str) -> Vec<(u64, u64)> {
    let map = Nbd::serve_bitmap(path, bitmap).map(&format!("qemu:dirty-bitmap:{bitmap}"));
    let dirty = map.into_iter().filter(|(_, _, value)| *value == 1);
    dirty.map(|(offset, length, _)| (offset, length)).collect()
}

/// Serves an image read-only until it is dropped.
pub struct Nbd {
    _server: Background,
    socket: PathBuf,
}

impl Nbd {
    pub fn serve(path: &Path, format: &str) -> Self {
        Self::serve_with(path, &["-A", "-f", format])
    }

    pub fn serve_bitmap(path: &Path, bitmap: &str) -> Self {
        Self::serve_with(path, &["-B", bitmap, "-f", "qcow2"])
    }

    fn serve_with(path: &Path, options: &[&str]) -> Self {
        let socket = path.with_extension("socket");
        let mut arguments = vec!["-r", "-t", "-k", text(&socket)];
        arguments.extend(options);
        arguments.push(text(path));
        let server = Background::start("qemu-nbd", &arguments);
        // The socket is there a moment before anyone listens to it.
        wait_until("the start of qemu-nbd", || UnixStream::connect(&socket).is_ok());
        Self { _server: server, socket }
    }

    /// The extents of a metadata context: offset, length, value.
    pub fn map(&self, context: &str) -> Vec<(u64, u64, u32)> {
        let uri = format!("nbd+unix:///?socket={}", text(&self.socket));
        let map = run("nbdinfo", &["--map", &format!("--map={context}"), &uri]);
        let mut extents: Vec<(u64, u64, u32)> = Vec::new();
        for line in map.lines() {
            let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
            let (Some(offset), Some(length), Some(value)) =
                (numbers.next(), numbers.next(), numbers.next())
            else {
                continue;
            };
            match extents.last_mut() {
                Some(last) if last.2 == value as u32 => last.1 += length,
                _ => extents.push((offset, length, value as u32)),
            }
        }
        extents
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Fails if `qemu-img check` finds anything worse than leaked clusters.
pub fn check_but_for_leaks(path: &Path, what: &str) {
    let output =
        Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{what}: {said}");
}
