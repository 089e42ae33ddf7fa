//! Zeroes in data.

/// Whether all bytes are zero.
pub fn is_zero(data: &[u8]) -> bool {
    // The first few bytes decide most of the time; the rest is folded without branches, which the
    // compiler turns into wide instructions.
    let (head, rest) = data.split_at(data.len().min(16));
    head.iter().all(|&byte| byte == 0)
        && rest.chunks(1024).all(|chunk| chunk.iter().fold(0, |sum, byte| sum | byte) == 0)
}

/// A part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub start: usize,
    pub end: usize,
    pub content: Content,
}

/// What a part of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Data,
    Zero,
}

/// Splits a buffer into runs of data and of zeroes, in units of `unit` bytes (at least 1) counted
/// from the buffer's start. The last unit may be shorter.
pub fn runs(data: &[u8], unit: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    for chunk in data.chunks(unit) {
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
    fn one_byte_anywhere_makes_data() {
        for length in [1, 15, 16, 17, 1024, 1040, 5000] {
            let mut data = vec![0; length];
            assert!(is_zero(&data));
            for at in [0, length / 2, length - 1] {
                data[at] = 1;
                assert!(!is_zero(&data), "{at} of {length}");
                data[at] = 0;
            }
        }
        assert!(is_zero(&[]));
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
    }
}
