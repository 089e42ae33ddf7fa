//! How much of each pack the backups need.

use std::collections::BTreeSet;

use super::super::id::PackId;
use super::super::stored::Stored;
use super::packs::Packs;

/// Most offsets of frames that are kept, in about 128 MiB. With more, less is found.
const KEPT_MAX: usize = 1 << 24;
/// Bytes of a frame in the directory of its pack, at most.
const ENTRY_LEN: u64 = 33;
/// Bytes of a pack that are none of a frame, at most.
const FIXED_LEN: u64 = 64;

/// A pack, and what is needed of it.
#[derive(Debug)]
struct Use {
    pack: PackId,
    size: u64,
    /// Bytes of the frames that are needed, with their entries of the directory.
    needed: u64,
    /// Where these begin.
    offsets: BTreeSet<u32>,
    /// What is needed besides does not matter: the pack stays.
    stays: bool,
    /// Whether it is known how much is needed.
    is_known: bool,
}

impl Use {
    fn unneeded(&self) -> u64 {
        self.size.saturating_sub(self.needed + FIXED_LEN)
    }

    fn stay(&mut self, kept: &mut usize) {
        *kept -= self.offsets.len();
        self.offsets.clear();
        self.stays = true;
    }
}

/// How much of each pack is needed.
#[derive(Debug)]
pub(super) struct Usage {
    packs: Vec<Use>,
    kept: usize,
    kept_max: usize,
    /// The part of a repository that may be unneeded.
    allowed: f64,
}

/// Packs that are compacted, and their bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) packs: BTreeSet<PackId>,
    pub(super) bytes: u64,
    /// Bytes of their frames that are needed.
    pub(super) needed: u64,
}

impl Usage {
    pub(super) fn new(packs: &Packs, allowed: f64) -> Self {
        let unused = |(pack, size)| Use {
            pack,
            size: u64::from(size),
            needed: 0,
            offsets: BTreeSet::new(),
            stays: false,
            is_known: true,
        };
        Self { packs: packs.iter().map(unused).collect(), kept: 0, kept_max: KEPT_MAX, allowed }
    }

    fn find(&mut self, pack: PackId) -> Option<&mut Use> {
        let at = self.packs.binary_search_by_key(&pack, |it| it.pack).ok()?;
        self.packs.get_mut(at)
    }

    /// A backup needs this frame.
    pub(super) fn add(&mut self, stored: &Stored) {
        let mut kept = self.kept;
        let Some(pack) = self.find(stored.pack) else { return };
        if pack.stays || !pack.offsets.insert(stored.offset) {
            return;
        }
        kept += 1;
        pack.needed += u64::from(stored.length) + ENTRY_LEN;
        if pack.unneeded() == 0 {
            pack.stay(&mut kept);
        }
        self.kept = kept;
        if self.kept > self.kept_max {
            self.forget_some();
        }
    }

    /// A backup needs the pack, and it is not known what of it.
    pub(super) fn keep(&mut self, pack: PackId) {
        let mut kept = self.kept;
        if let Some(pack) = self.find(pack) {
            pack.needed = pack.size;
            pack.stay(&mut kept);
        }
        self.kept = kept;
    }

    /// Lets go of packs of which enough is needed, and of others until half of the room is free.
    fn forget_some(&mut self) {
        let (mut kept, allowed) = (self.kept, self.allowed);
        for pack in &mut self.packs {
            if pack.unneeded() as f64 <= allowed * pack.size as f64 {
                pack.stay(&mut kept);
            }
        }
        for pack in self.packs.iter_mut().rev() {
            if kept <= self.kept_max / 2 {
                break;
            }
            if !pack.offsets.is_empty() {
                pack.is_known = false;
                pack.stay(&mut kept);
            }
        }
        self.kept = kept;
    }

    /// Bytes of packs of which nothing is needed, as far as `is_meant`.
    pub(super) fn garbage(&self, is_meant: impl Fn(PackId) -> bool) -> u64 {
        let unneeded = self.packs.iter().filter(|it| it.needed == 0 && is_meant(it.pack));
        unneeded.map(|it| it.size).sum()
    }

    /// Chooses packs of which the least is needed, until no more than the allowed part of what
    /// remains is unneeded, of the packs of which this is known.
    pub(super) fn choose(&self) -> Choice {
        let packs = || self.packs.iter().filter(|it| it.needed > 0 && it.is_known);
        let mut total: u64 = packs().map(|it| it.size).sum();
        let mut unneeded: u64 = packs().map(Use::unneeded).sum();
        let mut candidates: Vec<_> = packs().filter(|it| !it.stays && it.unneeded() > 0).collect();
        // By the part that is unneeded: a/b > c/d.
        candidates.sort_by_key(|it| std::cmp::Reverse((it.unneeded() << 20) / it.size.max(1)));
        let mut choice = Choice::default();
        for it in candidates {
            if unneeded as f64 <= self.allowed * total as f64 {
                break;
            }
            unneeded -= it.unneeded();
            total -= it.unneeded();
            choice.packs.insert(it.pack);
            choice.bytes += it.size;
            choice.needed += it.needed - it.offsets.len() as u64 * ENTRY_LEN;
        }
        choice
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::id::Id;
    use super::super::super::seal::Hash;
    use super::*;

    fn pack(number: u32) -> PackId {
        PackId { session: Id::from_bytes([1; 16]), number }
    }

    fn frame(number: u32, offset: u32, length: u32) -> Stored {
        Stored { pack: pack(number), offset, length, hash: Hash([0; 16]) }
    }

    /// Packs of 1000 bytes, of which so many are needed.
    fn usage(needed: &[u32], allowed: f64) -> Usage {
        let packs = (0..needed.len() as u32).map(|number| (pack(number), 1064)).collect();
        let mut usage = Usage::new(&Packs::of(packs), allowed);
        for (number, &needed) in (0..).zip(needed) {
            for offset in (0..needed).step_by(100) {
                // Several backups need it.
                for _ in 0..3 {
                    usage.add(&frame(number, offset, 67));
                }
            }
        }
        usage
    }

    #[test]
    fn packs_of_which_the_least_is_needed_are_chosen_first() {
        let needed = [1000, 0, 900, 300, 600];
        let chosen = |allowed| {
            let usage = usage(&needed, allowed);
            assert_eq!(usage.garbage(|_| true), 1064);
            usage.choose().packs.into_iter().map(|pack| pack.number).collect::<Vec<_>>()
        };
        assert_eq!(chosen(1.0), [0; 0]);
        // 1200 of 4256 are unneeded; without those of pack 3, 500 of 3556.
        assert_eq!(chosen(0.29), [0; 0]);
        assert_eq!(chosen(0.28), [3]);
        assert_eq!(chosen(0.15), [3]);
        assert_eq!(chosen(0.14), [3, 4]);
        assert_eq!(chosen(0.0), [2, 3, 4]);
        let choice = usage(&needed, 0.15).choose();
        assert_eq!((choice.bytes, choice.needed), (1064, 3 * 67));
    }

    #[test]
    fn what_is_needed_in_an_unknown_way_is_not_chosen() {
        let mut usage = usage(&[300, 300], 0.0);
        usage.keep(pack(0));
        usage.add(&frame(0, 400, 50));
        assert_eq!(usage.choose().packs, BTreeSet::from([pack(1)]));
        // Those that are not in the list are of others.
        usage.add(&frame(9, 400, 50));
        usage.keep(pack(9));
        assert_eq!(usage.choose().packs, BTreeSet::from([pack(1)]));
    }

    #[test]
    fn packs_of_which_not_all_is_known_do_not_have_others_compacted() {
        let packs = (0..100).map(|number| (pack(number), 100_000)).collect();
        let mut usage = Usage::new(&Packs::of(packs), 0.05);
        usage.kept_max = 200;
        for offset in 0..50 {
            // All is needed of all but the first one, of which almost all is.
            for number in u32::from(offset == 49)..100 {
                usage.add(&frame(number, offset * 2000, 1967));
            }
        }
        assert!(usage.packs[99].stays && !usage.packs[0].stays);
        assert_eq!(usage.choose(), Choice::default());
    }

    #[test]
    fn memory_is_bounded_and_some_packs_are_still_chosen() {
        let packs = (0..100).map(|number| (pack(number), 100_000)).collect();
        let mut usage = Usage::new(&Packs::of(packs), 0.05);
        usage.kept_max = 200;
        for offset in 0..50 {
            for number in 0..100 {
                usage.add(&frame(number, offset * 500, 300));
                assert!(usage.kept <= 200);
                let kept: usize = usage.packs.iter().map(|it| it.offsets.len()).sum();
                assert_eq!(kept, usage.kept);
            }
        }
        let choice = usage.choose();
        assert!((1..=4).contains(&choice.packs.len()), "{choice:?}");
        assert_eq!(choice.needed, choice.packs.len() as u64 * 50 * 300);
    }
}
