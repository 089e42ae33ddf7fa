//! Sections "Transmission", "Request types" and "Error values": the server's treatment of requests.

use nbd_proto::ProtocolError;
use nbd_proto::handshake::Negotiated;
use nbd_proto::limits::{MAX_DISCARDED_PAYLOAD, MAX_PAYLOAD};
use nbd_proto::transmission::server::{Parsed, Transmission};
use nbd_proto::transmission::{Command, ExtentLimit, Request};
use nbd_proto::wire::{BlockSizes, Errno, MetaContextId, ReplyMode, TransmissionFlags};

use super::common::listing::{extended_request, request};
use super::common::negotiated;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

const SIZE: u64 = 1 << 40;

fn parse(negotiated: &Negotiated, bytes: &[u8]) -> Result<Parsed, ProtocolError> {
    Transmission::new(negotiated).parse(bytes)
}

/// `Ok` with a valid request, `Err` with the error it is answered with.
fn judge(negotiated: &Negotiated, bytes: &[u8]) -> Result<Request, Errno> {
    match parse(negotiated, bytes).expect("no reason to disconnect") {
        Parsed::Request { request, .. } => Ok(request),
        Parsed::Rejected { rejection, .. } => Err(rejection.error),
        Parsed::NeedsInput(needed) => panic!("{needed} bytes wanted"),
    }
}

fn structured(flags: u16, command: u16, offset: u64, length: u32) -> Result<Request, Errno> {
    judge(&negotiated(ReplyMode::Structured), &request(flags, command, 1, offset, length))
}

fn extended(flags: u16, command: u16, offset: u64, length: u64) -> Result<Request, Errno> {
    judge(&negotiated(ReplyMode::Extended), &extended_request(flags, command, 1, offset, length))
}

#[test]
fn a_write_past_the_end_is_enospc_and_everything_else_einval() {
    for command in [WRITE, ZEROES] {
        assert_eq!(structured(0, command, SIZE - 1, 2), Err(Errno::ENOSPC), "{command}");
        assert_eq!(structured(0, command, SIZE, 1), Err(Errno::ENOSPC), "{command}");
        assert!(structured(0, command, SIZE - 1, 1).is_ok());
    }
    for command in [READ, TRIM, CACHE, STATUS] {
        assert_eq!(structured(0, command, SIZE - 1, 2), Err(Errno::EINVAL), "{command}");
        assert!(structured(0, command, SIZE - 1, 1).is_ok());
    }
}

#[test]
fn offset_and_length_that_overflow_are_einval() {
    for command in [READ, WRITE, TRIM, CACHE, ZEROES, STATUS] {
        assert_eq!(structured(0, command, u64::MAX, 1), Err(Errno::EINVAL), "{command}");
    }
    for command in [READ, TRIM, CACHE, ZEROES, STATUS] {
        let past_end = extended(0, command, 0, 1 << 63).unwrap_err();
        assert!(past_end == Errno::EINVAL || (command == ZEROES && past_end == Errno::ENOSPC));
        assert_eq!(extended(0, command, 1, u64::MAX), Err(Errno::EINVAL), "{command}");
    }
}

#[test]
fn writing_to_a_read_only_export_is_eperm() {
    let mut read_only = negotiated(ReplyMode::Structured);
    read_only.flags.insert(TransmissionFlags::READ_ONLY);
    for flags in [
        read_only.flags,
        TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_FLUSH,
    ] {
        read_only.flags = flags;
        for command in [WRITE, TRIM, ZEROES] {
            let answer = judge(&read_only, &request(0, command, 1, 0, 512));
            assert_eq!(answer, Err(Errno::EPERM), "{command}");
        }
        assert!(judge(&read_only, &request(0, FLUSH, 1, 0, 0)).is_ok());
        assert!(judge(&read_only, &request(0, READ, 1, 0, 512)).is_ok());
    }
}

#[test]
fn unknown_commands_and_flags_are_einval() {
    for command in [8, 9, 0xffff] {
        assert_eq!(structured(0, command, 0, 512), Err(Errno::EINVAL));
        assert_eq!(extended(0, command, 0, 512), Err(Errno::EINVAL));
    }
    for command in [READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS] {
        assert_eq!(structured(0x8000, command, 0, 512), Err(Errno::EINVAL), "{command}");
        assert_eq!(structured(PAYLOAD_LEN, command, 0, 512), Err(Errno::EINVAL), "{command}");
    }
}

#[test]
fn flags_of_another_command_are_einval_and_fua_is_legal_everywhere() {
    for (flag, legal) in [
        (NO_HOLE, &[ZEROES][..]),
        (FAST_ZERO, &[ZEROES]),
        (REQ_ONE, &[STATUS]),
        (DF, &[READ]),
        (FUA, &[READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS]),
    ] {
        for command in [READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS] {
            let answer = structured(flag, command, 0, 512);
            assert_eq!(answer.is_ok(), legal.contains(&command), "{flag} {command} {answer:?}");
        }
    }
}

#[test]
fn df_needs_structured_replies() {
    let simple = negotiated(ReplyMode::Simple);
    assert_eq!(judge(&simple, &request(DF, READ, 1, 0, 512)), Err(Errno::EINVAL));
}

#[test]
fn what_was_not_offered_is_einval() {
    let mut bare = negotiated(ReplyMode::Structured);
    bare.flags = TransmissionFlags::HAS_FLAGS;
    for command in [FLUSH, TRIM, CACHE, ZEROES] {
        let answer = judge(&bare, &request(0, command, 1, 0, 512));
        assert_eq!(answer, Err(Errno::EINVAL), "{command}");
    }
    assert_eq!(judge(&bare, &request(FUA, WRITE, 1, 0, 512)), Err(Errno::EINVAL));
    bare.flags |= TransmissionFlags::SEND_WRITE_ZEROES;
    assert_eq!(judge(&bare, &request(FAST_ZERO, ZEROES, 1, 0, 512)), Err(Errno::EINVAL));
    assert!(judge(&bare, &request(NO_HOLE, ZEROES, 1, 0, 512)).is_ok());
}

#[test]
fn requests_have_to_be_aligned_to_the_minimum_block_size() {
    let mut sectors = negotiated(ReplyMode::Structured);
    sectors.block_sizes = BlockSizes::new(512, 4096, 1 << 20).unwrap();
    for command in [READ, WRITE, TRIM, CACHE, ZEROES, STATUS] {
        for (offset, length) in [(1, 512), (512, 511), (256, 256)] {
            let answer = judge(&sectors, &request(0, command, 1, offset, length));
            assert_eq!(answer, Err(Errno::EINVAL), "{command} {length}@{offset}");
        }
        assert!(judge(&sectors, &request(0, command, 1, 512, 1024)).is_ok());
    }
}

#[test]
fn payloads_over_the_maximum_are_einval_but_ranges_without_payload_are_not() {
    let over = MAX_PAYLOAD + 1;
    assert_eq!(structured(0, READ, 0, over), Err(Errno::EINVAL));
    assert_eq!(structured(0, WRITE, 0, over), Err(Errno::EINVAL));
    for command in [TRIM, CACHE, ZEROES, STATUS] {
        assert!(structured(0, command, 0, u32::MAX).is_ok(), "{command}");
        assert!(extended(0, command, 0, SIZE).is_ok(), "the whole terabyte at once: {command}");
    }
}

#[test]
fn a_refused_write_tells_how_much_payload_to_discard() {
    let compact = negotiated(ReplyMode::Simple);
    for length in [512, MAX_PAYLOAD + 1, MAX_DISCARDED_PAYLOAD as u32] {
        let parsed = parse(&compact, &request(0, WRITE, 7, SIZE, length)).unwrap();
        let Parsed::Rejected { rejection, consumed: 28, discard } = parsed else {
            panic!("{parsed:?}");
        };
        assert_eq!(discard, u64::from(length));
        assert_eq!(rejection.tag.cookie.0, 7);
    }
}

#[test]
fn a_refused_payload_over_64_mib_ends_the_connection() {
    let over = MAX_DISCARDED_PAYLOAD as u32 + 1;
    for length in [over, u32::MAX] {
        let error =
            parse(&negotiated(ReplyMode::Simple), &request(0, WRITE, 7, 0, length)).unwrap_err();
        assert!(matches!(error, ProtocolError::TooLong { .. }), "{error}");
    }
    for command in [WRITE, TRIM, READ, STATUS] {
        let bytes = extended_request(PAYLOAD_LEN, command, 7, 0, u64::from(over));
        let answer = parse(&negotiated(ReplyMode::Extended), &bytes);
        assert!(answer.is_err(), "{command} {answer:?}");
    }
}

#[test]
fn zero_lengths_succeed() {
    for command in [READ, WRITE, TRIM, CACHE, ZEROES] {
        assert_eq!(structured(0, command, 4096, 0).unwrap().length, 0, "{command}");
        assert!(structured(0, command, SIZE, 0).is_ok(), "{command} at the end");
    }
    assert_eq!(structured(0, STATUS, 0, 0), Err(Errno::EINVAL));
    assert_eq!(extended(0, STATUS, 0, 0), Err(Errno::EINVAL));
}

#[test]
fn flush_has_no_range_whatever_its_header_says() {
    let flush = structured(0, FLUSH, u64::MAX, u32::MAX).unwrap();
    assert_eq!((flush.command, flush.length), (Command::Flush, 0));
}

#[test]
fn disconnect_is_understood_whatever_its_header_says() {
    let disc = structured(0xffff, DISC, u64::MAX, u32::MAX).unwrap();
    assert_eq!(disc.command, Command::Disconnect);
    for length in [0, 4, u64::MAX] {
        assert_eq!(extended(PAYLOAD_LEN, DISC, 0, length).unwrap().command, Command::Disconnect);
    }
}

#[test]
fn a_bad_magic_ends_the_connection() {
    for (mode, bytes) in [
        (ReplyMode::Simple, extended_request(0, READ, 1, 0, 512)),
        (ReplyMode::Structured, vec![0; 28]),
        (ReplyMode::Extended, request(0, READ, 1, 0, 512)),
        (ReplyMode::Extended, vec![0xff; 32]),
    ] {
        let mut bytes = bytes;
        bytes.resize(32, 0);
        let error = parse(&negotiated(mode), &bytes).unwrap_err();
        assert!(matches!(error, ProtocolError::BadMagic { .. }), "{error}");
    }
}

#[test]
fn an_extended_write_without_the_payload_flag_is_tolerated() {
    let write = extended(0, WRITE, 0, 512).unwrap();
    assert_eq!((write.command.command_type().0, write.length), (WRITE, 512));
}

#[test]
fn a_payload_that_no_command_expects_is_consumed_and_einval() {
    let mode = negotiated(ReplyMode::Extended);
    for command in [READ, FLUSH, TRIM, CACHE, ZEROES, 99] {
        let parsed = parse(&mode, &extended_request(PAYLOAD_LEN, command, 1, 0, 512)).unwrap();
        let Parsed::Rejected { rejection, consumed: 32, discard: 512 } = parsed else {
            panic!("{command} {parsed:?}");
        };
        assert_eq!(rejection.error, Errno::EINVAL);
    }
}

fn status_payload(effect: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = effect.to_be_bytes().to_vec();
    payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    payload
}

fn status_request(flags: u16, payload: &[u8]) -> Vec<u8> {
    let header = extended_request(PAYLOAD_LEN | flags, STATUS, 1, 4096, payload.len() as u64);
    [&header[..], payload].concat()
}

#[test]
fn a_status_payload_chooses_contexts() {
    let bytes = status_request(REQ_ONE, &status_payload(1 << 39, &[2]));
    let chosen = judge(&negotiated(ReplyMode::Extended), &bytes).unwrap();
    assert_eq!(chosen.length, 1 << 39, "the length of the range, not of the payload");
    let wanted = Some([MetaContextId(2)].into());
    assert_eq!(chosen.command, Command::BlockStatus(ExtentLimit::One, wanted));
}

#[test]
fn a_status_payload_is_waited_for() {
    let bytes = status_request(0, &status_payload(512, &[0, 2]));
    for end in 32..bytes.len() {
        let parsed = parse(&negotiated(ReplyMode::Extended), &bytes[..end]).unwrap();
        assert_eq!(parsed, Parsed::NeedsInput(bytes.len()));
    }
}

#[test]
fn a_bad_status_payload_is_consumed_and_einval() {
    let mode = negotiated(ReplyMode::Extended);
    let good = status_payload(512, &[0, 2]);
    let bad = [
        good[..1].to_vec(),
        good[..7].to_vec(),
        good[..8].to_vec(),
        good[..9].to_vec(),
        [&good[..], b"x"].concat(),
        status_payload(512, &[0, 0]),
        status_payload(512, &[1]),
        status_payload(0, &[0]),
        status_payload(SIZE, &[0]),
        status_payload(u64::MAX, &[0]),
        vec![0; 8 + 4 * 5000],
    ];
    for payload in bad {
        let parsed = parse(&mode, &status_request(0, &payload)).unwrap();
        let Parsed::Rejected { rejection, consumed: 32, discard } = parsed else {
            panic!("{payload:?} {parsed:?}");
        };
        assert_eq!(rejection.error, Errno::EINVAL);
        assert_eq!(discard, payload.len() as u64);
    }
    let mut not_offered = negotiated(ReplyMode::Extended);
    not_offered.flags.remove(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    assert_eq!(judge(&not_offered, &status_request(0, &good)), Err(Errno::EINVAL));
}

#[test]
fn block_status_without_contexts_is_einval() {
    let mut without = negotiated(ReplyMode::Structured);
    without.meta_contexts.clear();
    assert_eq!(judge(&without, &request(0, STATUS, 1, 0, 512)), Err(Errno::EINVAL));
    let simple = negotiated(ReplyMode::Simple);
    assert_eq!(judge(&simple, &request(0, STATUS, 1, 0, 512)), Err(Errno::EINVAL));
}

#[test]
fn half_a_header_is_no_error() {
    for mode in [ReplyMode::Simple, ReplyMode::Extended] {
        let bytes = match mode {
            ReplyMode::Extended => extended_request(0, READ, 1, 0, 512),
            _ => request(0, READ, 1, 0, 512),
        };
        for end in 0..bytes.len() {
            let parsed = parse(&negotiated(mode), &bytes[..end]).unwrap();
            assert_eq!(parsed, Parsed::NeedsInput(bytes.len()));
        }
    }
}
