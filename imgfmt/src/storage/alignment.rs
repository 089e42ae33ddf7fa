//! The alignment that direct I/O needs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::bounce::BouncePool;

/// The alignment of memory, in bytes, if the system does not report it.
const MEMORY_UNTOLD: u32 = 4096;
/// The alignment for a file that is too short to try, in bytes.
const UNTRIED: u32 = 4096;
/// The largest alignment that is handled, in bytes.
const MAX: u32 = 64 * 1024;

/// The alignment that direct I/O on a file needs, in bytes; both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirectAlignment {
    /// The alignment of buffers in memory.
    pub memory: u32,
    /// The alignment of offsets in the file and of lengths.
    pub offset: u32,
}

impl DirectAlignment {
    /// The alignment that `file`, opened for direct I/O, needs; `None` if it does not support
    /// direct I/O.
    pub(super) fn of(file: &File, device_block: Option<u64>) -> io::Result<Option<Self>> {
        let found = match told(file) {
            Told::Alignment(alignment) => Some(alignment),
            Told::NoDirectIo => None,
            Told::Nothing => match device_block {
                Some(block) => {
                    let offset = u32::try_from(block).unwrap_or(u32::MAX);
                    Some(Self { memory: offset.max(MEMORY_UNTOLD), offset })
                }
                None => tried(file)?,
            },
        };
        let is_usable = |size: u32| size.is_power_of_two() && size <= MAX;
        Ok(found.filter(|found| is_usable(found.memory) && is_usable(found.offset)))
    }
}

/// What the system reports about a file.
enum Told {
    Alignment(DirectAlignment),
    NoDirectIo,
    Nothing,
}

fn told(file: &File) -> Told {
    let Ok(found) = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return Told::Nothing;
    };
    if found.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Told::Nothing;
    }
    match (found.stx_dio_mem_align, found.stx_dio_offset_align) {
        (0, _) | (_, 0) => Told::NoDirectIo,
        (memory, offset) => Told::Alignment(DirectAlignment { memory, offset }),
    }
}

/// Finds the smallest unit in which the file can be read.
fn tried(file: &File) -> io::Result<Option<DirectAlignment>> {
    let pool = BouncePool::new(MEMORY_UNTOLD as usize);
    for unit in [512, 1024, 2048, 4096] {
        let mut buffer = pool.take(unit as usize);
        match file.read_at(buffer.bytes_mut(), u64::from(unit)) {
            Ok(0) => return Ok(Some(DirectAlignment { memory: MEMORY_UNTOLD, offset: UNTRIED })),
            Ok(_) => return Ok(Some(DirectAlignment { memory: MEMORY_UNTOLD, offset: unit })),
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
