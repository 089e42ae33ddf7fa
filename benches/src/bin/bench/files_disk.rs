//! A sparse disk with files, as backups find them.

use std::fs::{self, File};
use std::io::{self, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// Where files begin.
const BLOCK_BYTES: u64 = 4096;

/// Writes a sparse disk of `size` bytes with at most `data` bytes from the regular files below
/// `root`, in the order of their names.
///
/// # Errors
///
/// A directory or file cannot be read, the disk cannot be written, or there are too few files.
pub(crate) fn fill_with_files(path: &Path, size: u64, data: u64, root: &Path) -> io::Result<()> {
    let mut disk = File::create(path)?;
    let mut folders = vec![root.to_owned()];
    let mut offset = 0;
    while let Some(folder) = folders.pop() {
        for entry in sorted(&folder)? {
            let metadata = fs::symlink_metadata(&entry)?;
            if metadata.is_dir() {
                folders.push(entry);
            } else if metadata.is_file() && offset + metadata.len() <= data {
                disk.seek(SeekFrom::Start(offset))?;
                let copied = io::copy(&mut File::open(&entry)?, &mut disk)?;
                offset += copied.next_multiple_of(BLOCK_BYTES);
            }
        }
    }
    if offset < data / 2 {
        return Err(io::Error::other(format!("{} has only {offset} bytes", root.display())));
    }
    disk.set_len(size)?;
    disk.sync_all()
}

fn sorted(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    let mut paths = entries.collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}
