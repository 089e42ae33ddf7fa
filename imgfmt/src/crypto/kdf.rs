//! Derivation of keys from passphrases, with bounded costs: a header is untrusted, and one that
//! demands hours of work or all memory is refused.

use std::time::Duration;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use openssl::hash::MessageDigest;
use zeroize::{Zeroize as _, Zeroizing};

use super::error::{invalid, library, unsupported};
use super::memory;
use crate::error::{Error, ErrorKind, Result};
use crate::ordered_lock::{OrderedMutex, rank};

/// What may be done to try one slot. PBKDF2: about two minutes of SHA-256. `cryptsetup` and QEMU
/// choose what takes one or two seconds, about 10 million iterations of SHA-1 a second on fast
/// machines; `--iter-time 10000` is ten seconds. Argon2: 16 GiB; `cryptsetup` chooses 1 GiB and
/// about 4 passes, more if the user wants it.
const SLOT_MAX: Work = Work { iterations: 200_000_000, blocks: 16 << 20 };
/// What may be done to try all slots of a header with one passphrase: there may be 32.
const HEADER_MAX: Work = Work { iterations: 400_000_000, blocks: 128 << 20 };
/// Memory for Argon2 in KiB: the maximum of `cryptsetup`.
const ARGON2_MEMORY_MAX: u32 = 4 << 20;
/// Threads that a header may ask for. They are worked through one after the other.
const ARGON2_LANES_MAX: u32 = 64;

/// Iterations of PBKDF2 for a new slot: a guess takes at least some hundredths of a second.
const ITERATIONS_MIN: u32 = 100_000;
/// All eight slots of a header can have as many within [`HEADER_MAX`].
const ITERATIONS_MAX: u32 = 20_000_000;
/// What is measured to find out how fast this processor is.
const MEASURED_MIN: Duration = Duration::from_millis(40);

/// Held while Argon2 fills memory: several images that are opened together take it one after the
/// other.
static MEMORY_USER: OrderedMutex<{ rank::KEY_DERIVATION }, ()> = OrderedMutex::new(());

/// A function that derives keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kdf {
    Pbkdf2 { hash: String, iterations: u32, salt: Vec<u8> },
    Argon2 { is_id: bool, passes: u32, memory_kib: u32, lanes: u32, salt: Vec<u8> },
}

/// Work on the derivation of keys.
#[derive(Clone, Copy, Debug)]
struct Work {
    /// Iterations of PBKDF2 with SHA-256, counted per block of output.
    iterations: u64,
    /// Blocks of 1 KiB that Argon2 fills.
    blocks: u64,
}

impl Work {
    fn without(self, other: Self) -> Option<Self> {
        Some(Self {
            iterations: self.iterations.checked_sub(other.iterations)?,
            blocks: self.blocks.checked_sub(other.blocks)?,
        })
    }
}

/// The work that may still be done to try the slots of a header with one passphrase.
#[derive(Debug)]
pub(super) struct Budget {
    slot: Work,
    header: Work,
}

impl Default for Budget {
    fn default() -> Self {
        Self { slot: SLOT_MAX, header: HEADER_MAX }
    }
}

impl Budget {
    /// Another slot begins.
    pub(super) fn begin_slot(&mut self) {
        self.slot = SLOT_MAX;
    }

    /// Takes work that costs as much as this many iterations of PBKDF2.
    pub(super) fn charge(&mut self, iterations: u64) -> Result<()> {
        self.take(Work { iterations, blocks: 0 }, || {
            "its encryption header asks for so many iterations of PBKDF2 that trying a key slot takes \
             minutes, which is refused"
                .to_owned()
        })
    }

    /// Takes work before it is done; `too_much` says that the slot asks for too much of it.
    fn take(&mut self, work: Work, too_much: impl FnOnce() -> String) -> Result<()> {
        let slot = self.slot.without(work).ok_or_else(|| unsupported(too_much()))?;
        self.header = self.header.without(work).ok_or_else(|| {
            unsupported("trying the key slots before took as much work as is allowed")
        })?;
        self.slot = slot;
        Ok(())
    }
}

impl Kdf {
    /// Derives a key of `length` bytes.
    pub(super) fn derive(
        &self,
        secret: &[u8],
        length: usize,
        budget: &mut Budget,
    ) -> Result<Zeroizing<Vec<u8>>> {
        let mut key = Zeroizing::new(vec![0; length]);
        match self {
            Self::Pbkdf2 { hash, iterations, salt } => {
                let hash = super::hash::by_name(hash)?;
                pbkdf2(secret, (salt, *iterations, hash), &mut key, budget)?;
            }
            Self::Argon2 { is_id, passes, memory_kib, lanes, salt } => {
                let algorithm = if *is_id { Algorithm::Argon2id } else { Algorithm::Argon2i };
                let costs = (*passes, *memory_kib, *lanes);
                argon2(algorithm, secret, salt, costs, &mut key, budget)?;
            }
        }
        Ok(key)
    }
}

/// Fills `key` by PBKDF2 with HMAC.
pub(super) fn pbkdf2(
    secret: &[u8],
    (salt, iterations, hash): (&[u8], u32, MessageDigest),
    key: &mut [u8],
    budget: &mut Budget,
) -> Result<()> {
    if iterations == 0 {
        return Err(invalid("its encryption header asks for no iterations of PBKDF2"));
    }
    let blocks = key.len().div_ceil(hash.size()) as u64;
    let iterations_in_all = blocks.saturating_mul(iterations.into());
    budget.charge(iterations_in_all.saturating_mul(super::hash::cost(hash)))?;
    openssl::pkcs5::pbkdf2_hmac(secret, salt, iterations as usize, hash, key)
        .map_err(|error| library(&error))
}

/// Iterations of PBKDF2 that fill `length` bytes in this much time of this processor, within
/// bounds. The time that other programs take from this thread does not count.
pub(super) fn iterations_within(time: Duration, length: usize, hash: MessageDigest) -> Result<u32> {
    let mut key = Zeroizing::new(vec![0; length]);
    let mut iterations = ITERATIONS_MIN / 10;
    loop {
        let before = processor_time();
        openssl::pkcs5::pbkdf2_hmac(b"measured", &[0; 32], iterations as usize, hash, &mut key)
            .map_err(|error| library(&error))?;
        let taken = processor_time().saturating_sub(before);
        if taken >= MEASURED_MIN || iterations >= ITERATIONS_MAX / 2 {
            let per_nanosecond = f64::from(iterations) / taken.as_nanos().max(1) as f64;
            let found = per_nanosecond * time.as_nanos() as f64;
            // Floats saturate in this conversion.
            return Ok((found as u32).clamp(ITERATIONS_MIN, ITERATIONS_MAX));
        }
        iterations *= 2;
    }
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

fn argon2(
    algorithm: Algorithm,
    secret: &[u8],
    salt: &[u8],
    (passes, memory_kib, lanes): (u32, u32, u32),
    key: &mut [u8],
    budget: &mut Budget,
) -> Result<()> {
    let too_much = |what: String| {
        format!("its encryption header asks for {what} to derive a key, which is refused")
    };
    if memory_kib > ARGON2_MEMORY_MAX {
        return Err(unsupported(too_much(format!("{memory_kib} KiB of memory"))));
    }
    if lanes > ARGON2_LANES_MAX {
        return Err(unsupported(too_much(format!("{lanes} threads"))));
    }
    let blocks = u64::from(passes).saturating_mul(memory_kib.into());
    budget.take(Work { iterations: 0, blocks }, || {
        too_much(format!("{passes} passes over {memory_kib} KiB of memory"))
    })?;
    let params = Params::new(memory_kib, passes, lanes, Some(key.len())).map_err(strange)?;
    let _held = MEMORY_USER.lock();
    let too_little = || {
        let detail = format!(
            "deriving its key takes {} MiB of memory, which this process may not or cannot use now",
            memory_kib.div_ceil(1024)
        );
        Error::new(ErrorKind::Io, "open", detail)
    };
    if u64::from(memory_kib) * 1024 > memory::available() / 5 * 4 {
        return Err(too_little());
    }
    let mut memory = Vec::new();
    let count = params.block_count();
    memory.try_reserve_exact(count).map_err(|_| too_little())?;
    memory.resize(count, Block::new());
    let derived = Argon2::new(algorithm, Version::V0x13, params).hash_password_into_with_memory(
        secret,
        salt,
        key,
        &mut memory[..],
    );
    memory.iter_mut().for_each(|block| block.zeroize());
    derived.map_err(strange)
}

fn strange(error: argon2::Error) -> Error {
    invalid(format!("the parameters of Argon2 in its encryption header are not possible: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn derive(kdf: &Kdf) -> Result<Zeroizing<Vec<u8>>> {
        kdf.derive(b"password", 32, &mut Budget::default())
    }

    #[test]
    fn costs_that_would_take_hours_or_all_memory_are_refused_before_any_work() {
        let salt = vec![7; 32];
        let pbkdf2 =
            |iterations| Kdf::Pbkdf2 { hash: "sha256".into(), iterations, salt: salt.clone() };
        let argon2 = |passes, memory_kib, lanes| Kdf::Argon2 {
            is_id: true,
            passes,
            memory_kib,
            lanes,
            salt: salt.clone(),
        };
        for kdf in [
            pbkdf2(0),
            pbkdf2(u32::MAX),
            argon2(4, 64 << 20, 4),
            argon2(u32::MAX, 32, 1),
            argon2(1, 1 << 20, u32::MAX),
            argon2(0, 32, 1),
            argon2(4, 0, 1),
            argon2(1, 32, 0),
        ] {
            assert!(derive(&kdf).is_err(), "{kdf:?}");
        }
        assert!(derive(&pbkdf2(1000)).is_ok());
        assert!(derive(&argon2(4, 32, 2)).is_ok());
    }

    #[test]
    fn what_patient_users_of_cryptsetup_choose_is_within_the_budget_of_a_slot() {
        let mut budget = Budget::default();
        // --iter-time 10000, with a digest of the key.
        assert!(budget.charge(100_000_000).and_then(|()| budget.charge(2_000_000)).is_ok());
        let (gibibyte, passes) = (1 << 20, 12);
        assert!(gibibyte * passes <= budget.slot.blocks);
    }

    #[test]
    fn the_budget_covers_all_that_is_derived_for_a_slot() {
        let kdf = Kdf::Pbkdf2 { hash: "sha1".into(), iterations: 1000, salt: vec![1; 32] };
        let work = Work { iterations: 3000, blocks: 0 };
        let mut budget = Budget { slot: work, header: SLOT_MAX };
        // 32 bytes are two blocks of SHA-1.
        assert!(kdf.derive(b"x", 32, &mut budget).is_ok());
        assert!(kdf.derive(b"x", 32, &mut budget).is_err());
    }

    #[test]
    fn all_slots_of_a_header_together_take_no_more_than_its_budget() {
        let mut budget = Budget::default();
        let mut taken = 0;
        for _slot in 0..32 {
            budget.begin_slot();
            assert!(budget.charge(SLOT_MAX.iterations + 1).is_err(), "a slot is too expensive");
            match budget.charge(SLOT_MAX.iterations - 1) {
                Ok(()) => taken += SLOT_MAX.iterations - 1,
                Err(error) => assert!(error.to_string().contains("slots before"), "{error}"),
            }
        }
        assert!(taken <= HEADER_MAX.iterations && taken > SLOT_MAX.iterations, "{taken}");
        // What Argon2 would do counts before it is done.
        let kdf =
            Kdf::Argon2 { is_id: true, passes: 1, memory_kib: 64, lanes: 1, salt: vec![1; 16] };
        let header = Work { iterations: 0, blocks: 150 };
        let mut budget = Budget { slot: SLOT_MAX, header };
        let derived = [(); 3].map(|()| kdf.derive(b"x", 32, &mut budget).is_ok());
        assert_eq!(derived, [true, true, false]);
    }

    #[test]
    fn new_slots_have_as_many_iterations_as_the_time_allows_within_bounds() {
        let hash = MessageDigest::sha256();
        let within = |time| iterations_within(time, 64, hash).unwrap();
        assert_eq!(within(Duration::ZERO), ITERATIONS_MIN);
        assert_eq!(within(Duration::MAX), ITERATIONS_MAX);
        // A header with eight of the most expensive slots is opened.
        let mut budget = Budget::default();
        for _slot in 0..8 {
            budget.begin_slot();
            let slot = budget.charge(2 * u64::from(ITERATIONS_MAX) + 64 * 4000);
            slot.and_then(|()| budget.charge(u64::from(ITERATIONS_MAX / 8))).unwrap();
        }
    }

    #[test]
    fn iterations_of_slow_hashes_cost_more() {
        let left = |hash: &str| {
            let kdf = Kdf::Pbkdf2 { hash: hash.into(), iterations: 1000, salt: vec![1; 32] };
            let mut budget = Budget::default();
            kdf.derive(b"x", 16, &mut budget).unwrap();
            SLOT_MAX.iterations - budget.slot.iterations
        };
        assert_eq!(["sha1", "sha256", "sha512"].map(left), [1000, 1000, 2000]);
        assert_eq!(left("ripemd160"), 4000);
    }
}
