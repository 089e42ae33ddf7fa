//! NBD_CMD_BLOCK_STATUS: answers that a client refuses, and unusual ones that it accepts.

use bytes::BytesMut;
use nbd_proto::ProtocolError;
use nbd_proto::limits::{MAX_DESCRIPTORS_RECEIVED, MAX_DESCRIPTORS_SENT};
use nbd_proto::transmission::client::{Event, Transmission};
use nbd_proto::transmission::{Command, ExtentLimit, Position, ReplyEncoder, RequestTag};
use nbd_proto::wire::{BlockDescriptor, CommandType, Cookie, MetaContextId, ReplyMode};

use super::common::listing::{chunk, extended_chunk, extended_status, simple_reply, status};
use super::common::negotiated;

const OFFSET: u64 = 0x1000;
const LENGTH: u64 = 0x1000;
const DONE: u16 = 1;
const STATUS: u16 = 5;
const STATUS_EXT: u16 = 6;

type Statuses = Vec<(u32, Vec<(u64, u64)>)>;

fn run(
    mode: ReplyMode,
    limit: ExtentLimit,
    bytes: &[u8],
) -> Result<(Statuses, bool), ProtocolError> {
    let mut client = Transmission::new(&negotiated(mode));
    let command = Command::BlockStatus(limit, None);
    client.request(OFFSET, LENGTH, &command, &mut Vec::new()).unwrap();
    let (mut input, mut statuses, mut is_over) = (BytesMut::from(bytes), Vec::new(), false);
    loop {
        match client.advance(&mut input)? {
            Event::NeedsInput => return Ok((statuses, is_over)),
            Event::BlockStatus { context, descriptors, .. } => {
                let extents = descriptors.iter().map(|extent| (extent.length, extent.flags));
                statuses.push((context.0, extents.collect()));
            }
            Event::Finished { result, .. } => is_over = result.is_ok(),
            event => panic!("{event:?}"),
        }
    }
}

fn compact(context: u32, descriptors: &[(u32, u32)]) -> Vec<u8> {
    chunk(0, STATUS, 1, &status(context, descriptors))
}

fn finish() -> Vec<u8> {
    chunk(DONE, 0, 1, &[])
}

#[track_caller]
fn refused(chunks: &[Vec<u8>]) {
    run(ReplyMode::Structured, ExtentLimit::Many, &chunks.concat()).unwrap_err();
}

#[track_caller]
fn seen(chunks: &[Vec<u8>]) -> Statuses {
    let (statuses, is_over) =
        run(ReplyMode::Structured, ExtentLimit::Many, &chunks.concat()).unwrap();
    assert!(is_over);
    statuses
}

#[test]
fn a_last_extent_beyond_the_request_is_cut() {
    let statuses =
        seen(&[compact(0, &[(0x800, 0), (0x8000, 3)]), compact(2, &[(u32::MAX, 1)]), finish()]);
    assert_eq!(statuses, [(0, vec![(0x800, 0), (0x800, 3)]), (2, vec![(0x1000, 1)])]);
}

#[test]
fn a_short_answer_is_fine() {
    let statuses = seen(&[compact(2, &[(512, 1)]), compact(0, &[(1, 0)]), finish()]);
    assert_eq!(statuses, [(2, vec![(512, 1)]), (0, vec![(1, 0)])], "in the server's order");
}

#[test]
fn unknown_status_flags_survive() {
    let flags = 0xffff_ffff_0000_0001;
    let payload = |context| extended_status(context, 1, &[(0x1000, flags)]);
    let bytes = [
        extended_chunk(0, STATUS_EXT, 1, OFFSET, &payload(0)),
        extended_chunk(DONE, STATUS_EXT, 1, OFFSET, &payload(2)),
    ];
    let (statuses, _) = run(ReplyMode::Extended, ExtentLimit::Many, &bytes.concat()).unwrap();
    assert_eq!(statuses[0].1, [(0x1000, flags)]);
}

#[test]
fn extents_of_length_zero_are_refused() {
    refused(&[compact(0, &[(0, 0)])]);
    refused(&[compact(0, &[(512, 0), (0, 1), (512, 0)])]);
}

#[test]
fn extents_behind_the_end_of_the_request_are_refused() {
    refused(&[compact(0, &[(0x1000, 0), (512, 1)])]);
    refused(&[compact(0, &[(0x1001, 0), (512, 1)])]);
}

#[test]
fn contexts_not_selected_or_answered_twice_are_refused() {
    refused(&[compact(1, &[(512, 0)])]);
    refused(&[compact(0, &[(512, 0)]), compact(0, &[(512, 0)])]);
}

#[test]
fn a_context_that_is_never_answered_is_refused() {
    refused(&[compact(0, &[(512, 0)]), finish()]);
    refused(&[finish()]);
    run(ReplyMode::Structured, ExtentLimit::Many, &simple_reply(0, 1)).unwrap_err();
}

#[test]
fn chunks_without_descriptors_or_of_odd_length_are_refused() {
    refused(&[compact(0, &[])]);
    for length in [0, 3, 11, 13, 19] {
        refused(&[chunk(0, STATUS, 1, &vec![0; length])]);
    }
    for length in [0, 8, 23, 25, 39] {
        let bytes = extended_chunk(0, STATUS_EXT, 1, OFFSET, &vec![0; length]);
        run(ReplyMode::Extended, ExtentLimit::Many, &bytes).unwrap_err();
    }
}

#[test]
fn a_descriptor_count_that_lies_is_refused() {
    for count in [0, 2, u32::MAX] {
        let payload = extended_status(0, count, &[(512, 0)]);
        let bytes = extended_chunk(0, STATUS_EXT, 1, OFFSET, &payload);
        run(ReplyMode::Extended, ExtentLimit::Many, &bytes).unwrap_err();
    }
}

#[test]
fn too_many_descriptors_are_refused_before_they_arrive() {
    let over = MAX_DESCRIPTORS_RECEIVED as u64 + 1;
    let mut header = chunk(0, STATUS, 1, &[]);
    header[16..20].copy_from_slice(&((4 + 8 * over) as u32).to_be_bytes());
    refused(&[header]);
    let mut header = extended_chunk(0, STATUS_EXT, 1, OFFSET, &[]);
    header[24..32].copy_from_slice(&(8 + 16 * over).to_be_bytes());
    run(ReplyMode::Extended, ExtentLimit::Many, &header).unwrap_err();
    let mut header = extended_chunk(0, STATUS_EXT, 1, OFFSET, &[]);
    header[24..32].copy_from_slice(&(u64::MAX - 7).to_be_bytes());
    run(ReplyMode::Extended, ExtentLimit::Many, &header).unwrap_err();
}

#[test]
fn one_extent_was_asked_for() {
    let two = compact(0, &[(512, 0), (512, 3)]);
    run(ReplyMode::Structured, ExtentLimit::One, &two).unwrap_err();
    let one = compact(0, &[(512, 0)]);
    assert_eq!(run(ReplyMode::Structured, ExtentLimit::One, &one).unwrap().0.len(), 1);
}

#[test]
fn the_chunk_of_the_other_mode_is_refused() {
    refused(&[chunk(0, STATUS_EXT, 1, &extended_status(0, 1, &[(512, 0)]))]);
    let bytes = extended_chunk(0, STATUS, 1, OFFSET, &status(0, &[(512, 0)]));
    run(ReplyMode::Extended, ExtentLimit::Many, &bytes).unwrap_err();
}

#[test]
fn a_server_sends_no_more_descriptors_than_its_limit() {
    let extents = vec![BlockDescriptor { length: 1, flags: 0 }; MAX_DESCRIPTORS_SENT + 5];
    let tag = RequestTag::new(Cookie(1), CommandType::BLOCK_STATUS, 0);
    for (mode, length) in [
        (ReplyMode::Structured, 20 + 4 + 8 * MAX_DESCRIPTORS_SENT),
        (ReplyMode::Extended, 32 + 8 + 16 * MAX_DESCRIPTORS_SENT),
    ] {
        let mut out = Vec::new();
        let encoder = ReplyEncoder::new(mode);
        encoder.block_status(tag, MetaContextId(0), &extents, Position::Last, &mut out);
        assert_eq!(out.len(), length);
    }
}

#[test]
fn a_compact_answer_never_tells_more_than_32_bits() {
    // CVE-2025-47711: the longest possible length was off by one.
    let tag = RequestTag::new(Cookie(1), CommandType::BLOCK_STATUS, 0);
    for length in [u64::from(u32::MAX), 1 << 32, (1 << 32) + 1, 1 << 40, i64::MAX as u64] {
        let mut out = Vec::new();
        let extents =
            [BlockDescriptor { length, flags: 1 }, BlockDescriptor { length: 1, flags: 2 }];
        let encoder = ReplyEncoder::new(ReplyMode::Structured);
        encoder.block_status(tag, MetaContextId(0), &extents, Position::Last, &mut out);
        let sent = u32::from_be_bytes(out[24..28].try_into().unwrap());
        assert!(sent > 0 && sent.is_multiple_of(65536), "{length} became {sent}");
        assert_eq!(out.len(), 20 + 4 + 8, "nothing follows an extent that was cut");
    }
}
