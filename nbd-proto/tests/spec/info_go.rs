//! Section "Option types", NBD_OPT_INFO and NBD_OPT_GO, the server's side.

use nbd_proto::handshake::server::ServerConfig;
use nbd_proto::wire::{ReplyMode, TransmissionFlags};

use super::common::Probe;
use super::common::listing::{counted, info_payload, meta_payload};
use super::{opt, rep};

fn probe() -> Probe {
    Probe::fixed(ServerConfig::default())
}

/// The types of the information items in an answer.
fn items(replies: &[(u32, Vec<u8>)]) -> Vec<u16> {
    let infos = replies.iter().filter(|(kind, _)| *kind == rep::INFO);
    infos.map(|(_, payload)| u16::from_be_bytes([payload[0], payload[1]])).collect()
}

#[test]
fn export_and_block_size_are_told_unasked() {
    let replies = probe().option(opt::INFO, &info_payload(b"disk", &[])).unwrap();
    let mut items = items(&replies);
    items.sort_unstable();
    assert_eq!(items, [0, 3]);
    assert_eq!(replies.last().unwrap().0, rep::ACK);
}

#[test]
fn name_and_description_are_told_when_asked_for() {
    let replies = probe().option(opt::INFO, &info_payload(b"", &[1, 2])).unwrap();
    let mut kinds = items(&replies);
    kinds.sort_unstable();
    assert_eq!(kinds, [0, 1, 2, 3]);
    let name = replies.iter().find(|(_, payload)| payload.starts_with(&[0, 1])).unwrap();
    assert_eq!(name.1[2..], *b"disk", "the canonical name of the default export");
    let replies = probe().option(opt::INFO, &info_payload(b"ro", &[2])).unwrap();
    assert!(!items(&replies).contains(&2), "there is no description to tell");
}

#[test]
fn unknown_and_repeated_information_requests_are_ignored() {
    let payload = info_payload(b"disk", &[77, 0, 3, 3, 0xffff]);
    assert_eq!(probe().last_reply(opt::GO, &payload), rep::ACK);
}

#[test]
fn info_leaves_the_handshake_where_it_is_and_go_ends_it() {
    let mut server = probe();
    assert_eq!(server.last_reply(opt::INFO, &info_payload(b"disk", &[])), rep::ACK);
    assert!(server.is_in_handshake());
    let replies = server.option(opt::GO, &info_payload(b"disk", &[])).unwrap();
    assert_eq!(replies.last().unwrap(), &(rep::ACK, Vec::new()), "no zeroes behind GO");
    assert_eq!(server.negotiated().export_name, "disk");
}

#[test]
fn go_for_an_unknown_export_is_an_error_and_the_handshake_goes_on() {
    let mut server = probe();
    assert_eq!(server.last_reply(opt::GO, &info_payload(b"nowhere", &[])), rep::ERR_UNKNOWN);
    assert_eq!(server.last_reply(opt::GO, &info_payload(b"disk", &[])), rep::ACK);
}

#[test]
fn a_payload_that_contradicts_itself_is_invalid_and_the_stream_stays_in_sync() {
    let good = info_payload(b"disk", &[3]);
    let mut bad: Vec<Vec<u8>> = (0..good.len()).map(|end| good[..end].to_vec()).collect();
    bad.push([&good[..], b"junk"].concat());
    bad.push(u32::MAX.to_be_bytes().to_vec());
    bad.push([&counted(b"disk")[..], &[0xff, 0xff]].concat());
    bad.push(info_payload(b"dis\0k", &[]));
    bad.push(info_payload(b"\xff\xfe", &[]));
    let mut server = probe();
    for payload in bad {
        assert_eq!(server.last_reply(opt::INFO, &payload), rep::ERR_INVALID, "{payload:x?}");
        assert_eq!(server.last_reply(opt::GO, &payload), rep::ERR_INVALID, "{payload:x?}");
    }
    assert_eq!(server.last_reply(opt::GO, &good), rep::ACK);
}

#[test]
fn block_sizes_have_to_be_asked_for_when_they_are_not_the_default() {
    for option in [opt::INFO, opt::GO] {
        let mut server = probe();
        let replies = server.option(option, &info_payload(b"sectors", &[])).unwrap();
        assert_eq!(replies.last().unwrap().0, rep::ERR_BLOCK_SIZE_REQD);
        assert!(items(&replies).contains(&3), "but they are told, to save a round trip");
        assert!(server.is_in_handshake());
        let asked = info_payload(b"sectors", &[3]);
        assert_eq!(server.last_reply(option, &asked), rep::ACK);
    }
}

#[test]
fn a_minimum_block_size_that_is_advice_is_told_to_those_who_ask_and_enforced_for_nobody() {
    for (wanted, told) in [(&[][..], 1), (&[3][..], 512)] {
        let mut server = probe();
        let replies = server.option(opt::GO, &info_payload(b"advice", wanted)).unwrap();
        let sizes = replies.iter().find(|(_, payload)| payload.starts_with(&[0, 3])).unwrap();
        assert_eq!(sizes.1[2..6], u32::to_be_bytes(told));
        let negotiated = server.negotiated();
        assert_eq!(negotiated.block_sizes.minimum(), 1);
        assert_eq!(negotiated.block_sizes.maximum_payload(), 65536);
    }
}

#[test]
fn flags_fit_the_reply_mode() {
    let flags = |prelude: &[u32]| {
        let mut server = probe();
        for option in prelude {
            assert_eq!(server.last_reply(*option, &[]), rep::ACK);
        }
        server.option(opt::GO, &info_payload(b"disk", &[])).unwrap();
        server.negotiated().flags
    };
    let df = TransmissionFlags::SEND_DF;
    assert!(!flags(&[]).contains(df));
    assert!(flags(&[opt::STRUCTURED_REPLY]).contains(df));
    assert!(flags(&[opt::EXTENDED_HEADERS]).contains(df));
}

#[test]
fn a_block_status_payload_is_offered_only_with_contexts_and_extended_headers() {
    let payload_flag = TransmissionFlags::BLOCK_STATUS_PAYLOAD;
    for (mode, selected, offered) in [
        (opt::STRUCTURED_REPLY, true, false),
        (opt::EXTENDED_HEADERS, false, false),
        (opt::EXTENDED_HEADERS, true, true),
    ] {
        let mut server = probe();
        server.last_reply(mode, &[]);
        if selected {
            let query = meta_payload(b"disk", &[b"base:allocation"]);
            assert_eq!(server.last_reply(opt::SET_META_CONTEXT, &query), rep::ACK);
        }
        server.option(opt::GO, &info_payload(b"disk", &[])).unwrap();
        let negotiated = server.negotiated();
        assert_eq!(negotiated.flags.contains(payload_flag), offered, "{mode} {selected}");
        assert_eq!(negotiated.reply_mode == ReplyMode::Extended, mode == opt::EXTENDED_HEADERS);
    }
}
