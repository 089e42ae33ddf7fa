//! Zero detection in data.

/// The number of bytes that are folded into one word before the word is examined.
const BLOCK: usize = 256;

/// Returns whether all bytes are zero.
///
/// The first and the last word are checked before all others, because data that is not zero seldom
/// begins and ends with zeroes.
///
/// ```
/// assert!(imgfmt::is_zero(&[0; 65536]));
/// assert!(!imgfmt::is_zero(b"\0\0\0\0\0\0\0\0x"));
/// ```
pub fn is_zero(bytes: &[u8]) -> bool {
    let (Some(first), Some(last)) = (bytes.first_chunk::<8>(), bytes.last_chunk::<8>()) else {
        return bytes.iter().all(|byte| *byte == 0);
    };
    if *first != [0; 8] || *last != [0; 8] {
        return false;
    }
    // Blocks are folded without a branch, which the compiler turns into a few wide instructions.
    let is_zero = |block: &[u8]| block.iter().fold(0, |seen, byte| seen | byte) == 0;
    let mut blocks = bytes.chunks_exact(BLOCK);
    blocks.by_ref().all(is_zero) && is_zero(blocks.remainder())
}

/// The content of a part of a buffer or of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Bytes, some of which are not zero.
    Data,
    /// Zeroes only.
    Zero,
}

/// A part of a buffer of one kind throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its start in the buffer, in bytes.
    pub start: usize,
    /// Its end (excluded), in bytes.
    pub end: usize,
    /// Its content.
    pub content: Content,
}

/// Splits a buffer into runs of data and of zeroes, in units of `unit` bytes counted from the
/// buffer's start; a `unit` of 0 counts as 1. The last unit may be shorter. A unit with any data in
/// it is data.
///
/// ```
/// use imgfmt::zero::{Content, runs};
///
/// let found = runs(&[0, 0, 0, 0, 0, 7, 0, 0, 0], 4);
/// assert_eq!(found.len(), 3);
/// assert_eq!((found[1].start, found[1].end, found[1].content), (4, 8, Content::Data));
/// ```
pub fn runs(data: &[u8], unit: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    for chunk in data.chunks(unit.max(1)) {
        let end = start + chunk.len();
        let content = if is_zero(chunk) { Content::Zero } else { Content::Data };
        match runs.last_mut() {
            Some(last) if last.content == content => last.end = end,
            _ => runs.push(Run { start, end, content }),
        }
        start = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_found() {
        for length in [0, 1, 7, 8, 9, 15, 16, 17, 255, 256, 257, 264, 265, 1000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn bytes_around_the_range_do_not_count() {
        let mut bytes = vec![0xff; 1000];
        for (start, end) in [(1, 999), (3, 10), (13, 269), (500, 500)] {
            bytes[start..end].fill(0);
            assert!(is_zero(&bytes[start..end]), "{start} to {end}");
            bytes.fill(0xff);
        }
    }

    #[test]
    fn runs_cover_the_buffer_in_units() {
        let mut data = vec![0; 4096 * 4 + 100];
        data[4096] = 1;
        data[4096 * 3 - 1] = 1;
        let run = |start, end, content| Run { start, end, content };
        assert_eq!(
            runs(&data, 4096),
            [
                run(0, 4096, Content::Zero),
                run(4096, 4096 * 3, Content::Data),
                run(4096 * 3, data.len(), Content::Zero)
            ]
        );
        assert_eq!(runs(&[], 4096), []);
        assert_eq!(runs(&[0, 1], 0).len(), 2, "a unit of 0 is one of 1");
    }
}
