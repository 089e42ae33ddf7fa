//! The handshake, both directions.

use bytes::BytesMut;
use nbd_proto::handshake::client::{
    AwaitStep, ClientHandshake, ClientStep, ExportStep, InfoRequest, OptionPhase,
};
use nbd_proto::handshake::server::{Handshake, ServerConfig, TlsPolicy};
use nbd_proto::wire::{
    BlockSizes, MetaContextId, MetaContextName, OptionReplyType, ReplyMode, TransmissionFlags,
};

use super::common::listing::bytes;
use super::common::{After, Probe, serve_handshake};

const GREETING: &str = "
    'NBDMAGIC'   # magic
    'IHAVEOPT'   # newstyle
    0003         # FIXED_NEWSTYLE, NO_ZEROES
";

/// A client in the option phase, with the bytes it has sent so far thrown away.
fn phase() -> (OptionPhase, BytesMut) {
    let mut out = BytesMut::new();
    let mut input = BytesMut::from(&bytes(GREETING)[..]);
    let step = ClientHandshake::new().advance(&mut input, &mut out).unwrap();
    let ClientStep::Newstyle(phase) = step else { panic!("the greeting is newstyle") };
    assert!(input.is_empty());
    assert_eq!(out[..], bytes("00000003"), "client flags: FIXED_NEWSTYLE, NO_ZEROES");
    out.clear();
    (phase, out)
}

fn structured_phase() -> (OptionPhase, BytesMut) {
    let (phase, mut out) = phase();
    let awaiting = phase.structured_reply(&mut out).unwrap();
    let mut input = BytesMut::from(&bytes(STRUCTURED_ACK)[..]);
    let AwaitStep::Accepted(phase) = awaiting.advance(&mut input).unwrap() else {
        panic!("it is acknowledged");
    };
    out.clear();
    (phase, out)
}

const STRUCTURED: &str = "
    'IHAVEOPT' 00000008 00000000          # STRUCTURED_REPLY, no payload
";
const STRUCTURED_ACK: &str = "
    0003e889045565a9                      # option reply magic
    00000008 00000001 00000000            # to STRUCTURED_REPLY: ACK, no payload
";

#[test]
fn greeting_and_client_flags() {
    let mut out = BytesMut::new();
    let _handshake = Handshake::start(ServerConfig::default(), &mut out);
    assert_eq!(out[..], bytes(GREETING));
    phase();
}

#[test]
fn oldstyle_greeting() {
    let mut input = BytesMut::from(
        &bytes(
            "'NBDMAGIC'
             0000420281861253    # oldstyle
             0000000000100000    # size: 1 MiB
             00000003            # HAS_FLAGS, READ_ONLY
             00x124              # reserved",
        )[..],
    );
    let mut out = BytesMut::new();
    let step = ClientHandshake::new().advance(&mut input, &mut out).unwrap();
    let ClientStep::Oldstyle(negotiated) = step else { panic!("{step:?}") };
    assert_eq!(negotiated.size, 1 << 20);
    assert_eq!(negotiated.flags, TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY);
    assert_eq!(negotiated.reply_mode, ReplyMode::Simple);
    assert!(out.is_empty(), "an oldstyle client says nothing");
    assert!(input.is_empty());
}

#[test]
fn export_name_with_and_without_the_zeroes() {
    let option = bytes("'IHAVEOPT' 00000001 00000002 'ro'");
    let short = bytes(
        "00000000000003e9    # size: 1001
         0407                # HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_CACHE",
    );
    let long = [&short[..], &[0; 124]].concat();
    for (client_flags, answer) in [(3, &short), (1, &long)] {
        let mut server = Probe::new(ServerConfig::default(), client_flags);
        assert_eq!(server.send(&option).unwrap(), *answer);
        assert_eq!(server.negotiated().export_name, "ro");
    }

    let (phase, mut out) = phase();
    let awaiting = phase.export_name("ro", &mut out).unwrap();
    assert_eq!(out[..], option);
    let mut input = BytesMut::from(&short[..]);
    let ExportStep::Transmission(negotiated) = awaiting.advance(&mut input).unwrap() else {
        panic!("the answer is whole");
    };
    assert_eq!(negotiated.size, 1001);
    assert!(negotiated.flags.contains(TransmissionFlags::READ_ONLY));
}

#[test]
fn abort() {
    let option = bytes("'IHAVEOPT' 00000002 00000000");
    let answer = bytes("0003e889045565a9 00000002 00000001 00000000    # ACK");
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(server.send(&option).unwrap(), answer);
    assert!(matches!(server.after, Some(After::Closed)));

    let (phase, mut out) = phase();
    let awaiting = phase.abort(&mut out).unwrap();
    assert_eq!(out[..], option);
    let step = awaiting.advance(&mut BytesMut::from(&answer[..])).unwrap();
    assert!(matches!(step, AwaitStep::Accepted(())));
}

#[test]
fn list() {
    let option = bytes("'IHAVEOPT' 00000003 00000000");
    let answer = bytes(
        "0003e889045565a9 00000003 00000002 0000001e    # to LIST: SERVER, 30 bytes
         00000004 'disk' 'a disk with everything'       # name length, name, description
         0003e889045565a9 00000003 00000002 0000000b
         00000007 'sectors'                             # no description
         0003e889045565a9 00000003 00000002 00000006
         00000002 'ro'
         0003e889045565a9 00000003 00000001 00000000    # ACK",
    );
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(server.send(&option).unwrap(), answer);

    let (phase, mut out) = phase();
    let awaiting = phase.list(&mut out).unwrap();
    assert_eq!(out[..], option);
    let step = awaiting.advance(&mut BytesMut::from(&answer[..])).unwrap();
    let AwaitStep::Accepted((exports, _)) = step else { panic!("{step:?}") };
    assert_eq!(exports, super::common::listed_exports());
}

#[test]
fn starttls() {
    let option = bytes("'IHAVEOPT' 00000005 00000000");
    let answer = bytes("0003e889045565a9 00000005 00000001 00000000    # ACK");
    let mut server = Probe::fixed(ServerConfig::new().tls(TlsPolicy::Allow));
    assert_eq!(server.send(&option).unwrap(), answer);
    assert!(matches!(server.after, Some(After::BeforeTls(_))));

    let (phase, mut out) = phase();
    let awaiting = phase.start_tls(&mut out).unwrap();
    assert_eq!(out[..], option);
    let step = awaiting.advance(&mut BytesMut::from(&answer[..])).unwrap();
    let AwaitStep::Accepted(before) = step else { panic!("{step:?}") };
    assert!(before.resume_after_tls().is_tls_established());
}

#[test]
fn info_with_every_item() {
    let option = bytes(
        "'IHAVEOPT' 00000006 00000010    # INFO, 16 bytes
         00000004 'disk'                 # name
         0003 0001 0002 0003             # three requests: NAME, DESCRIPTION, BLOCK_SIZE",
    );
    let answer = bytes(
        "0003e889045565a9 00000006 00000003 00000006
         0001 'disk'                                       # NAME
         0003e889045565a9 00000006 00000003 00000018
         0002 'a disk with everything'                     # DESCRIPTION
         0003e889045565a9 00000006 00000003 0000000e
         0003 00000001 00001000 02000000                   # BLOCK_SIZE: 1, 4 KiB, 32 MiB
         0003e889045565a9 00000006 00000003 0000000c
         0000 0000000000100000 0d6d                        # EXPORT: 1 MiB, flags
         0003e889045565a9 00000006 00000001 00000000       # ACK",
    );
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(server.send(&option).unwrap(), answer);

    let (phase, mut out) = phase();
    let awaiting = phase.info("disk", InfoRequest::ALL, &mut out).unwrap();
    assert_eq!(out[..], option);
    let step = awaiting.advance(&mut BytesMut::from(&answer[..])).unwrap();
    let AwaitStep::Accepted((info, _)) = step else { panic!("{step:?}") };
    assert_eq!(info.size, 1 << 20);
    assert_eq!(info.flags.bits(), 0x0d6d);
    assert_eq!(info.block_sizes, Some(BlockSizes::default()));
    assert_eq!(info.canonical_name.as_deref(), Some("disk"));
    assert_eq!(info.description.as_deref(), Some("a disk with everything"));
}

#[test]
fn go_with_block_sizes() {
    let option = bytes(
        "'IHAVEOPT' 00000007 0000000f    # GO, 15 bytes
         00000007 'sectors'              # name
         0001 0003                       # one request: BLOCK_SIZE",
    );
    let answer = bytes(
        "0003e889045565a9 00000007 00000003 0000000e
         0003 00000200 00001000 00010000                   # BLOCK_SIZE: 512, 4 KiB, 64 KiB
         0003e889045565a9 00000007 00000003 0000000c
         0000 0000000000100000 0d6d                        # EXPORT
         0003e889045565a9 00000007 00000001 00000000       # ACK",
    );
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(server.send(&option).unwrap(), answer);
    let of_server = server.negotiated();

    let (phase, mut out) = phase();
    let awaiting = phase.go("sectors", InfoRequest::default(), &mut out).unwrap();
    assert_eq!(out[..], option);
    let step = awaiting.advance(&mut BytesMut::from(&answer[..])).unwrap();
    let AwaitStep::Accepted(accepted) = step else { panic!("{step:?}") };
    assert_eq!(accepted.0, of_server, "both sides know the same");
}

#[test]
fn structured_replies_and_extended_headers() {
    let extended = bytes("'IHAVEOPT' 0000000b 00000000");
    let extended_ack = bytes("0003e889045565a9 0000000b 00000001 00000000");
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(server.send(&bytes(STRUCTURED)).unwrap(), bytes(STRUCTURED_ACK));
    assert_eq!(server.send(&extended).unwrap(), extended_ack);

    let (phase, mut out) = phase();
    let awaiting = phase.structured_reply(&mut out).unwrap();
    assert_eq!(out.split()[..], bytes(STRUCTURED));
    let step = awaiting.advance(&mut BytesMut::from(&bytes(STRUCTURED_ACK)[..])).unwrap();
    let AwaitStep::Accepted(phase) = step else { panic!("{step:?}") };
    assert_eq!(phase.reply_mode(), ReplyMode::Structured);
    let awaiting = phase.extended_headers(&mut out).unwrap();
    assert_eq!(out[..], extended);
    let step = awaiting.advance(&mut BytesMut::from(&extended_ack[..])).unwrap();
    let AwaitStep::Accepted(phase) = step else { panic!("{step:?}") };
    assert_eq!(phase.reply_mode(), ReplyMode::Extended);
}

#[test]
fn list_meta_context() {
    let option = bytes(
        "'IHAVEOPT' 00000009 00000015    # LIST_META_CONTEXT, 21 bytes
         00000004 'disk'                 # export name
         00000001 00000005 'qemu:'       # one query",
    );
    let answer = bytes(
        "0003e889045565a9 00000009 00000004 00000019
         00000001 'qemu:allocation-depth'                  # context 1
         0003e889045565a9 00000009 00000004 00000018
         00000002 'qemu:dirty-bitmap:b0'                   # context 2
         0003e889045565a9 00000009 00000001 00000000       # ACK",
    );
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(server.send(&option).unwrap(), answer);

    let (phase, mut out) = phase();
    let awaiting = phase.list_meta_context("disk", &["qemu:"], &mut out).unwrap();
    assert_eq!(out[..], option);
    let step = awaiting.advance(&mut BytesMut::from(&answer[..])).unwrap();
    let AwaitStep::Accepted((names, _)) = step else { panic!("{step:?}") };
    assert_eq!(names[0], MetaContextName::qemu_allocation_depth());
    assert_eq!(names[1].dirty_bitmap(), Some("b0"));
}

#[test]
fn set_meta_context() {
    let option = bytes(
        "'IHAVEOPT' 0000000a 0000001f    # SET_META_CONTEXT, 31 bytes
         00000004 'disk'                 # export name
         00000001                        # one query
         0000000f 'base:allocation'",
    );
    let answer = bytes(
        "0003e889045565a9 0000000a 00000004 00000013
         00000000 'base:allocation'                        # context 0
         0003e889045565a9 0000000a 00000001 00000000       # ACK",
    );
    let mut server = Probe::fixed(ServerConfig::default());
    server.send(&bytes(STRUCTURED)).unwrap();
    assert_eq!(server.send(&option).unwrap(), answer);

    let (phase, mut out) = structured_phase();
    let wanted = [MetaContextName::base_allocation()];
    let awaiting = phase.set_meta_context("disk", &wanted, &mut out).unwrap();
    assert_eq!(out[..], option);
    let step = awaiting.advance(&mut BytesMut::from(&answer[..])).unwrap();
    let AwaitStep::Accepted((contexts, _)) = step else { panic!("{step:?}") };
    assert_eq!(contexts, [(MetaContextId(0), MetaContextName::base_allocation())]);
}

#[test]
fn every_error_reply_type() {
    let known = [
        (0x8000_0001, OptionReplyType::ERR_UNSUP),
        (0x8000_0002, OptionReplyType::ERR_POLICY),
        (0x8000_0003, OptionReplyType::ERR_INVALID),
        (0x8000_0004, OptionReplyType::ERR_PLATFORM),
        (0x8000_0005, OptionReplyType::ERR_TLS_REQD),
        (0x8000_0006, OptionReplyType::ERR_UNKNOWN),
        (0x8000_0007, OptionReplyType::ERR_SHUTDOWN),
        (0x8000_0008, OptionReplyType::ERR_BLOCK_SIZE_REQD),
        (0x8000_0009, OptionReplyType::ERR_TOO_BIG),
        (0x8000_000a, OptionReplyType::ERR_EXT_HEADER_REQD),
        (0x8000_ffff, OptionReplyType(0x8000_ffff)),
    ];
    for (number, reply) in known {
        let mut answer = bytes("0003e889045565a9 00000003");
        answer.extend(u32::to_be_bytes(number));
        answer.extend(bytes("00000003 'why'"));
        let (phase, mut out) = phase();
        let step = phase.list(&mut out).unwrap().advance(&mut BytesMut::from(&answer[..])).unwrap();
        let AwaitStep::Refused { error, .. } = step else { panic!("{step:?}") };
        assert_eq!((error.reply, error.message.as_str()), (reply, "why"));
    }
}

#[test]
fn an_unknown_option_is_answered_with_a_reason() {
    let mut server = Probe::fixed(ServerConfig::default());
    let answer = server.send(&bytes("'IHAVEOPT' 00000063 00000003 aabbcc")).unwrap();
    let head = bytes("0003e889045565a9 00000063 80000001    # to option 99: ERR_UNSUP");
    assert_eq!(answer[..16], head);
    assert!(answer.len() > 20, "and says why");
}

#[test]
fn a_server_with_nothing_to_read_waits() {
    let mut out = BytesMut::new();
    let handshake = Handshake::start(ServerConfig::default(), &mut out);
    let after = serve_handshake(handshake, &mut BytesMut::new(), &mut out).unwrap();
    assert!(matches!(after, After::Handshake(_)));
}
