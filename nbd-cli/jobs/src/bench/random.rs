//! Random numbers that a seed repeats, and the Zipf distribution.

/// A generator of the kind xoshiro256++.
#[derive(Clone, Debug)]
pub(super) struct Random {
    state: [u64; 4],
}

impl Random {
    /// The numbers of `stream` with this seed; other streams have other numbers.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut at = mix(seed ^ mix(stream.wrapping_add(1)));
        let state = [(); 4].map(|()| {
            at = at.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(at)
        });
        Self { state }
    }

    /// 64 random bits.
    pub(super) fn next(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// A number below `limit`; 0 if that is 0.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// A number from 0 to below 1.
    fn unit(&mut self) -> f64 {
        const SCALE: f64 = 1.0 / (1_u64 << 53) as f64;
        (self.next() >> 11) as f64 * SCALE
    }

    /// Fills a buffer.
    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        let (words, rest) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = self.next().to_le_bytes();
        }
        let last = self.next().to_le_bytes();
        rest.copy_from_slice(last.get(..rest.len()).unwrap_or_default());
    }
}

/// Spreads the bits of a number: every bit of the result depends on every bit of `value`.
pub(super) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Numbers below a limit of which few are frequent: the one of rank r comes with a frequency
/// proportional to `r^-theta`. Frequent ones are scattered over the range.
///
/// Samples by rejection and inversion (Hörmann and Derflinger, 1996): no table, for any limit.
#[derive(Clone, Debug)]
pub(super) struct Zipf {
    items: u64,
    theta: f64,
    /// The integral of the density at the ends of the range, and the bound of the quick acceptance.
    first: f64,
    last: f64,
    quick: f64,
    /// Has no factor in common with `items`: it scatters the ranks.
    stride: u64,
}

impl Zipf {
    /// Numbers below `items` (at least 1). `theta` is above 0.
    pub(super) fn new(items: u64, theta: f64) -> Self {
        let items = items.max(1);
        let mut zipf = Self { items, theta, first: 0.0, last: 0.0, quick: 0.0, stride: 1 };
        zipf.first = zipf.integral(1.5) - 1.0;
        zipf.last = zipf.integral(items as f64 + 0.5);
        zipf.quick = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.density(2.0));
        zipf.stride = stride(items);
        zipf
    }

    /// A number below the limit.
    pub(super) fn sample(&self, random: &mut Random) -> u64 {
        let rank = self.rank(random) - 1;
        ((u128::from(rank) * u128::from(self.stride)) % u128::from(self.items)) as u64
    }

    /// A rank from 1 to `items`.
    fn rank(&self, random: &mut Random) -> u64 {
        loop {
            let at = self.last + random.unit() * (self.first - self.last);
            let exact = self.inverse(at);
            let rank = (exact + 0.5).floor().clamp(1.0, self.items as f64);
            if rank - exact <= self.quick || at >= self.integral(rank + 0.5) - self.density(rank) {
                return (rank as u64).clamp(1, self.items);
            }
        }
    }

    fn density(&self, at: f64) -> f64 {
        at.powf(-self.theta)
    }

    /// An integral of the density; 0 at 1.
    fn integral(&self, at: f64) -> f64 {
        let exponent = 1.0 - self.theta;
        if exponent.abs() < 1e-9 { at.ln() } else { (at.powf(exponent) - 1.0) / exponent }
    }

    fn inverse(&self, value: f64) -> f64 {
        let exponent = 1.0 - self.theta;
        if exponent.abs() < 1e-9 {
            value.exp()
        } else {
            (value * exponent + 1.0).max(0.0).powf(1.0 / exponent)
        }
    }
}

/// About 0.618 of `items`, without a common factor.
fn stride(items: u64) -> u64 {
    let mut candidate = ((u128::from(items) * 0x9e37_79b9_7f4a_7c15) >> 64) as u64 | 1;
    while greatest_common_divisor(candidate, items) != 1 {
        candidate = candidate.wrapping_add(2);
    }
    candidate
}

const fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_repeats_the_numbers_and_streams_differ() {
        let numbers = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [(); 4].map(|()| random.next())
        };
        assert_eq!(numbers(1, 0), numbers(1, 0));
        assert_ne!(numbers(1, 0), numbers(1, 1));
        assert_ne!(numbers(1, 0), numbers(2, 0));
    }

    #[test]
    fn numbers_below_a_limit_are_even() {
        let mut random = Random::new(7, 0);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[random.below(10) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (9_400..10_600).contains(count)), "{counts:?}");
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn zipf_has_the_frequencies_of_its_definition() {
        for theta in [0.5, 0.99, 1.0, 1.2] {
            let items = 1000_u64;
            let zipf = Zipf::new(items, theta);
            let mut random = Random::new(3, 0);
            let total: f64 = (1..=items).map(|rank| (rank as f64).powf(-theta)).sum();
            let draws = 400_000;
            let mut counts = vec![0_u32; items as usize + 1];
            for _ in 0..draws {
                counts[zipf.rank(&mut random) as usize] += 1;
            }
            for rank in [1, 2, 3, 10] {
                let expected = f64::from(draws) * f64::from(rank as u32).powf(-theta) / total;
                let found = f64::from(counts[rank]);
                // Six standard deviations.
                let allowed = 6.0 * expected.sqrt();
                assert!((found - expected).abs() < allowed, "{theta} {rank}: {found}, {expected}");
            }
        }
    }

    #[test]
    fn zipf_reaches_every_item_and_none_beyond() {
        for items in [1, 2, 7, 64, 100] {
            let zipf = Zipf::new(items, 0.3);
            let mut random = Random::new(items, 0);
            let mut seen = vec![false; items as usize];
            for _ in 0..20_000 {
                seen[zipf.sample(&mut random) as usize] = true;
            }
            assert!(seen.iter().all(|seen| *seen), "{items}");
        }
        let huge = Zipf::new(1 << 50, 0.99);
        let mut random = Random::new(1, 0);
        assert!((0..1000).all(|_| huge.sample(&mut random) < 1 << 50));
    }
}
