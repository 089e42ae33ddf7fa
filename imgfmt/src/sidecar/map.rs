//! Memory-maps the sidecar. No other module maps a file.

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

use crate::sys;

/// A file of whole words, all of it mapped, shared with the file.
///
/// If the file is truncated while it is mapped, an access beyond its end kills the process with
/// SIGBUS. The file is therefore locked, private to the user, and of the right length when it is
/// mapped; there is no defence against a user truncating the file.
#[derive(Debug)]
pub(super) struct WordMap {
    raw: MmapRaw,
}

impl WordMap {
    /// Maps `length` bytes, a multiple of 8; the file must have exactly that length.
    pub(super) fn new(file: &File, length: u64) -> io::Result<Self> {
        let map_length = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if length == 0 || !length.is_multiple_of(8) || file.metadata()?.len() != length {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { raw: MmapOptions::new().len(map_length).map_raw(file)? })
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        sys::mapped_words(&self.raw)
    }

    /// Waits until everything stored so far is on stable storage.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.raw.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn what_is_stored_is_in_the_file_and_the_other_way_round() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let map = WordMap::new(&file, 8192).unwrap();
        assert_eq!(map.words().len(), 1024);
        map.words()[513].store(0x0807_0605_0403_0201_u64.to_le(), Relaxed);
        map.sync().unwrap();
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 513 * 8).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
        file.write_all_at(&[9; 8], 0).unwrap();
        assert_eq!(map.words()[0].load(Relaxed), 0x0909_0909_0909_0909);
    }

    #[test]
    fn a_file_of_another_length_is_not_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        for length in [0, 4, 4088, 8192] {
            assert!(WordMap::new(&file, length).is_err(), "{length}");
        }
    }
}
