//! Disks with known content.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::random::Random;

/// A directory with room for disks, sockets and the like; removed at the end of the test.
#[derive(Debug)]
pub(crate) struct Disk {
    directory: TempDir,
    path: PathBuf,
    content: Vec<u8>,
}

impl Disk {
    /// An 8 MiB file `disk.img`: data in the first MiB, a little at 4 MiB, the rest a hole.
    pub(crate) fn sparse() -> Self {
        let mut content = vec![0; 8 << 20];
        fill(&mut content[..1 << 20], 0x1234_5678_9abc_def1);
        fill(&mut content[4 << 20..(4 << 20) + 65536], 0xfeed_beef_1357_2468);
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.img");
        let file = File::create(&path).expect("a file");
        file.set_len(content.len() as u64).expect("room for a hole");
        file.write_all_at(&content[..1 << 20], 0).expect("room");
        file.write_all_at(&content[4 << 20..(4 << 20) + 65536], 4 << 20).expect("room");
        Self { directory, path, content }
    }

    pub(crate) fn path(&self) -> &str {
        self.path.to_str().expect("a temporary directory with a plain name")
    }

    pub(crate) fn content(&self) -> &[u8] {
        &self.content
    }

    /// A path beside the disk.
    pub(crate) fn beside(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        path.to_str().expect("a temporary directory with a plain name").to_owned()
    }

    /// Makes an empty file of that size beside the disk.
    pub(crate) fn blank(&self, name: &str, size: u64) -> String {
        let path = self.beside(name);
        File::create(&path).and_then(|file| file.set_len(size)).expect("a file");
        path
    }

    /// Checks that a file holds the same.
    #[track_caller]
    pub(crate) fn assert_equals(&self, path: impl AsRef<Path>) {
        let other = std::fs::read(path).expect("the copy");
        assert_eq!(other.len(), self.content.len(), "size of the copy");
        let difference = self.content.iter().zip(&other).position(|(a, b)| a != b);
        assert_eq!(difference, None, "first different byte");
    }
}

/// Bytes allocated by a file.
pub(crate) fn allocated(path: &str) -> u64 {
    std::fs::metadata(path).expect("a file").blocks() * 512
}

/// Whether the temporary directory's file system has holes; without them nothing can be checked.
pub(crate) fn is_sparse_here(disk: &Disk) -> Option<fn(&str) -> u64> {
    if allocated(disk.path()) > 4 << 20 {
        eprintln!("skipped: the file system of the temporary directory has no holes");
        return None;
    }
    Some(allocated)
}

/// No byte of it is zero.
fn fill(buffer: &mut [u8], seed: u64) {
    let mut random = Random::new(seed);
    for chunk in buffer.chunks_mut(8) {
        chunk
            .copy_from_slice(&(random.next() | 0x0101_0101_0101_0101).to_le_bytes()[..chunk.len()]);
    }
}
