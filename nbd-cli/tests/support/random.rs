//! Random numbers that a seed determines, for all tests of the program.

/// A sequence of numbers (xorshift64*).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The sequence of the [seed](seed_or) of this run, which a failed test prints.
    pub(crate) fn of_this_run(otherwise: u64) -> Self {
        let seed = seed_or(otherwise);
        eprintln!("repeat with NBD_SEED={seed}");
        Self::new(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns a number below `end`, which is above 0.
    pub(crate) fn below<N: TryInto<u64> + TryFrom<u64>>(&mut self, end: N) -> N {
        let end = end.try_into().ok().filter(|end| *end > 0).expect("a positive end");
        ((self.next() >> 11) % end).try_into().ok().expect("less than the end")
    }
}

/// Returns the seed in the environment, or else this one.
pub(crate) fn seed_or(otherwise: u64) -> u64 {
    std::env::var("NBD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(otherwise)
}

/// Returns bytes that do not compress.
#[cfg(feature = "object-storage")]
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = std::iter::repeat_with(|| random.next().to_le_bytes());
    let mut bytes: Vec<u8> = words.take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}
