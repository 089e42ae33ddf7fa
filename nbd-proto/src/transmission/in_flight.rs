//! The requests in flight of one connection, by cookie.

use std::collections::HashMap;

use crate::wire::Cookie;

/// Number of places that the first request allocates.
const LEAST_PLACES: usize = 16;

/// A table for consecutive cookies.
///
/// Requests are usually answered roughly in their order, so the cookies in flight are close
/// together: the lowest bits of a cookie choose its place, without a hash. A request that is still
/// unanswered when a later one needs its place is moved to a hash map. So the table needs memory
/// only for the requests in flight, even if the server leaves old ones unanswered.
#[derive(Debug)]
pub(super) struct InFlight<T> {
    /// A power of two of places, at most half of them taken; or no places.
    places: Vec<Option<(Cookie, T)>>,
    /// Number of places that are taken.
    taken: usize,
    /// Requests that a later one displaced. The server can choose their cookies, so they are hashed
    /// with a secret key.
    displaced: HashMap<Cookie, T>,
}

impl<T> Default for InFlight<T> {
    fn default() -> Self {
        Self { places: Vec::new(), taken: 0, displaced: HashMap::new() }
    }
}

impl<T> InFlight<T> {
    /// The number of requests.
    pub(super) fn len(&self) -> usize {
        self.taken + self.displaced.len()
    }

    /// Adds a request. Its cookie is not in the table yet.
    pub(super) fn insert(&mut self, cookie: Cookie, value: T) {
        if self.taken.saturating_mul(2) >= self.places.len() {
            self.grow();
        }
        let index = self.index(cookie);
        let Some(place) = self.places.get_mut(index) else { return };
        match place.replace((cookie, value)) {
            Some((earlier, value)) => {
                self.displaced.insert(earlier, value);
            }
            None => self.taken += 1,
        }
    }

    /// The request with this cookie.
    pub(super) fn get(&self, cookie: Cookie) -> Option<&T> {
        match self.places.get(self.index(cookie)) {
            Some(Some((found, value))) if *found == cookie => Some(value),
            _ if self.displaced.is_empty() => None,
            _ => self.displaced.get(&cookie),
        }
    }

    /// The request with this cookie, to be changed.
    pub(super) fn get_mut(&mut self, cookie: Cookie) -> Option<&mut T> {
        let index = self.index(cookie);
        match self.places.get_mut(index) {
            Some(Some((found, value))) if *found == cookie => Some(value),
            _ if self.displaced.is_empty() => None,
            _ => self.displaced.get_mut(&cookie),
        }
    }

    /// Removes the request with this cookie.
    pub(super) fn remove(&mut self, cookie: Cookie) -> Option<T> {
        let index = self.index(cookie);
        match self.places.get_mut(index) {
            Some(place) if place.as_ref().is_some_and(|(found, _)| *found == cookie) => {
                self.taken = self.taken.saturating_sub(1);
                place.take().map(|(_, value)| value)
            }
            _ if self.displaced.is_empty() => None,
            _ => self.displaced.remove(&cookie),
        }
    }

    fn index(&self, cookie: Cookie) -> usize {
        // Only the lowest bits count.
        cookie.0 as usize & self.places.len().wrapping_sub(1)
    }

    /// Doubles the number of places. Every request in a place keeps one.
    fn grow(&mut self) {
        let length = self.places.len().saturating_mul(2).max(LEAST_PLACES);
        let mut places = Vec::new();
        places.resize_with(length, || None);
        let earlier = std::mem::replace(&mut self.places, places);
        for (cookie, value) in earlier.into_iter().flatten() {
            let index = self.index(cookie);
            if let Some(place) = self.places.get_mut(index) {
                *place = Some((cookie, value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_does_what_a_map_does() {
        let mut random = 1_u64;
        let mut below = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        for (first, depth) in [(1, 1), (1, 16), (1, 300), (u64::MAX - 5, 16)] {
            let mut table = InFlight::default();
            let mut map = HashMap::new();
            let mut next = first;
            for _ in 0..4000 {
                if (map.len() as u64) < depth && below(5) < 3 {
                    table.insert(Cookie(next), next);
                    map.insert(Cookie(next), next);
                    next = next.wrapping_add(1);
                }
                // One that may be in flight, was answered, or was never made.
                let any = Cookie(next.wrapping_sub(below(2 * depth + 2)).wrapping_add(1));
                assert_eq!(table.get(any), map.get(&any));
                if let Some(value) = table.get_mut(any) {
                    *value ^= 1;
                }
                if let Some(value) = map.get_mut(&any) {
                    *value ^= 1;
                }
                if below(2) == 0 {
                    assert_eq!(table.remove(any), map.remove(&any), "{any:?}");
                }
                assert_eq!(table.len(), map.len());
            }
            for (cookie, value) in map {
                assert_eq!(table.remove(cookie), Some(value));
            }
            assert_eq!(table.len(), 0);
        }
    }

    #[test]
    fn requests_that_are_never_answered_do_not_make_it_grow_without_bound() {
        let mut table = InFlight::default();
        for cookie in 0..1_000_000 {
            table.insert(Cookie(cookie), cookie);
            // Of 16 requests in flight, the server leaves 15 open whose places collide.
            if cookie % 64 != 0 || cookie >= 15 * 64 {
                assert_eq!(table.remove(Cookie(cookie)), Some(cookie));
            }
        }
        assert_eq!(table.len(), 15);
        assert!(table.places.len() <= 64, "{}", table.places.len());
        for cookie in (0..15).map(|index| index * 64) {
            assert_eq!(table.remove(Cookie(cookie)), Some(cookie));
            assert_eq!(table.remove(Cookie(cookie)), None);
        }
        assert_eq!(table.len(), 0);
    }
}
