//! Flaws that other implementations had, as far as they concern the protocol.

use bytes::BytesMut;
use nbd_proto::handshake::client::{AwaitStep, ClientHandshake, ClientStep, InfoRequest};
use nbd_proto::handshake::server::{Handshake, ServerConfig};
use nbd_proto::limits::MAX_ERROR_MESSAGE_LEN;
use nbd_proto::transmission::{ReplyEncoder, RequestTag};
use nbd_proto::wire::{CommandType, Cookie, Errno, ReplyMode};

use super::common::listing::{counted, info_payload, option, reply};
use super::common::{Probe, serve_handshake};
use super::{opt, rep};

/// CVE-2017-2630: a client's stack overflowed on a LIST answer with a long name.
#[test]
fn lengths_of_2_to_the_32_in_answers_are_refused() {
    for (reply_len, name_len) in [(u32::MAX, 4), (8, u32::MAX), (32 << 20, u32::MAX)] {
        let mut out = BytesMut::new();
        let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT\0\x03"[..]);
        let ClientStep::Newstyle(phase) =
            ClientHandshake::new().advance(&mut input, &mut out).unwrap()
        else {
            panic!("newstyle");
        };
        let awaiting = phase.list(&mut out).unwrap();
        let mut bytes = reply(opt::LIST, rep::SERVER, &counted(b"disk"));
        bytes[16..20].copy_from_slice(&reply_len.to_be_bytes());
        bytes[20..24].copy_from_slice(&name_len.to_be_bytes());
        assert!(awaiting.advance(&mut BytesMut::from(&bytes[..])).is_err());
    }
}

/// CVE-2017-7539: a server's assertion fired on unexpected bytes in the negotiation.
#[test]
fn junk_at_every_byte_of_the_handshake_is_survived() {
    let mut valid = 3_u32.to_be_bytes().to_vec();
    valid.extend(option(opt::STRUCTURED_REPLY, &[]));
    valid.extend(option(opt::GO, &info_payload(b"disk", &[3])));
    for at in 0..valid.len() {
        for junk in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut bytes = valid.clone();
            bytes[at] = junk;
            let mut out = BytesMut::new();
            let handshake = Handshake::start(ServerConfig::default(), &mut out);
            // Any outcome but a panic.
            let _ = serve_handshake(handshake, &mut BytesMut::from(&bytes[..]), &mut out);
        }
    }
}

/// CVE-2017-15118, CVE-2022-26495, CVE-2022-26496: names overran buffers of the server.
#[test]
fn export_names_of_every_critical_length_are_handled() {
    for length in [0, 1, 255, 256, 257, 4095, 4096, 4097, 65536] {
        let name = vec![b'n'; length];
        let mut server = Probe::fixed(ServerConfig::default());
        let expected = match length {
            0 => rep::ACK,
            1..=4096 => rep::ERR_UNKNOWN,
            _ => rep::ERR_INVALID,
        };
        assert_eq!(server.last_reply(opt::INFO, &info_payload(&name, &[])), expected, "{length}");
        let is_fine = server.send(&option(opt::EXPORT_NAME, &name)).is_ok();
        assert_eq!(is_fine, length == 0, "only the default export exists");
    }
    let mut server = Probe::fixed(ServerConfig::default());
    for length in [u32::MAX, u32::MAX - 5, 1 << 31, 5] {
        let mut payload = info_payload(b"disk", &[]);
        payload[..4].copy_from_slice(&length.to_be_bytes());
        assert_eq!(server.last_reply(opt::GO, &payload), rep::ERR_INVALID, "{length:#x}");
    }
}

/// CVE-2017-15119: a huge option length kept a server busy for ever.
#[test]
fn a_huge_option_is_refused_from_its_header_alone() {
    let mut server = Probe::fixed(ServerConfig::default());
    let mut header = option(opt::LIST, &[]);
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(server.send(&header).is_err());
}

/// CVE-2020-10761: an error message that quoted a name of 4096 bytes fired an assertion.
#[test]
fn an_error_that_quotes_the_longest_name_stays_short() {
    let text = format!("export {} is unknown", "ü".repeat(2048));
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        let tag = RequestTag::new(Cookie(1), CommandType::READ, 0);
        let mut out = Vec::new();
        ReplyEncoder::new(mode).error(tag, Errno::EINVAL, &text, &mut out);
        assert!(out.len() <= 32 + 6 + MAX_ERROR_MESSAGE_LEN);
    }
    let mut out = BytesMut::new();
    let handshake = Handshake::start(ServerConfig::default(), &mut out);
    let mut input = BytesMut::from(&3_u32.to_be_bytes()[..]);
    input.extend_from_slice(&option(opt::GO, &info_payload("ü".repeat(2048).as_bytes(), &[])));
    out.clear();
    let step = handshake.advance(&mut input, &mut out).unwrap();
    let nbd_proto::handshake::server::HandshakeStep::Go(go) = step else { panic!("{step:?}") };
    let _handshake = go.reject(nbd_proto::handshake::RefusalReason::UnknownExport, &text, &mut out);
    let replies = super::common::listing::replies(opt::GO, &out);
    assert_eq!(replies[0].0, rep::ERR_UNKNOWN);
    assert!(replies[0].1.len() <= MAX_ERROR_MESSAGE_LEN);
    assert!(std::str::from_utf8(&replies[0].1).is_ok(), "cut between characters");
}

/// CVE-2019-14851: an odd order of options fired an assertion.
#[test]
fn options_in_any_order_are_survived() {
    let options = [
        option(opt::STRUCTURED_REPLY, &[]),
        option(opt::EXTENDED_HEADERS, &[]),
        option(opt::INFO, &info_payload(b"disk", &[])),
        option(
            opt::SET_META_CONTEXT,
            &super::common::listing::meta_payload(b"disk", &[b"base:allocation"]),
        ),
        option(opt::LIST, &[]),
        option(opt::STARTTLS, &[]),
        option(opt::GO, &info_payload(b"nowhere", &[])),
    ];
    // Every order of every pair and triple, with repetition.
    for a in &options {
        for b in &options {
            for c in &options {
                let mut server = Probe::fixed(ServerConfig::default());
                for option in [a, b, c] {
                    let answer = server.send(option).unwrap();
                    assert!(!answer.is_empty());
                }
                assert!(server.is_in_handshake());
                assert_eq!(server.last_reply(opt::ABORT, &[]), rep::ACK);
            }
        }
    }
}

/// CVE-2021-20286: a client's assertion fired when the server died while an option was open.
#[test]
fn a_refusal_of_every_option_leaves_a_client_that_can_go_on() {
    let mut out = BytesMut::new();
    let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT\0\x03"[..]);
    let ClientStep::Newstyle(phase) = ClientHandshake::new().advance(&mut input, &mut out).unwrap()
    else {
        panic!("newstyle");
    };
    let awaiting = phase.list(&mut out).unwrap();
    input.extend_from_slice(&reply(opt::LIST, 0x8000_0007, b"shutting down"));
    let AwaitStep::Refused { next, .. } = awaiting.advance(&mut input).unwrap() else { panic!() };
    let awaiting = next.info("disk", InfoRequest::ALL, &mut out).unwrap();
    input.extend_from_slice(&reply(opt::INFO, 0x8000_0007, b""));
    let AwaitStep::Refused { next, .. } = awaiting.advance(&mut input).unwrap() else { panic!() };
    assert!(next.abort(&mut out).is_ok());
}
