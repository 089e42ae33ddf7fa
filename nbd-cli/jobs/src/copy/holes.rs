//! Holes in the answer to a read.

use bytes::{Bytes, BytesMut};
use nbd_client::ReadChunk;

/// A part of a range that is written in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum WriteSpan {
    Data { offset: u64, data: Bytes },
    Zero { offset: u64, length: u64 },
}

/// Splits an answer so that zeroes begin and end at multiples of `unit` (in bytes), or at the ends
/// of the range: a unit with any data in it is data. `pieces` are those of one read, in order and
/// without gaps.
pub(super) fn write_spans(pieces: Vec<ReadChunk>, unit: u64) -> Vec<WriteSpan> {
    let Some(start) = pieces.first().map(ReadChunk::offset) else { return Vec::new() };
    let end = pieces.last().map_or(start, end_of);
    let mut write_spans = Vec::new();
    // The start of the next part with data.
    let mut open: Vec<ReadChunk> = Vec::new();
    for piece in pieces {
        let ReadChunk::Hole { offset, length } = piece else {
            open.push(piece);
            continue;
        };
        let hole_end = offset + length;
        let from = if offset == start { offset } else { offset.next_multiple_of(unit) };
        let to = if hole_end == end { hole_end } else { hole_end / unit * unit };
        if from >= to {
            open.push(piece);
            continue;
        }
        if from > offset {
            open.push(ReadChunk::Hole { offset, length: from - offset });
        }
        write_spans.extend(joined(std::mem::take(&mut open)));
        write_spans.push(WriteSpan::Zero { offset: from, length: to - from });
        if to < hole_end {
            open.push(ReadChunk::Hole { offset: to, length: hole_end - to });
        }
    }
    write_spans.extend(joined(open));
    write_spans
}

/// Joins neighbouring pieces into one part with data. The usual single one is not copied.
fn joined(mut pieces: Vec<ReadChunk>) -> Option<WriteSpan> {
    if let [ReadChunk::Data { .. }] = pieces.as_slice()
        && let Some(ReadChunk::Data { offset, data }) = pieces.pop()
    {
        return Some(WriteSpan::Data { offset, data });
    }
    let offset = pieces.first()?.offset();
    let length: u64 = pieces.iter().map(ReadChunk::length).sum();
    // A part of one request.
    let mut data = BytesMut::with_capacity(length as usize);
    for piece in &pieces {
        match piece {
            ReadChunk::Data { data: more, .. } => data.extend_from_slice(more),
            ReadChunk::Hole { length, .. } => data.resize(data.len() + *length as usize, 0),
        }
    }
    Some(WriteSpan::Data { offset, data: data.freeze() })
}

fn end_of(piece: &ReadChunk) -> u64 {
    piece.offset() + piece.length()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(offset: u64, length: usize) -> ReadChunk {
        ReadChunk::Data { offset, data: vec![7; length].into() }
    }

    fn hole(offset: u64, length: u64) -> ReadChunk {
        ReadChunk::Hole { offset, length }
    }

    fn kinds(write_spans: &[WriteSpan]) -> Vec<(u64, u64, char)> {
        let kind = |part: &WriteSpan| match part {
            WriteSpan::Data { offset, data } => (*offset, data.len() as u64, 'd'),
            WriteSpan::Zero { offset, length } => (*offset, *length, 'z'),
        };
        write_spans.iter().map(kind).collect()
    }

    #[test]
    fn one_piece_is_handed_on_without_a_copy() {
        let bytes = Bytes::from(vec![7; 4096]);
        let write_spans =
            write_spans(vec![ReadChunk::Data { offset: 0, data: bytes.clone() }], 512);
        let [WriteSpan::Data { offset: 0, data }] = write_spans.as_slice() else {
            panic!("{write_spans:?}")
        };
        assert_eq!(data.as_ptr(), bytes.as_ptr());
    }

    #[test]
    fn holes_shrink_to_whole_units_and_the_rest_is_data() {
        let pieces = vec![data(4096, 1000), hole(5096, 9000), data(14_096, 2288)];
        let found = write_spans(pieces, 4096);
        assert_eq!(kinds(&found), [(4096, 4096, 'd'), (8192, 4096, 'z'), (12_288, 4096, 'd')]);
        let WriteSpan::Data { data, .. } = &found[0] else { panic!("data") };
        assert!(data[..1000].iter().all(|b| *b == 7) && data[1000..].iter().all(|b| *b == 0));
        let WriteSpan::Data { data, .. } = &found[2] else { panic!("data") };
        assert!(data[..1808].iter().all(|b| *b == 0) && data[1808..].iter().all(|b| *b == 7));
    }

    #[test]
    fn a_hole_that_fills_no_unit_is_data() {
        let pieces = vec![data(0, 4000), hole(4000, 4000), data(8000, 192)];
        assert_eq!(kinds(&write_spans(pieces, 4096)), [(0, 8192, 'd')]);
    }

    #[test]
    fn the_ends_of_the_range_need_no_rounding() {
        assert_eq!(kinds(&write_spans(vec![hole(65_536, 1001)], 4096)), [(65_536, 1001, 'z')]);
        let pieces = vec![hole(0, 8192), data(8192, 1), hole(8193, 9000)];
        let expected = [(0, 8192, 'z'), (8192, 4096, 'd'), (12_288, 4905, 'z')];
        assert_eq!(kinds(&write_spans(pieces, 4096)), expected);
        assert_eq!(write_spans(Vec::new(), 4096), []);
    }
}
