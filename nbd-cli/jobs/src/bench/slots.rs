//! The requests of one connection that are in flight.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Instant;

use nbd_proto::wire::Cookie;

use super::ledger::{Covered, Expected};
use super::options::RequestKind;
use super::targets::Target;

/// One request.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) target: Target,
    /// The time at which it was sent or, with a rate, was due.
    pub(super) started: Instant,
    /// The time at which it was sent on this connection.
    pub(super) sent: Instant,
    /// The ledger's epoch at that time.
    pub(super) epoch: u64,
    /// The generations that a READ may find.
    pub(super) expected: Vec<Expected>,
    /// The writes that a FLUSH covers.
    pub(super) covered: Covered,
    /// The data of a READ that is verified.
    pub(super) data: Vec<u8>,
    /// Its number in the order of requests.
    order: u64,
    is_used: bool,
}

/// Room for as many requests as may be in flight.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_cookie: HashMap<Cookie, usize, BuildHasherDefault<CookieHasher>>,
    made: u64,
}

impl Slots {
    pub(super) fn new(depth: usize) -> Self {
        let now = Instant::now();
        let slot = || Slot {
            target: Target { kind: RequestKind::Flush, offset: 0, length: 0 },
            started: now,
            sent: now,
            epoch: 0,
            expected: Vec::new(),
            covered: Vec::new(),
            data: Vec::new(),
            order: 0,
            is_used: false,
        };
        let slots = (0..depth).map(|_| slot()).collect();
        Self { slots, free: (0..depth).rev().collect(), by_cookie: HashMap::default(), made: 0 }
    }

    /// Number of requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether a request may be made.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes a free slot for a request.
    pub(super) fn take(&mut self, target: Target, started: Instant) -> Option<usize> {
        let index = self.free.pop()?;
        let slot = self.slots.get_mut(index)?;
        self.made += 1;
        (slot.target, slot.started, slot.order) = (target, started, self.made);
        slot.is_used = true;
        slot.covered.clear();
        Some(index)
    }

    pub(super) fn get(&mut self, index: usize) -> Option<&mut Slot> {
        self.slots.get_mut(index)
    }

    /// Records the cookie of a request on this connection.
    pub(super) fn name(&mut self, cookie: Cookie, index: usize) {
        self.by_cookie.insert(cookie, index);
    }

    pub(super) fn find(&self, cookie: Cookie) -> Option<usize> {
        self.by_cookie.get(&cookie).copied()
    }

    /// The request is over.
    pub(super) fn release(&mut self, cookie: Cookie) {
        if let Some(index) = self.by_cookie.remove(&cookie)
            && let Some(slot) = self.slots.get_mut(index)
        {
            slot.is_used = false;
            self.free.push(index);
        }
    }

    /// Returns the requests in flight, oldest first, and forgets their cookies: the connection is
    /// lost.
    pub(super) fn unanswered(&mut self) -> Vec<usize> {
        self.by_cookie.clear();
        let mut used: Vec<_> = (0..self.slots.len())
            .filter(|index| self.slots.get(*index).is_some_and(|slot| slot.is_used))
            .collect();
        used.sort_unstable_by_key(|index| self.slots.get(*index).map(|slot| slot.order));
        used
    }

    /// Returns the time at which the oldest request was sent.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.slots.iter().filter(|slot| slot.is_used).map(|slot| slot.sent).min()
    }
}

/// Cookies are counted up by this side, so a server cannot make them collide.
#[derive(Debug, Default)]
pub(super) struct CookieHasher(u64);

impl Hasher for CookieHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_named_and_given_back() {
        let mut slots = Slots::new(2);
        let target = Target { kind: RequestKind::Read, offset: 0, length: 512 };
        let first = slots.take(target, Instant::now()).expect("a place");
        slots.name(Cookie(7), first);
        let second = slots.take(target, Instant::now()).expect("a place");
        slots.name(Cookie(8), second);
        assert_eq!(slots.take(target, Instant::now()), None, "two are in flight");
        assert_eq!(slots.find(Cookie(8)), Some(second));
        slots.release(Cookie(7));
        assert_eq!((slots.in_flight(), slots.find(Cookie(7))), (1, None));
        let third = slots.take(target, Instant::now()).expect("a place");
        assert_eq!(slots.unanswered(), [second, third], "oldest first");
        assert_eq!(slots.find(Cookie(8)), None, "names are those of a connection");
    }
}
