//! The files inside file systems that the kernel knows, with their numbers.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::tree::FIRST_DYNAMIC;

/// A file of a file system, given by its index, and its path there: names joined by `/`, empty for
/// the root.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) volume: usize,
    pub(super) path: Vec<u8>,
}

impl Place {
    /// The place of an entry of this directory.
    pub(super) fn child(&self, name: &[u8]) -> Self {
        let mut path = self.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Self { volume: self.volume, path }
    }
}

/// The numbers of files: given at a lookup and kept until the kernel forgets all lookups.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The number of the last file.
    given: u64,
    numbers: HashMap<Place, u64>,
    places: HashMap<u64, (Place, u64)>,
}

impl Nodes {
    /// Counts a lookup and returns the number of the file.
    pub(super) fn look_up(&self, place: Place) -> u64 {
        let mut known = self.lock();
        if let Some(&number) = known.numbers.get(&place) {
            if let Some((_, lookups)) = known.places.get_mut(&number) {
                *lookups = lookups.saturating_add(1);
            }
            return number;
        }
        // 2^63 files are more than are ever looked up.
        known.given += 1;
        let number = FIRST_DYNAMIC + known.given;
        known.numbers.insert(place.clone(), number);
        known.places.insert(number, (place, 1));
        number
    }

    pub(super) fn place(&self, number: u64) -> Option<Place> {
        self.lock().places.get(&number).map(|(place, _)| place.clone())
    }

    /// Takes lookups back; at the last one the number is free.
    pub(super) fn forget(&self, number: u64, count: u64) {
        let mut known = self.lock();
        let Some((_, lookups)) = known.places.get_mut(&number) else { return };
        *lookups = lookups.saturating_sub(count);
        if *lookups == 0
            && let Some((place, _)) = known.places.remove(&number)
        {
            known.numbers.remove(&place);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_lasts_until_all_lookups_are_forgotten() {
        let nodes = Nodes::default();
        let root = Place { volume: 0, path: Vec::new() };
        let place = root.child(b"a").child(b"b");
        assert_eq!(place.path, b"a/b");
        let number = nodes.look_up(place.clone());
        assert_eq!(nodes.look_up(place.clone()), number);
        nodes.forget(number, 1);
        assert_eq!(nodes.place(number), Some(place.clone()));
        nodes.forget(number, 7);
        assert_eq!(nodes.place(number), None);
        assert_ne!(nodes.look_up(place), number);
    }
}
