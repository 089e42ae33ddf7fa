//! The share that each connection has of the reads and writes of a ring, which are called reads
//! here.
//!
//! A disk carries out many reads at once, but reads that it has already precede all later ones. So
//! the number of reads and of bytes at the disk is limited for each connection, and for all
//! connections of a thread together. Further reads wait here; the next to start is one of the
//! connection with the fewest bytes at the disk. A connection without a started read may always
//! start one, as long as the ring has room.

use std::collections::{BTreeMap, VecDeque};

/// Reads under way: of a connection, and of all.
const READS_OF_ONE: usize = 64;
const READS_OF_ALL: usize = 128;
/// The same in bytes.
const BYTES_OF_ONE: usize = 4 << 20;
const BYTES_OF_ALL: usize = 8 << 20;

/// Identifies a connection; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LaneId(u64);

/// Reads under way, and those that wait for them.
#[derive(Debug)]
pub(super) struct Shares<T> {
    connections: BTreeMap<LaneId, Connection<T>>,
    next_id: u64,
    /// Reads that were started, ever.
    started: u64,
    waiting: usize,
    reads: usize,
    bytes: usize,
    /// Reads that the ring has room for.
    most: usize,
}

#[derive(Debug)]
struct Connection<T> {
    reads: usize,
    bytes: usize,
    /// The number of its last started read.
    latest: u64,
    waiting: VecDeque<(usize, T)>,
}

impl<T> Default for Connection<T> {
    fn default() -> Self {
        Self { reads: 0, bytes: 0, latest: 0, waiting: VecDeque::new() }
    }
}

impl<T> Shares<T> {
    pub(super) const fn new(most: usize) -> Self {
        Self {
            connections: BTreeMap::new(),
            next_id: 0,
            started: 0,
            waiting: 0,
            reads: 0,
            bytes: 0,
            most,
        }
    }

    pub(super) const fn open(&mut self) -> LaneId {
        let id = LaneId(self.next_id);
        self.next_id += 1;
        id
    }

    /// Queues a read of `length` bytes after the others of its connection.
    pub(super) fn push(&mut self, id: LaneId, length: usize, read: T) {
        self.connections.entry(id).or_default().waiting.push_back((length, read));
        self.waiting += 1;
    }

    /// The read that is started next, if one may be, with its connection and its length.
    pub(super) fn pop(&mut self) -> Option<(LaneId, usize, T)> {
        if self.waiting == 0 || self.reads >= self.most {
            return None;
        }
        let may_start = self.connections.iter().filter(|(_, connection)| self.has_room(connection));
        let (_, id) = may_start.map(|(id, one)| ((one.bytes, one.latest), *id)).min()?;
        let connection = self.connections.get_mut(&id)?;
        let (length, read) = connection.waiting.pop_front()?;
        self.started += 1;
        connection.latest = self.started;
        connection.reads += 1;
        connection.bytes += length;
        self.waiting -= 1;
        self.reads += 1;
        self.bytes += length;
        Some((id, length, read))
    }

    fn has_room(&self, connection: &Connection<T>) -> bool {
        let Some((length, _)) = connection.waiting.front() else { return false };
        let fits = |reads, bytes, most_reads, most_bytes| {
            reads < most_reads && bytes + length <= most_bytes
        };
        connection.reads == 0
            || fits(connection.reads, connection.bytes, READS_OF_ONE, BYTES_OF_ONE)
                && fits(self.reads, self.bytes, READS_OF_ALL, BYTES_OF_ALL)
    }

    /// Whether any read waits.
    pub(super) const fn has_waiting(&self) -> bool {
        self.waiting > 0
    }

    /// A read has ended.
    pub(super) fn finish(&mut self, id: LaneId, length: usize) {
        self.reads -= 1;
        self.bytes -= length;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.reads -= 1;
            connection.bytes -= length;
        }
        self.forget(id);
    }

    /// The connection has ended: its reads that wait are returned, but for those that are wanted
    /// still.
    pub(super) fn close(&mut self, id: LaneId, is_wanted: impl Fn(&T) -> bool) -> Vec<(usize, T)> {
        let Some(connection) = self.connections.get_mut(&id) else { return Vec::new() };
        let waiting = std::mem::take(&mut connection.waiting);
        let (wanted, abandoned): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|(_, read)| is_wanted(read));
        connection.waiting = wanted.into();
        self.waiting -= abandoned.len();
        self.forget(id);
        abandoned
    }

    /// All reads that wait, which will not be started.
    pub(super) fn give_up(&mut self) -> Vec<T> {
        self.waiting = 0;
        let waiting =
            self.connections.values_mut().flat_map(|one| std::mem::take(&mut one.waiting));
        waiting.map(|(_, read)| read).collect()
    }

    /// Forgets a connection that has no reads.
    fn forget(&mut self, id: LaneId) {
        if self.connections.get(&id).is_some_and(|one| one.reads == 0 && one.waiting.is_empty()) {
            self.connections.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: usize = 4096;
    const LARGE: usize = 1 << 20;

    fn start_all(shares: &mut Shares<&'static str>) -> Vec<(LaneId, usize, &'static str)> {
        std::iter::from_fn(|| shares.pop()).collect()
    }

    #[test]
    fn a_connection_has_a_bounded_number_of_reads_and_bytes_under_way() {
        for (length, most) in [(SMALL, READS_OF_ONE), (LARGE, BYTES_OF_ONE / LARGE)] {
            let mut shares = Shares::new(256);
            let greedy = shares.open();
            for _ in 0..200 {
                shares.push(greedy, length, "greedy");
            }
            assert_eq!(start_all(&mut shares).len(), most);
            shares.finish(greedy, length);
            assert_eq!(start_all(&mut shares).len(), 1, "one ended, one starts");
        }
    }

    #[test]
    fn a_connection_with_nothing_under_way_starts_at_once_however_many_reads_others_have() {
        let mut shares = Shares::new(256);
        for _ in 0..20 {
            let greedy = shares.open();
            for _ in 0..20 {
                shares.push(greedy, LARGE, "greedy");
            }
        }
        let before = start_all(&mut shares);
        assert_eq!(before.len(), 20, "one of each");
        let modest = shares.open();
        shares.push(modest, SMALL, "modest");
        assert_eq!(start_all(&mut shares), [(modest, SMALL, "modest")]);
    }

    #[test]
    fn the_connection_with_the_fewest_bytes_under_way_is_next_and_equals_take_turns() {
        let mut shares = Shares::new(4);
        let ids = [(); 3].map(|()| shares.open());
        for _ in 0..8 {
            for (id, name) in ids.iter().zip(["first", "second", "third"]) {
                shares.push(*id, SMALL, name);
            }
        }
        let mut under_way: VecDeque<_> = start_all(&mut shares).into();
        let mut order: Vec<_> = under_way.iter().map(|(.., name)| *name).collect();
        while let Some((id, length, _)) = under_way.pop_front() {
            shares.finish(id, length);
            let next = start_all(&mut shares);
            order.extend(next.iter().map(|(.., name)| *name));
            under_way.extend(next);
        }
        assert_eq!(order.len(), 24);
        for turn in order.chunks(3) {
            assert!(
                turn.iter().all(|name| turn.iter().filter(|other| *other == name).count() == 1)
            );
        }
        assert!(shares.connections.is_empty() && shares.reads == 0 && shares.bytes == 0);
    }

    #[test]
    fn a_connection_that_ends_takes_the_reads_with_it_that_wait_and_are_not_wanted() {
        let mut shares = Shares::new(1);
        let (gone, stays) = (shares.open(), shares.open());
        for _ in 0..3 {
            shares.push(gone, SMALL, "gone");
        }
        shares.push(gone, SMALL, "wanted");
        shares.push(stays, SMALL, "stays");
        assert_eq!(shares.pop(), Some((gone, SMALL, "gone")));
        assert_eq!(shares.close(gone, |name| *name == "wanted").len(), 2);
        assert_eq!(shares.pop(), None, "the ring has no room");
        shares.finish(gone, SMALL);
        assert_eq!(shares.pop(), Some((stays, SMALL, "stays")));
        shares.finish(stays, SMALL);
        assert_eq!(shares.pop(), Some((gone, SMALL, "wanted")));
        shares.finish(gone, SMALL);
        assert!(shares.connections.is_empty() && shares.waiting == 0);
    }
}
