//! The object of a compaction: a head, which tells which backups it moves, and their maps.

use std::sync::Arc;

use bytes::Bytes;

use super::error::{RepositoryError, Result};
use super::id::Id;
use super::protocol::{Compaction, Moved, Part};
use super::reader::Reader;
use super::root::{self, BODY_LEN_MAX, HEAD_LEN_MAX, PREFIX_LEN};
use super::seal::{Hash, OVERHEAD, Sealer};
use super::stored::push;

/// Most backups that a compaction moves, so that a reader gets each head by one short request.
pub(crate) const MOVED_MAX: usize = 1024;
/// Bytes of a backup in the head.
const ENTRY_LEN: usize = 40;

/// A map that a compaction gives a backup.
pub(crate) struct NewMap {
    pub(crate) backup: Id,
    pub(crate) packed: Vec<u8>,
    /// Length before compression, in bytes.
    pub(crate) content: u32,
    pub(crate) hash: Hash,
}

/// Encodes a compaction of at most [`MOVED_MAX`] backups.
pub(crate) fn encode(sealer: &Sealer, id: Id, mut maps: Vec<NewMap>) -> Result<Compaction> {
    maps.sort_unstable_by_key(|map| map.backup);
    let (mut head, mut bodies, mut moved) = (Vec::new(), Vec::new(), Vec::new());
    push(&mut head, maps.len());
    for (number, map) in (0..).zip(maps) {
        let frame = sealer.seal(root::place(id, number + 1), map.packed)?;
        head.extend_from_slice(map.backup.bytes());
        push(&mut head, frame.len());
        head.extend_from_slice(&map.content.to_le_bytes());
        head.extend_from_slice(&map.hash.0);
        let (offset, length) = (bodies.len() as u64, frame.len() as u32);
        let part = Part { number, offset, length, content: map.content, hash: map.hash };
        moved.push(Moved { backup: map.backup, part });
        bodies.extend_from_slice(&frame);
    }
    let mut object = root::front(3, &sealer.frame(root::place(id, 0), &head)?);
    let start = object.len() as u64;
    moved.iter_mut().for_each(|moved| moved.part.offset += start);
    object.append(&mut bodies);
    Ok(Compaction { moved: moved.into(), object: object.into() })
}

/// Reads the head of a compaction in an object of `size` bytes, whose first ones these are.
pub(crate) fn decode(sealer: &Sealer, id: Id, front: &Bytes, size: u64) -> Result<Compaction> {
    let stored = root::stored_head(id, front)?;
    let end = PREFIX_LEN + stored.len();
    let moved = sealer
        .open_unknown(root::place(id, 0), stored, HEAD_LEN_MAX)
        .map_err(|broken| root::damaged(id, &broken.to_string()))
        .and_then(|head| {
            moves(&head, end as u64, size).ok_or_else(|| root::damaged(id, "is malformed"))
        })?;
    Ok(Compaction { moved, object: front.slice(..end) })
}

fn moves(head: &[u8], mut offset: u64, size: u64) -> Option<Arc<[Moved]>> {
    let mut reader = Reader(head);
    let count = reader.count(ENTRY_LEN).filter(|count| *count <= MOVED_MAX)?;
    let mut moved = Vec::with_capacity(count);
    for number in 0..count as u32 {
        let backup = Id::from_bytes(reader.array()?);
        let (length, content) = (reader.u32()?, reader.u32()?);
        let hash = Hash(reader.array()?);
        let is_sorted = moved.last().is_none_or(|last: &Moved| last.backup < backup);
        let longest = content as usize + OVERHEAD;
        let is_possible = u64::from(content) <= BODY_LEN_MAX && length as usize <= longest;
        if !is_sorted || !is_possible {
            return None;
        }
        moved.push(Moved { backup, part: Part { number, offset, length, content, hash } });
        offset += u64::from(length);
    }
    // The parts are the whole object.
    (reader.0.is_empty() && offset == size).then(|| moved.into())
}

/// Opens a map.
pub(crate) fn open_map(sealer: &Sealer, id: Id, moved: &Moved, frame: &[u8]) -> Result<Vec<u8>> {
    let Part { number, content, hash, .. } = moved.part;
    let opened = sealer.open(root::place(id, number + 1), frame, content as usize, hash);
    opened.map_err(|broken| {
        RepositoryError::damaged(format!(
            "the map of the backup {} in the object backups/{id} {broken}",
            moved.backup
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> Id {
        Id::from_bytes([number; 16])
    }

    fn a_compaction(sealer: &Sealer) -> Compaction {
        let map = |number: u8| {
            let content = vec![number; 40 + usize::from(number)];
            let hash = sealer.hash(&content);
            let packed = Sealer::compress(&content);
            NewMap { backup: id(number), packed, content: content.len() as u32, hash }
        };
        encode(sealer, id(9), [7, 3, 5].map(map).into()).unwrap()
    }

    #[test]
    fn compactions_are_read_as_they_were_written() {
        for sealer in [Sealer::default(), Sealer::encrypting(&[9; 32])] {
            let made = a_compaction(&sealer);
            let object = &made.object;
            assert_eq!(root::kind(object), Some(root::Kind::Compaction));
            let read = decode(&sealer, id(9), object, object.len() as u64).unwrap();
            assert_eq!(read.moved, made.moved);
            assert!(object.len() > read.object.len() && object.starts_with(&read.object));
            for (moved, number) in read.moved.iter().zip([3, 5, 7]) {
                let (start, length) = (moved.part.offset as usize, moved.part.length as usize);
                let frame = &object[start..start + length];
                let map = open_map(&sealer, id(9), moved, frame).unwrap();
                assert_eq!(map, vec![number; 40 + usize::from(number)]);
                assert!(open_map(&sealer, id(9), moved, &frame[1..]).is_err());
            }
            // It is none of another name, where that can be told.
            let of_other = decode(&sealer, id(8), object, object.len() as u64);
            assert_eq!(of_other.is_err(), sealer.hash(b"") != Sealer::default().hash(b""));
        }
    }

    #[test]
    fn every_change_of_a_compaction_is_noticed() {
        let sealer = Sealer::default();
        let made = a_compaction(&sealer);
        let object = &made.object;
        for at in 0..object.len() {
            for bit in 0..8 {
                let mut damaged = object.to_vec();
                damaged[at] ^= 1 << bit;
                let damaged = Bytes::from(damaged);
                let is_known = root::kind(&damaged) == Some(root::Kind::Compaction);
                let read = decode(&sealer, id(9), &damaged, damaged.len() as u64);
                let (Ok(read), true) = (read, is_known) else { continue };
                assert_eq!(read.moved, made.moved, "byte {at}");
                for (moved, number) in read.moved.iter().zip([3, 5, 7]) {
                    let start = moved.part.offset as usize;
                    let frame = &damaged[start..start + moved.part.length as usize];
                    let map = open_map(&sealer, id(9), moved, frame);
                    let written = vec![number; 40 + usize::from(number)];
                    assert!(map.is_err() || map.unwrap() == written, "byte {at}");
                }
            }
            assert!(decode(&sealer, id(9), &object.slice(..at), at as u64).is_err());
        }
    }

    #[test]
    fn heads_that_lie_are_refused_without_a_panic() {
        let sealer = Sealer::default();
        let entry = |backup: u8, length: u32, content: u32| {
            let mut bytes = id(backup).bytes().to_vec();
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&content.to_le_bytes());
            bytes.extend_from_slice(&[1; 16]);
            bytes
        };
        let head = |count: u32, entries: &[Vec<u8>]| {
            [&count.to_le_bytes()[..], &entries.concat()].concat()
        };
        let good = head(2, &[entry(1, 5, 6), entry(2, 7, 8)]);
        assert!(moves(&good, 100, 112).is_some());
        for (head, size) in [
            (good.clone(), 111),
            (good.clone(), 113),
            (good[..good.len() - 1].to_vec(), 112),
            ([&good[..], &[0]].concat(), 112),
            (head(1, &[entry(1, 5, 6), entry(2, 7, 8)]), 112),
            (head(u32::MAX, &[entry(1, 5, 6)]), 105),
            (head(2, &[entry(2, 5, 6), entry(1, 7, 8)]), 112),
            (head(2, &[entry(1, 5, 6), entry(1, 7, 8)]), 112),
            (head(1, &[entry(1, 600, 6)]), 700),
            (head(1025, &vec![entry(1, 5, 6); 1025]), 100 + 1025 * 5),
            (head(1, &[entry(1, u32::MAX, u32::MAX)]), 100 + u64::from(u32::MAX)),
        ] {
            assert!(moves(&head, 100, size).is_none(), "{head:?}");
        }
        // A short object that says that much follows.
        let mut object = root::front(3, &sealer.frame(root::place(id(9), 0), &good).unwrap());
        let start = object.len() as u64;
        object.extend_from_slice(&[0; 12]);
        let object = Bytes::from(object);
        assert!(decode(&sealer, id(9), &object, start + 12).is_ok());
        assert!(decode(&sealer, id(9), &object, start + 11).is_err());
    }
}
