//! READs and WRITEs for the [ring](crate::ring): where their bytes are, and what the reply to a
//! READ has around them.

use nbd_proto::transmission::{Command, Position, ReplyEncoder};

use super::dispatch::{self, PreparedRequest};
use super::read_steps;
use crate::export::{Holes, PlacedWrite, Placement};
use crate::ring::RingRead;

/// What is to be read for a request; `None` if it is no READ, a long one, or one whose bytes are
/// not in one piece of one file.
pub(super) fn plan_read(work: &PreparedRequest) -> Option<RingRead> {
    let PreparedRequest { export, encoder, request, done, .. } = work;
    let length = request.data_len().checked_sub(*done)?;
    let (tag, holes) = (request.tag(), dispatch::holes_of(*encoder, request));
    let is_short = (1..=read_steps::STEP_LEN).contains(&length);
    let is_whole = *done == 0 || holes == Holes::Told;
    if !matches!(request.command, Command::Read(_)) || !is_short || !is_whole {
        return None;
    }
    let mut at = request.offset + *done as u64;
    let placed = dispatch::place_in_place(&**export, (at, length), holes)?;
    let end = at + length as u64;
    // One allocation for a read without holes.
    let mut head = Vec::with_capacity(ReplyEncoder::MAX_READ_HEADER_LEN);
    let (mut tail, mut found) = (Vec::new(), None);
    if holes == Holes::AsData {
        encoder.data_header(tag, at, length as u32, Position::Last, &mut head);
    }
    for part in (0..).map_while(|index| placed.part(index)) {
        let position = if at + part.length as u64 == end { Position::Last } else { Position::More };
        let around = if found.is_none() { &mut head } else { &mut tail };
        let size = part.length as u32;
        match (part.place, holes) {
            (Placement::Zero, Holes::Told) => encoder.hole(tag, at, size, position, around),
            (Placement::Zero, Holes::AsData) => around.resize(around.len() + part.length, 0),
            (Placement::File { .. }, _) if found.is_some() => return None,
            (Placement::File { number, offset }, _) => {
                if holes == Holes::Told {
                    encoder.data_header(tag, at, size, position, around);
                }
                found = Some((number, offset, part.length));
            }
        }
        at += part.length as u64;
    }
    let (number, offset, length) = found.filter(|_| at == end)?;
    Some(RingRead { placed, number, offset, length, head, tail })
}

/// Where a WRITE goes; `None` if it is no WRITE, a long one, or one for other than one place of one
/// file.
pub(super) fn plan_write(work: &PreparedRequest) -> Option<Box<dyn PlacedWrite>> {
    let PreparedRequest { export, request, payload, .. } = work;
    let is_short = (1..=read_steps::STEP_LEN).contains(&payload.len());
    if !matches!(request.command, Command::Write(_)) || !is_short {
        return None;
    }
    dispatch::place_write_in_place(&**export, request.offset, payload.len())
}
