//! The file that records the blocks of a verified run.
//!
//! ```text
//! 0       16     24          32      40       48
//! | magic | seed | block len | start | blocks | oldest, newest (32 bits each) of every block ... | crc32 |
//! ```
//!
//! Numbers are big-endian.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use super::ledger::{Generations, MAX_BLOCKS};
use crate::error::JobError;
use crate::text::printable;

const MAGIC: [u8; 16] = *b"nbd-cli bench 1\n";
const HEADER_LEN: usize = 48;

/// The whole file while a run writes: the blocks on disk are newer than any recorded count then.
const RUNNING: [u8; 16] = *b"nbd-cli running\n";

/// The blocks that a run has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) seed: u64,
    /// In bytes.
    pub(super) block_len: u32,
    /// Offset of the first block, in bytes.
    pub(super) start: u64,
    pub(super) blocks: Vec<Generations>,
}

impl State {
    /// Reads a file; `None` if there is none.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is another kind of file.
    pub(super) fn load(path: &Path) -> Result<Option<Self>, JobError> {
        let shown = printable(&path.to_string_lossy());
        let failed = |error: io::Error| {
            JobError::invalid(format!("cannot read the state of a former run, '{shown}': {error}"))
        };
        let limit = HEADER_LEN as u64 + MAX_BLOCKS * 8 + 4;
        match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(found) if found.len() > limit || !found.is_file() => return Err(foreign(&shown)),
            Ok(_) => {}
        }
        let bytes = std::fs::read(path).map_err(failed)?;
        if bytes == RUNNING {
            return Err(JobError::invalid(format!(
                "'{shown}' is the state of a run that still writes, or was killed before it could \
                 keep what it had written; remove it if that run has ended, and write the disk again \
                 with --verify"
            )));
        }
        Self::decode(&bytes).map(Some).ok_or_else(|| foreign(&shown))
    }

    /// Records that a run is going to write, which outdates the earlier contents of the file.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(super) fn begin(path: &Path) -> Result<(), JobError> {
        replace(path, &RUNNING)
    }

    /// Replaces the file, completely or not at all.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(super) fn save(&self, path: &Path) -> Result<(), JobError> {
        replace(path, &self.encode())
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.blocks.len() * 8 + 4);
        bytes.extend_from_slice(&MAGIC);
        let count = self.blocks.len() as u64;
        for field in [self.seed, u64::from(self.block_len), self.start, count] {
            bytes.extend_from_slice(&field.to_be_bytes());
        }
        for block in &self.blocks {
            bytes.extend_from_slice(&block.durable.to_be_bytes());
            bytes.extend_from_slice(&block.issued.to_be_bytes());
        }
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (content, checksum) = bytes.split_last_chunk::<4>()?;
        if crc32fast::hash(content) != u32::from_be_bytes(*checksum) {
            return None;
        }
        let (header, blocks) = content.split_first_chunk::<HEADER_LEN>()?;
        let fields = header.strip_prefix(&MAGIC)?.as_chunks::<8>().0;
        let [seed, block_len, start, count] = fields else { return None };
        let [seed, block_len, start, count] =
            [seed, block_len, start, count].map(|field| u64::from_be_bytes(*field));
        let (blocks, rest) = blocks.as_chunks::<8>();
        if blocks.len() as u64 != count || !rest.is_empty() || start > i64::MAX as u64 {
            return None;
        }
        let blocks = blocks.iter().map(|block| {
            let [a, b, c, d, e, f, g, h] = *block;
            let (oldest, newest) =
                (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
            (oldest <= newest).then(|| Generations::known(oldest, newest))
        });
        let blocks = blocks.collect::<Option<_>>()?;
        let block_len = u32::try_from(block_len).ok().filter(|length| *length > 0)?;
        Some(Self { seed, block_len, start, blocks })
    }
}

/// Replaces the old file with the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), JobError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".partial");
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    });
    written.map_err(|error| {
        let shown = printable(&path.to_string_lossy());
        JobError::destination(format!("cannot keep what was written in '{shown}': {error}"))
    })
}

fn foreign(shown: &str) -> JobError {
    JobError::invalid(format!(
        "'{shown}' is not the complete state of a verified run; name the file that --verify-state \
         gave to one, or a new one"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let blocks = vec![Generations::known(0, 0), Generations::known(2, 5)];
        State { seed: 77, block_len: 4096, start: 1 << 30, blocks }
    }

    #[test]
    fn state_comes_back_as_it_was() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state");
        assert_eq!(State::load(&path).expect("a missing file is not an error"), None);
        state().save(&path).expect("it is written");
        assert_eq!(State::load(&path).expect("it is read"), Some(state()));
        assert_eq!(directory.path().read_dir().expect("the directory").count(), 1);
    }

    #[test]
    fn state_is_of_no_use_while_a_run_writes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state");
        state().save(&path).expect("it is written");
        State::begin(&path).expect("it is written");
        let error = State::load(&path).expect_err("blocks may be newer");
        assert!(error.to_string().contains("was killed"), "{error}");
        state().save(&path).expect("it is written");
        assert_eq!(State::load(&path).expect("it is read"), Some(state()));
    }

    #[test]
    fn cut_or_changed_state_is_refused() {
        let bytes = state().encode();
        assert_eq!(State::decode(&bytes), Some(state()));
        for length in 0..bytes.len() {
            assert_eq!(State::decode(&bytes[..length]), None, "{length}");
        }
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 4;
            assert_eq!(State::decode(&changed), None, "{index}");
        }
    }

    #[test]
    fn other_file_is_refused_with_what_to_do() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.img");
        std::fs::write(&path, [7; 1000]).expect("a file");
        let error = State::load(&path).expect_err("it is none");
        assert!(error.to_string().contains("--verify-state"), "{error}");
    }
}
