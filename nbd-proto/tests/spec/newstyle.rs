//! Section "Fixed newstyle negotiation", the server's side.

use bytes::BytesMut;
use nbd_proto::ProtocolError;
use nbd_proto::handshake::server::{Handshake, HandshakeStep, ServerConfig};
use nbd_proto::limits::MAX_OPTIONS_PER_HANDSHAKE;

use super::common::listing::{info_payload, option};
use super::common::{After, Probe};
use super::{opt, rep};

fn probe() -> Probe {
    Probe::fixed(ServerConfig::default())
}

#[test]
fn a_client_that_sets_unknown_flags_is_dropped() {
    for flags in [4_u32, 7, 0x8000_0003] {
        let mut out = BytesMut::new();
        let handshake = Handshake::start(ServerConfig::default(), &mut out);
        let mut input = BytesMut::from(&flags.to_be_bytes()[..]);
        let error = handshake.advance(&mut input, &mut out).unwrap_err();
        assert!(matches!(error, ProtocolError::UnknownFlags { .. }), "{flags:#x}: {error}");
    }
}

#[test]
fn a_client_without_fixed_newstyle_can_only_use_export_name() {
    for number in [opt::LIST, opt::GO, opt::ABORT, 99] {
        let mut server = Probe::new(ServerConfig::default(), 0);
        assert!(server.option(number, &[]).is_err(), "option {number}");
    }
    let mut server = Probe::new(ServerConfig::default(), 0);
    let answer = server.send(&option(opt::EXPORT_NAME, b"disk")).unwrap();
    assert_eq!(answer.len(), 10 + 124);
}

#[test]
fn unknown_options_are_unsupported_and_the_stream_stays_in_sync() {
    let mut server = probe();
    for number in [0, 4, 12, 99, u32::MAX] {
        for length in [0, 1, 17, 100_000] {
            let payload = vec![0xaa; length];
            assert_eq!(server.last_reply(number, &payload), rep::ERR_UNSUP, "option {number}");
        }
    }
    assert_eq!(server.last_reply(opt::LIST, &[]), rep::ACK);
}

#[test]
fn list_with_data_is_invalid() {
    let mut server = probe();
    assert_eq!(server.last_reply(opt::LIST, b"x"), rep::ERR_INVALID);
    let replies = server.option(opt::LIST, &[]).unwrap();
    assert_eq!(replies.iter().filter(|(kind, _)| *kind == rep::SERVER).count(), 3);
}

#[test]
fn abort_is_acknowledged_even_with_data() {
    for payload in [&b""[..], b"bye"] {
        let mut server = probe();
        assert_eq!(server.last_reply(opt::ABORT, payload), rep::ACK);
        assert!(matches!(server.after, Some(After::Closed)));
    }
}

#[test]
fn an_oversized_payload_is_consumed_without_being_kept() {
    // 2 MiB of payload, in pieces; the machine never holds more than what came last.
    let length = 2 << 20;
    let refusals = [
        (99, rep::ERR_UNSUP),
        (opt::LIST, rep::ERR_INVALID),
        (opt::GO, rep::ERR_TOO_BIG),
        (opt::SET_META_CONTEXT, rep::ERR_TOO_BIG),
        (opt::STRUCTURED_REPLY, rep::ERR_INVALID),
    ];
    for (number, refusal) in refusals {
        let mut server = probe();
        let mut header = option(number, &[]);
        header[12..].copy_from_slice(&u32::to_be_bytes(length));
        assert!(server.send(&header).unwrap().is_empty());
        let piece = vec![0; 1 << 16];
        let mut answer = Vec::new();
        for _ in 0..length as usize / piece.len() {
            assert!(answer.is_empty(), "answered before the payload was over");
            answer = server.send(&piece).unwrap();
            assert!(server.input.is_empty(), "the payload is thrown away as it comes");
        }
        assert_eq!(super::common::listing::replies(number, &answer)[0].0, refusal);
        assert_eq!(server.last_reply(opt::LIST, &[]), rep::ACK, "still in sync");
    }
}

#[test]
fn abort_with_an_oversized_payload_is_acknowledged_too() {
    let mut server = probe();
    assert_eq!(server.last_reply(opt::ABORT, &vec![0; 2 << 20]), rep::ACK);
    assert!(matches!(server.after, Some(After::Closed)));
}

#[test]
fn a_payload_over_32_mib_ends_the_connection() {
    for (length, is_fine) in [(32 << 20, true), ((32 << 20) + 1, false), (u32::MAX, false)] {
        let mut header = option(99, &[]);
        header[12..].copy_from_slice(&u32::to_be_bytes(length));
        assert_eq!(probe().send(&header).is_ok(), is_fine, "{length}");
    }
}

#[test]
fn a_bad_option_magic_ends_the_connection() {
    let error = probe().send(&[0x55; 16]).unwrap_err();
    assert!(matches!(error, ProtocolError::BadMagic { .. }), "{error}");
}

#[test]
fn export_name_of_no_name_is_the_default_export() {
    let mut server = probe();
    let answer = server.send(&option(opt::EXPORT_NAME, b"")).unwrap();
    assert_eq!(answer.len(), 10, "NO_ZEROES was agreed");
    assert_eq!(server.negotiated().export_name, "");
}

#[test]
fn export_name_that_fails_ends_the_connection() {
    for name in [&b"nowhere"[..], b"dis\0k", b"\xff", &[b'a'; 4097]] {
        assert!(probe().send(&option(opt::EXPORT_NAME, name)).is_err());
    }
}

#[test]
fn export_name_after_extended_headers_ends_the_connection() {
    let mut server = probe();
    assert_eq!(server.last_reply(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    assert!(server.send(&option(opt::EXPORT_NAME, b"disk")).is_err());
}

#[test]
fn export_name_after_structured_reply_is_fine() {
    let mut server = probe();
    server.last_reply(opt::STRUCTURED_REPLY, &[]);
    server.send(&option(opt::EXPORT_NAME, b"disk")).unwrap();
    assert_eq!(server.negotiated().reply_mode, nbd_proto::wire::ReplyMode::Structured);
}

#[test]
fn pipelined_options_are_answered_in_order() {
    let mut server = probe();
    let mut bytes = option(99, &[]);
    bytes.extend(option(opt::STRUCTURED_REPLY, &[]));
    bytes.extend(option(opt::GO, &info_payload(b"disk", &[3])));
    let answer = server.send(&bytes).unwrap();
    assert_eq!(answer[8..12], 99_u32.to_be_bytes());
    assert!(matches!(server.after, Some(After::Transmission(_))));
}

#[test]
fn a_handshake_without_end_is_ended() {
    let mut server = probe();
    for _ in 0..MAX_OPTIONS_PER_HANDSHAKE {
        server.send(&option(99, &[])).unwrap();
    }
    let error = server.send(&option(99, &[])).unwrap_err();
    assert!(matches!(error, ProtocolError::TooLong { .. }), "{error}");
}

#[test]
fn nothing_is_consumed_of_a_message_that_is_not_whole() {
    let mut out = BytesMut::new();
    let handshake = Handshake::start(ServerConfig::default(), &mut out);
    let mut input = BytesMut::from(&3_u32.to_be_bytes()[..]);
    input.extend_from_slice(&option(opt::GO, &info_payload(b"disk", &[]))[..20]);
    let step = handshake.advance(&mut input, &mut out).unwrap();
    assert!(matches!(step, HandshakeStep::NeedsInput(_)));
    assert_eq!(input.len(), 20);
}
