//! Writes zeroes as data where no faster operation exists.

use std::io;
use std::sync::LazyLock;

use super::bounce::Memory;
use crate::units::HostOffset;

/// Size of one write of zeroes: large enough for full speed, small enough to keep around.
const ZERO_BUFFER_SIZE: usize = 256 * 1024;

/// Aligned for direct I/O, which would otherwise copy it. Allocated, as a constant of zeroes would
/// take its size in the program's file.
static ZEROES: LazyLock<Memory> = LazyLock::new(|| Memory::new(ZERO_BUFFER_SIZE, 4096));

/// Writes `length` bytes of zeroes from `offset` on as data, by calls of `write`.
pub(super) fn write_zero_buffers(
    offset: HostOffset,
    length: u64,
    mut write: impl FnMut(HostOffset, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let zeroes = ZEROES.aligned(ZERO_BUFFER_SIZE);
    let mut position = offset.bytes();
    let end = position.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
    while position < end {
        let part = usize::try_from(end - position).unwrap_or(usize::MAX).min(ZERO_BUFFER_SIZE);
        write(HostOffset::new(position), &zeroes[..part])?;
        position += part as u64;
    }
    Ok(())
}
