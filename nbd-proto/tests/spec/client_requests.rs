//! What a client does not send, because it was not negotiated.

use nbd_proto::ApiMisuse;
use nbd_proto::handshake::Negotiated;
use nbd_proto::transmission::client::Transmission;
use nbd_proto::transmission::{Command, Durability, ExtentLimit, Fragmentation, Speed, ZeroMode};
use nbd_proto::wire::{BlockSizes, MetaContextId, ReplyMode, TransmissionFlags};

use super::common::negotiated;

fn request(
    negotiated: &Negotiated,
    offset: u64,
    length: u64,
    command: &Command,
) -> Result<Vec<u8>, ApiMisuse> {
    let mut out = Vec::new();
    let mut client = Transmission::new(negotiated);
    let answer = client.request(offset, length, command, &mut out);
    if answer.is_err() {
        assert!(out.is_empty(), "nothing is sent");
        assert_eq!(client.in_flight(), 0);
    }
    answer.map(|_| out)
}

const READ: Command = Command::Read(Fragmentation::Allowed);
const WRITE: Command = Command::Write(Durability::Cached);
const ZEROES: Command = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Cached);
const STATUS: Command = Command::BlockStatus(ExtentLimit::Many, None);

#[test]
fn commands_and_flags_the_server_does_not_offer_are_not_sent() {
    let mut bare = negotiated(ReplyMode::Structured);
    bare.flags = TransmissionFlags::HAS_FLAGS;
    for command in [
        Command::Read(Fragmentation::Forbidden),
        Command::Write(Durability::Fua),
        Command::Flush,
        Command::Trim(Durability::Cached),
        Command::Cache,
        ZEROES,
    ] {
        let misuse = request(&bare, 0, 512, &command).unwrap_err();
        assert!(matches!(misuse, ApiMisuse::NotNegotiated { .. }), "{command:?} {misuse}");
    }
    bare.flags |= TransmissionFlags::SEND_WRITE_ZEROES;
    let fast = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::FastOnly, Durability::Cached);
    assert!(request(&bare, 0, 512, &fast).is_err());
    assert!(request(&bare, 0, 512, &ZEROES).is_ok());
    assert!(request(&bare, 0, 512, &WRITE).is_ok());
}

#[test]
fn nothing_is_written_to_a_read_only_export() {
    let mut read_only = negotiated(ReplyMode::Simple);
    read_only.flags.insert(TransmissionFlags::READ_ONLY);
    for command in [WRITE, ZEROES, Command::Trim(Durability::Cached)] {
        assert!(request(&read_only, 0, 512, &command).is_err(), "{command:?}");
    }
    assert!(request(&read_only, 0, 512, &READ).is_ok());
}

#[test]
fn ranges_outside_the_export_are_not_sent() {
    let mode = negotiated(ReplyMode::Extended);
    for (offset, length) in [(mode.size, 1), (mode.size - 1, 2), (u64::MAX, 1), (1, u64::MAX)] {
        for command in [READ, WRITE, ZEROES, STATUS, Command::Cache] {
            let misuse = request(&mode, offset, length, &command).unwrap_err();
            assert!(matches!(misuse, ApiMisuse::OutOfBounds { .. }), "{misuse}");
        }
    }
}

#[test]
fn block_sizes_are_obeyed() {
    let mut sectors = negotiated(ReplyMode::Extended);
    sectors.block_sizes = BlockSizes::new(512, 4096, 65536).unwrap();
    assert!(matches!(request(&sectors, 1, 512, &READ), Err(ApiMisuse::Unaligned { .. })));
    assert!(matches!(request(&sectors, 0, 511, &ZEROES), Err(ApiMisuse::Unaligned { .. })));
    for command in [READ, WRITE] {
        let misuse = request(&sectors, 0, 65536 + 512, &command).unwrap_err();
        assert!(matches!(misuse, ApiMisuse::TooLong { limit: 65536, .. }), "{misuse}");
    }
    assert!(request(&sectors, 0, 1 << 30, &ZEROES).is_ok(), "there is no payload");
}

#[test]
fn compact_requests_end_at_32_bits() {
    for (mode, is_fine) in [(ReplyMode::Structured, false), (ReplyMode::Extended, true)] {
        let answer = request(&negotiated(mode), 0, 1 << 32, &ZEROES);
        assert_eq!(answer.is_ok(), is_fine, "{answer:?}");
    }
}

#[test]
fn empty_requests_are_not_sent() {
    let misuse = request(&negotiated(ReplyMode::Simple), 0, 0, &READ).unwrap_err();
    assert_eq!(misuse, ApiMisuse::Empty);
}

#[test]
fn flush_is_sent_without_a_range() {
    let flush = request(&negotiated(ReplyMode::Simple), 77, 88, &Command::Flush).unwrap();
    assert_eq!(flush[16..], [0; 12], "nbdkit refuses any other offset and length");
}

#[test]
fn block_status_is_sent_only_for_selected_contexts() {
    let mut mode = negotiated(ReplyMode::Extended);
    let wanted = |ids: &[u32]| {
        let ids = ids.iter().map(|id| MetaContextId(*id)).collect();
        Command::BlockStatus(ExtentLimit::Many, Some(ids))
    };
    assert!(request(&mode, 0, 512, &wanted(&[0, 2])).is_ok());
    for ids in [&[][..], &[1], &[0, 0]] {
        assert!(request(&mode, 0, 512, &wanted(ids)).is_err(), "{ids:?}");
    }
    mode.flags.remove(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    assert!(request(&mode, 0, 512, &wanted(&[0])).is_err());
    assert!(request(&mode, 0, 512, &STATUS).is_ok());
    assert!(request(&negotiated(ReplyMode::Structured), 0, 512, &wanted(&[0])).is_err());
    mode.meta_contexts.clear();
    assert!(request(&mode, 0, 512, &STATUS).is_err());
    assert!(request(&negotiated(ReplyMode::Simple), 0, 512, &STATUS).is_err());
}
