//! Verdicts on blocks: their contents against the expected ones.

use super::block::{Found, inspect};

/// A block with other contents than expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    pub(super) offset: u64,
    pub(super) what: String,
}

/// Returns the defect of a block that may hold the generations from `oldest` to `newest`.
pub(super) fn judge(
    found: Found,
    seed: u64,
    offset: u64,
    oldest: u32,
    newest: u32,
) -> Option<String> {
    // Until its first write is acknowledged a block may hold anything, but nothing torn by that
    // write.
    let was_written = oldest > 0;
    let must = || match oldest == newest {
        true => format!("generation {newest} was written"),
        false => format!("generations {oldest} to {newest} are possible"),
    };
    match found {
        Found::Block(it) if it.seed != seed => {
            was_written.then(|| format!("a block with seed {}; {}", it.seed, must()))
        }
        Found::Block(it) if it.offset != offset => {
            Some(format!("the block of offset {}; {}", it.offset, must()))
        }
        Found::Block(it) if it.generation < u64::from(oldest) => {
            Some(format!("the old generation {}; {}", it.generation, must()))
        }
        Found::Block(it) if it.generation > u64::from(newest) => {
            Some(format!("generation {}, which was never written; {}", it.generation, must()))
        }
        Found::Block(_) => None,
        Found::Torn(it) if it.seed == seed => {
            Some(format!("generation {} with a wrong checksum; {}", it.generation, must()))
        }
        Found::Torn(_) => was_written.then(|| format!("a damaged block; {}", must())),
        Found::Zeroes => was_written.then(|| format!("zeroes; {}", must())),
        Found::Foreign => was_written.then(|| format!("other data; {}", must())),
    }
}

/// Checks a block of which only the seed is known; returns whether it is one of this seed.
pub(super) fn judge_alone(data: &[u8], seed: u64, offset: u64) -> Result<bool, Mismatch> {
    let wrong = |what| Err(Mismatch { offset, what });
    match inspect(data) {
        Found::Block(it) if it.seed != seed => Ok(false),
        Found::Block(it) if it.offset != offset => {
            wrong(format!("the block of offset {}", it.offset))
        }
        Found::Block(_) => Ok(true),
        Found::Torn(it) if it.seed == seed => {
            wrong(format!("generation {} with a wrong checksum", it.generation))
        }
        Found::Torn(_) | Found::Zeroes | Found::Foreign => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::block::{Identity, fill};

    const LEN: u32 = 512;

    fn block() -> Vec<u8> {
        let mut data = vec![0; LEN as usize];
        fill(&mut data, Identity { seed: 9, offset: 512, generation: 7 });
        data
    }

    #[test]
    fn block_by_itself_shows_its_offset_and_its_damage() {
        assert_eq!(judge_alone(&block(), 9, 512), Ok(true));
        assert_eq!(judge_alone(&block(), 8, 512), Ok(false), "another seed");
        assert_eq!(judge_alone(&[0; 512], 9, 512), Ok(false));
        assert!(judge_alone(&block(), 9, 1024).is_err());
        let mut damaged = block();
        damaged[500] ^= 1;
        assert!(judge_alone(&damaged, 9, 512).is_err());
    }
}
