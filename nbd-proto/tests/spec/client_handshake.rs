//! Messages of the handshake that a client refuses.

use bytes::BytesMut;
use nbd_proto::handshake::client::{
    Answer, AwaitStep, Awaiting, ClientHandshake, ClientStep, ExportStep, InfoRequest, OptionPhase,
};
use nbd_proto::limits::{MAX_INFO_ITEMS, MAX_LISTED_EXPORTS, MAX_META_CONTEXTS};
use nbd_proto::wire::{MetaContextName, ReplyMode, TransmissionFlags};
use nbd_proto::{ApiMisuse, ProtocolError};

use super::common::listing::{counted, reply};
use super::{opt, rep};

fn greeted(flags: &[u8; 2], out: &mut BytesMut) -> OptionPhase {
    let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT"[..]);
    input.extend_from_slice(flags);
    let step = ClientHandshake::new().advance(&mut input, out).unwrap();
    let ClientStep::Newstyle(phase) = step else { panic!("{step:?}") };
    phase
}

fn phase() -> OptionPhase {
    greeted(b"\0\x03", &mut BytesMut::new())
}

fn structured_phase() -> OptionPhase {
    let awaiting = phase().structured_reply(&mut BytesMut::new()).unwrap();
    accepted(awaiting, &[reply(opt::STRUCTURED_REPLY, rep::ACK, &[])])
}

fn answer<A: Answer>(
    awaiting: Awaiting<A>,
    replies: &[Vec<u8>],
) -> Result<AwaitStep<A>, ProtocolError> {
    awaiting.advance(&mut BytesMut::from(&replies.concat()[..]))
}

fn accepted<A: Answer>(awaiting: Awaiting<A>, replies: &[Vec<u8>]) -> A::Accepted {
    match answer(awaiting, replies).unwrap() {
        AwaitStep::Accepted(accepted) => accepted,
        AwaitStep::NeedsInput(_) => panic!("the answer is whole"),
        AwaitStep::Refused { error, .. } => panic!("{error}"),
    }
}

fn go() -> Awaiting<nbd_proto::handshake::client::Go> {
    phase().go("disk", InfoRequest::ALL, &mut BytesMut::new()).unwrap()
}

fn info(kind: u16, content: &[u8]) -> Vec<u8> {
    reply(opt::GO, rep::INFO, &[&kind.to_be_bytes(), content].concat())
}

fn info_export(size: u64, flags: u16) -> Vec<u8> {
    info(0, &[&size.to_be_bytes()[..], &flags.to_be_bytes()].concat())
}

fn ack() -> Vec<u8> {
    reply(opt::GO, rep::ACK, &[])
}

fn refuses(replies: &[Vec<u8>]) -> ProtocolError {
    answer(go(), replies).expect_err("a client that distrusts the server")
}

#[test]
fn a_greeting_of_something_else_is_refused_at_once() {
    for greeting in [&b"SSH-2.0-"[..], b"NBDMAGICxxxxxxxx", b"HTTP/1.1 400 Bad"] {
        let mut input = BytesMut::from(greeting);
        let error = ClientHandshake::new().advance(&mut input, &mut BytesMut::new()).unwrap_err();
        assert!(matches!(error, ProtocolError::BadMagic { .. }), "{error}");
    }
}

#[test]
fn only_flags_of_the_server_are_answered_and_unknown_ones_are_ignored() {
    for (server, client) in [(b"\0\0", 0), (b"\0\x01", 1), (b"\0\x02", 2), (b"\xff\xff", 3_u32)] {
        let mut out = BytesMut::new();
        greeted(server, &mut out);
        assert_eq!(out[..], client.to_be_bytes());
    }
}

#[test]
fn a_server_that_is_not_fixed_newstyle_only_gets_export_name() {
    let plain = || greeted(b"\0\0", &mut BytesMut::new());
    let mut out = BytesMut::new();
    let misuse = plain().list(&mut out).unwrap_err();
    assert!(matches!(misuse, ApiMisuse::NotNegotiated { .. }), "{misuse}");
    assert!(plain().go("disk", InfoRequest::default(), &mut out).is_err());
    assert!(out.is_empty());
    plain().export_name("disk", &mut out).unwrap();
    assert!(!out.is_empty());
}

#[test]
fn a_reply_to_another_option_is_refused() {
    refuses(&[reply(opt::LIST, rep::ERR_UNKNOWN, &[])]);
    refuses(&[info_export(1, 1), reply(opt::INFO, rep::ACK, &[])]);
}

#[test]
fn a_reply_of_the_wrong_kind_is_refused() {
    refuses(&[reply(opt::GO, rep::SERVER, &counted(b"x"))]);
    refuses(&[reply(opt::GO, rep::META_CONTEXT, &[0; 8])]);
    refuses(&[reply(opt::GO, 77, &[])]);
    let awaiting = phase().structured_reply(&mut BytesMut::new()).unwrap();
    answer(awaiting, &[reply(opt::STRUCTURED_REPLY, rep::INFO, &[0, 0])]).unwrap_err();
}

#[test]
fn a_bad_reply_magic_is_refused() {
    refuses(&[vec![0x55; 20]]);
}

#[test]
fn an_acknowledgement_with_data_is_refused() {
    refuses(&[info_export(1, 1), reply(opt::GO, rep::ACK, b"x")]);
}

#[test]
fn go_needs_size_and_flags_before_the_acknowledgement() {
    refuses(&[ack()]);
    refuses(&[info(1, b"disk"), ack()]);
    let negotiated = accepted(go(), &[info_export(5, 1), ack()]).0;
    assert_eq!(negotiated.size, 5);
}

#[test]
fn sizes_of_2_to_the_63_and_more_are_refused() {
    for size in [1 << 63, u64::MAX] {
        let error = refuses(&[info_export(size, 1), ack()]);
        assert_eq!(error, ProtocolError::ExportTooLarge { size });
        let awaiting = phase().export_name("disk", &mut BytesMut::new()).unwrap();
        let mut input = BytesMut::from(&size.to_be_bytes()[..]);
        input.extend_from_slice(&[0, 1]);
        assert!(awaiting.advance(&mut input).is_err());
        let mut greeting = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53".to_vec();
        greeting.extend(size.to_be_bytes());
        greeting.extend([0; 128]);
        let mut input = BytesMut::from(&greeting[..]);
        assert!(ClientHandshake::new().advance(&mut input, &mut BytesMut::new()).is_err());
    }
    accepted(go(), &[info_export((1 << 63) - 1, 1), ack()]);
}

#[test]
fn items_of_the_wrong_length_are_refused() {
    for content in [&[0; 9][..], &[0; 11]] {
        refuses(&[info(0, content)]);
    }
    for content in [&[0; 11][..], &[0; 13]] {
        refuses(&[info(3, content)]);
    }
    refuses(&[reply(opt::GO, rep::INFO, &[0])]);
}

#[test]
fn block_sizes_that_break_the_rules_are_refused() {
    let sizes = |minimum: u32, preferred: u32, maximum: u32| {
        info(3, &[minimum, preferred, maximum].map(u32::to_be_bytes).concat())
    };
    for (minimum, preferred, maximum) in [
        (0, 4096, 65536),
        (3, 4096, 65536),
        (1 << 17, 1 << 17, 1 << 20),
        (512, 256, 65536),
        (1, 4096, 512),
    ] {
        refuses(&[sizes(minimum, preferred, maximum)]);
    }
    let replies = [sizes(512, 4096, u32::MAX), info_export(1 << 20, 1), ack()];
    assert_eq!(accepted(go(), &replies).0.block_sizes.minimum(), 512);
}

#[test]
fn strings_beyond_4096_bytes_or_with_nul_are_refused() {
    for kind in [1, 2] {
        refuses(&[info(kind, &[b'a'; 4097])]);
        refuses(&[info(kind, b"a\0b")]);
        refuses(&[info(kind, b"\xff")]);
        let replies = [info(kind, &[b'a'; 4096]), info_export(1, 1), ack()];
        accepted(go(), &replies);
    }
}

#[test]
fn unknown_information_is_ignored_within_bounds() {
    let unknown = info(0x7777, &[1; 5000]);
    accepted(go(), &[unknown, info_export(1, 1), ack()]);
    let endless: Vec<Vec<u8>> = (0..=MAX_INFO_ITEMS).map(|_| info(0x7777, &[])).collect();
    refuses(&endless);
}

#[test]
fn the_same_information_twice_is_refused() {
    refuses(&[info_export(1, 1), info_export(2, 1)]);
}

#[test]
fn unknown_transmission_flags_are_ignored() {
    let flags = |bits| accepted(go(), &[info_export(1, bits), ack()]).0.flags;
    assert_eq!(flags(0xe001), TransmissionFlags::HAS_FLAGS);
    assert!(flags(0x0006).is_empty(), "without HAS_FLAGS they mean nothing");
    assert!(!flags(0x1081).contains(TransmissionFlags::SEND_DF), "DF needs structured replies");
}

#[test]
fn an_error_text_of_any_kind_is_kept_within_bounds() {
    let step = answer(go(), &[reply(opt::GO, rep::ERR_UNKNOWN, &[0xff; 10_000])]).unwrap();
    let AwaitStep::Refused { error, .. } = step else { panic!("{step:?}") };
    assert!(error.message.len() <= 4096);
}

#[test]
fn go_that_is_unsupported_leaves_room_for_export_name() {
    let step = answer(go(), &[reply(opt::GO, rep::ERR_UNSUP, &[])]).unwrap();
    let AwaitStep::Refused { next, .. } = step else { panic!("{step:?}") };
    let awaiting = next.export_name("disk", &mut BytesMut::new()).unwrap();
    let mut input = BytesMut::from(&[0, 0, 0, 0, 0, 0, 0, 9, 0, 1][..]);
    let step = awaiting.advance(&mut input).unwrap();
    assert!(matches!(step, ExportStep::Transmission(negotiated) if negotiated.size == 9));
}

#[test]
fn export_name_waits_for_the_zeroes_unless_they_are_left_out() {
    let padded = greeted(b"\0\x01", &mut BytesMut::new());
    let awaiting = padded.export_name("", &mut BytesMut::new()).unwrap();
    let mut input = BytesMut::from(&[0; 133][..]);
    let ExportStep::NeedsInput(awaiting) = awaiting.advance(&mut input).unwrap() else {
        panic!("one byte is missing");
    };
    input.extend_from_slice(&[0, 0xaa]);
    assert!(matches!(awaiting.advance(&mut input).unwrap(), ExportStep::Transmission(_)));
    assert_eq!(input[..], [0xaa], "what follows belongs to transmission");
}

#[test]
fn export_name_after_extended_headers_is_not_sent() {
    let awaiting = phase().extended_headers(&mut BytesMut::new()).unwrap();
    let phase = accepted(awaiting, &[reply(opt::EXTENDED_HEADERS, rep::ACK, &[])]);
    assert!(phase.export_name("disk", &mut BytesMut::new()).is_err());
}

#[test]
fn names_the_protocol_cannot_carry_are_not_sent() {
    let mut out = BytesMut::new();
    for name in ["a".repeat(4097), "a\0b".to_owned()] {
        assert!(OptionPhase::check_export_name(&name).is_err());
        assert!(phase().go(&name, InfoRequest::ALL, &mut out).is_err());
        assert!(phase().info(&name, InfoRequest::ALL, &mut out).is_err());
        assert!(phase().export_name(&name, &mut out).is_err());
        assert!(phase().list_meta_context(&name, &[], &mut out).is_err());
        assert!(phase().list_meta_context("disk", &[&name], &mut out).is_err());
    }
    assert!(out.is_empty(), "nothing was sent");
}

#[test]
fn listed_names_longer_than_their_reply_are_refused() {
    let list = || phase().list(&mut BytesMut::new()).unwrap();
    for payload in [&b"\0\0\0\x05disk"[..], b"\xff\xff\xff\xffdisk", b"\0\0", b""] {
        answer(list(), &[reply(opt::LIST, rep::SERVER, payload)]).unwrap_err();
    }
    let long = counted(&[b'a'; 4097]);
    answer(list(), &[reply(opt::LIST, rep::SERVER, &long)]).unwrap_err();
}

#[test]
fn an_endless_list_is_ended() {
    let mut awaiting = phase().list(&mut BytesMut::new()).unwrap();
    let item = reply(opt::LIST, rep::SERVER, &counted(b"x"));
    for _ in 0..MAX_LISTED_EXPORTS {
        let step = answer(awaiting, std::slice::from_ref(&item)).unwrap();
        let AwaitStep::NeedsInput(next) = step else { panic!("not over") };
        awaiting = next;
    }
    answer(awaiting, &[item]).unwrap_err();
}

#[test]
fn contexts_never_asked_for_or_given_twice_are_refused() {
    let set = || {
        let wanted = [
            MetaContextName::base_allocation(),
            MetaContextName::base_allocation(),
            MetaContextName::qemu_allocation_depth(),
        ];
        structured_phase().set_meta_context("disk", &wanted, &mut BytesMut::new()).unwrap()
    };
    let item = |id: u32, name: &str| {
        let payload = [&id.to_be_bytes()[..], name.as_bytes()].concat();
        reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &payload)
    };
    let ack = reply(opt::SET_META_CONTEXT, rep::ACK, &[]);
    answer(set(), &[item(0, "x:y")]).unwrap_err();
    answer(set(), &[item(0, "base:allocation"), item(1, "base:allocation")]).unwrap_err();
    answer(set(), &[item(7, "base:allocation"), item(7, "qemu:allocation-depth")]).unwrap_err();
    answer(set(), &[reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &[0, 0])]).unwrap_err();
    let replies = [item(9, "qemu:allocation-depth"), ack];
    assert_eq!(accepted(set(), &replies).0.len(), 1, "a part of what was asked for is fine");
}

#[test]
fn a_selection_counts_only_for_the_export_it_was_made_for() {
    for (go, count) in [("disk", 1), ("other", 0), ("", 0)] {
        let wanted = [MetaContextName::base_allocation()];
        let awaiting =
            structured_phase().set_meta_context("disk", &wanted, &mut BytesMut::new()).unwrap();
        let item = reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, b"\0\0\0\0base:allocation");
        let replies = [item, reply(opt::SET_META_CONTEXT, rep::ACK, &[])];
        let (_, phase) = accepted(awaiting, &replies);
        let awaiting = phase.go(go, InfoRequest::default(), &mut BytesMut::new()).unwrap();
        let negotiated = accepted(awaiting, &[info_export(1, 1), ack()]).0;
        assert_eq!(negotiated.meta_contexts.len(), count, "{go:?}");
        assert_eq!(negotiated.reply_mode, ReplyMode::Structured);
    }
}

#[test]
fn contexts_cannot_be_selected_without_structured_replies() {
    let wanted = [MetaContextName::base_allocation()];
    let misuse = phase().set_meta_context("disk", &wanted, &mut BytesMut::new()).unwrap_err();
    assert!(matches!(misuse, ApiMisuse::NotNegotiated { .. }), "{misuse}");
}

#[test]
fn an_endless_list_of_contexts_is_ended() {
    let awaiting = phase().list_meta_context("disk", &[], &mut BytesMut::new()).unwrap();
    let item = reply(opt::LIST_META_CONTEXT, rep::META_CONTEXT, b"\0\0\0\0x:same");
    answer(awaiting, &vec![item; MAX_META_CONTEXTS + 1]).unwrap_err();
}

#[test]
fn a_server_that_dies_at_any_byte_leaves_the_client_waiting() {
    let replies = [info(3, &[0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]), info_export(1, 1), ack()];
    let whole = replies.concat();
    for end in 0..whole.len() {
        let step = go().advance(&mut BytesMut::from(&whole[..end])).unwrap();
        assert!(matches!(step, AwaitStep::NeedsInput(_)), "{end} bytes");
    }
}
