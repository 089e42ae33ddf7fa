//! Writes zeroes as data where no faster operation exists.

use std::io;

use super::{Durability, Storage};
use crate::units::HostOffset;

/// Size of one write of zeroes: large enough for full speed, small enough to keep around.
const ZERO_BUFFER_SIZE: usize = 256 * 1024;

static ZEROES: [u8; ZERO_BUFFER_SIZE] = [0; ZERO_BUFFER_SIZE];

/// Writes zeroes as data.
pub(super) fn write_zero_buffers(
    storage: &(impl Storage + ?Sized),
    offset: HostOffset,
    length: u64,
) -> io::Result<()> {
    let mut position = offset.bytes();
    let end = position.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
    while position < end {
        let part = usize::try_from(end - position).unwrap_or(usize::MAX).min(ZERO_BUFFER_SIZE);
        storage.write_at(HostOffset::new(position), &ZEROES[..part], Durability::Cached)?;
        position += part as u64;
    }
    Ok(())
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In blocks without a branch, which the compiler turns into a few wide instructions.
    let mut blocks = bytes.chunks_exact(128);
    blocks.all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
        && bytes.chunks_exact(128).remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_found() {
        for length in [0, 1, 127, 128, 129, 1000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
