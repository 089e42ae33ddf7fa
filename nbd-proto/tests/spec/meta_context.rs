//! Section "Metadata querying" and the options LIST_META_CONTEXT and SET_META_CONTEXT, the server's
//! side.

use nbd_proto::handshake::server::ServerConfig;
use nbd_proto::limits::MAX_META_CONTEXT_QUERIES;
use nbd_proto::wire::MetaContextId;

use super::common::Probe;
use super::common::listing::{info_payload, meta_payload};
use super::{opt, rep};

fn structured() -> Probe {
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(server.last_reply(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    server
}

/// Sends a query and gives the contexts of the answer, which has to succeed.
fn contexts(server: &mut Probe, option: u32, name: &[u8], queries: &[&[u8]]) -> Vec<(u32, String)> {
    let mut replies = server.option(option, &meta_payload(name, queries)).unwrap();
    assert_eq!(replies.pop(), Some((rep::ACK, Vec::new())));
    let parse = |(kind, payload): (u32, Vec<u8>)| {
        assert_eq!(kind, rep::META_CONTEXT);
        let id = u32::from_be_bytes(payload[..4].try_into().unwrap());
        (id, String::from_utf8(payload[4..].to_vec()).unwrap())
    };
    replies.into_iter().map(parse).collect()
}

/// The contexts in force after GO for `name`.
fn in_force(mut server: Probe, name: &[u8]) -> Vec<u32> {
    server.option(opt::GO, &info_payload(name, &[3])).unwrap();
    server.negotiated().meta_contexts.into_iter().map(|(MetaContextId(id), _)| id).collect()
}

const BASE: &[u8] = b"base:allocation";
const BITMAP: &[u8] = b"qemu:dirty-bitmap:b0";

#[test]
fn no_query_lists_everything_and_sets_nothing() {
    let mut server = structured();
    let listed = contexts(&mut server, opt::LIST_META_CONTEXT, b"disk", &[]);
    let numbers: Vec<u32> = listed.iter().map(|(id, _)| *id).collect();
    assert_eq!(numbers, [0, 1, 2]);
    assert!(contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[]).is_empty());
    assert!(in_force(server, b"disk").is_empty());
}

#[test]
fn listing_may_precede_structured_replies_and_setting_may_not() {
    let mut server = Probe::fixed(ServerConfig::default());
    assert_eq!(contexts(&mut server, opt::LIST_META_CONTEXT, b"disk", &[b"base:"]).len(), 1);
    let query = meta_payload(b"disk", &[BASE]);
    assert_eq!(server.last_reply(opt::SET_META_CONTEXT, &query), rep::ERR_INVALID);
    assert_eq!(server.last_reply(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    assert_eq!(contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[BASE]).len(), 1);
}

#[test]
fn wildcards_list_and_never_set() {
    let mut server = structured();
    for (query, count) in
        [(&b"base:"[..], 1), (b"qemu:", 2), (b"qemu:dirty-bitmap:", 1), (b"", 0), (b"q", 0)]
    {
        let listed = contexts(&mut server, opt::LIST_META_CONTEXT, b"disk", &[query]);
        assert_eq!(listed.len(), count, "{query:?}");
        assert!(contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[query]).is_empty());
    }
}

#[test]
fn unknown_namespaces_are_ignored() {
    let mut server = structured();
    let queries: [&[u8]; 4] = [b"x-other:thing", b"no colon", b"base:unknown", BITMAP];
    let set = contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &queries);
    assert_eq!(set, [(2, "qemu:dirty-bitmap:b0".to_owned())]);
}

#[test]
fn a_set_replaces_the_former_one() {
    let mut server = structured();
    contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[BASE, BITMAP]);
    contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[BITMAP]);
    assert_eq!(in_force(server, b"disk"), [2]);
}

#[test]
fn a_set_that_fails_leaves_nothing_selected() {
    let broken = [
        meta_payload(b"nowhere", &[BASE]),
        meta_payload(b"disk", &[b"base:\0"]),
        b"short".to_vec(),
        vec![0; 2 << 20],
    ];
    for payload in broken {
        let mut server = structured();
        contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[BASE]);
        let refusal = server.last_reply(opt::SET_META_CONTEXT, &payload);
        assert!(refusal > 0x8000_0000, "{refusal:#x}");
        assert!(in_force(server, b"disk").is_empty());
    }
}

#[test]
fn a_list_leaves_the_selection_alone() {
    let mut server = structured();
    contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[BASE]);
    contexts(&mut server, opt::LIST_META_CONTEXT, b"sectors", &[]);
    server.option(opt::INFO, &info_payload(b"sectors", &[3])).unwrap();
    assert_eq!(in_force(server, b"disk"), [0]);
}

#[test]
fn a_selection_counts_only_for_its_own_export() {
    for (set, go, count) in [
        (&b"disk"[..], &b"disk"[..], 1),
        (b"disk", b"sectors", 0),
        (b"", b"disk", 0),
        (b"", b"", 1),
    ] {
        let mut server = structured();
        contexts(&mut server, opt::SET_META_CONTEXT, set, &[BASE]);
        assert_eq!(in_force(server, go).len(), count, "{set:?} then {go:?}");
    }
}

#[test]
fn a_go_that_fails_keeps_the_selection() {
    let mut server = structured();
    contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[BASE]);
    assert_eq!(server.last_reply(opt::GO, &info_payload(b"nowhere", &[])), rep::ERR_UNKNOWN);
    assert_eq!(in_force(server, b"disk"), [0]);
}

#[test]
fn duplicates_are_answered_once() {
    let mut server = structured();
    let queries = [BASE; 5];
    assert_eq!(contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &queries).len(), 1);
    let queries = [BASE, b"base:", BASE];
    assert_eq!(contexts(&mut server, opt::LIST_META_CONTEXT, b"disk", &queries).len(), 1);
}

#[test]
fn a_query_over_4096_bytes_matches_nothing() {
    let mut server = structured();
    let long = [b'x'; 4097];
    assert_eq!(contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &[&long, BASE]).len(), 1);
}

#[test]
fn a_query_with_nul_or_bad_utf8_is_invalid() {
    let mut server = structured();
    for query in [&b"base:alloc\0ation"[..], b"\xc3("] {
        let payload = meta_payload(b"disk", &[query]);
        for option in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
            assert_eq!(server.last_reply(option, &payload), rep::ERR_INVALID);
        }
    }
}

#[test]
fn very_many_queries_are_bounded() {
    let mut server = structured();
    let queries = vec![&b"a:b"[..]; MAX_META_CONTEXT_QUERIES];
    assert!(contexts(&mut server, opt::SET_META_CONTEXT, b"disk", &queries).is_empty());
    let mut payload = meta_payload(b"disk", &[]);
    payload.truncate(8);
    payload.extend((MAX_META_CONTEXT_QUERIES as u32 + 1).to_be_bytes());
    payload.extend(vec![0; 4 * (MAX_META_CONTEXT_QUERIES + 1)]);
    assert_eq!(server.last_reply(opt::SET_META_CONTEXT, &payload), rep::ERR_TOO_BIG);
    let mut payload = meta_payload(b"disk", &[BASE]);
    payload[8..12].copy_from_slice(&1000_u32.to_be_bytes());
    assert_eq!(server.last_reply(opt::SET_META_CONTEXT, &payload), rep::ERR_INVALID);
}
