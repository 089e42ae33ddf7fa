//! The file system that a kernel starts with: a cpio archive in the form `newc`.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::run;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// An archive that is being written.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    names: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// Adds a text as a program.
    pub(crate) fn script(&mut self, name: &str, text: &str) {
        self.entry(Path::new(name), FILE | 0o755, text.as_bytes());
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) {
        self.entry(Path::new(name), LINK, target.as_bytes());
    }

    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(Path::new(name), DIRECTORY, &[]);
    }

    /// Adds a file of this system under another name.
    pub(crate) fn file(&mut self, name: impl AsRef<Path>, file: &Path) {
        let content = std::fs::read(file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        let mode = std::fs::metadata(file).expect("a file").permissions().mode();
        self.entry(name.as_ref(), FILE | (mode & 0o777), &content);
    }

    /// Adds a program, and the libraries that it is linked with.
    pub(crate) fn program(&mut self, name: &str, file: &Path) {
        self.file(name, file);
        // It fails for a program without libraries.
        for word in run(Command::new("ldd").arg(file)).stdout.split_whitespace() {
            if word.starts_with('/') && Path::new(word).is_file() {
                self.file(word.trim_start_matches('/'), Path::new(word));
            }
        }
    }

    /// Returns the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.header(Path::new("TRAILER!!!"), 0, 0);
        self.bytes
    }

    fn entry(&mut self, name: &Path, mode: u32, content: &[u8]) {
        if let Some(parent) = name.parent().filter(|parent| *parent != Path::new(""))
            && !self.names.contains(parent)
        {
            self.entry(parent, DIRECTORY, &[]);
        }
        if !self.names.insert(name.to_owned()) {
            return;
        }
        self.header(name, mode, content.len());
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn header(&mut self, name: &Path, mode: u32, length: usize) {
        let name = name.to_str().expect("a plain name");
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let fields = [self.names.len(), mode as usize, 0, 0, links, 0, length, 0, 0, 0, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields.into_iter().chain([name.len() + 1, 0]) {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
