//! The options STRUCTURED_REPLY and EXTENDED_HEADERS, the server's side.

use nbd_proto::handshake::server::ServerConfig;
use nbd_proto::wire::ReplyMode;

use super::common::Probe;
use super::common::listing::info_payload;
use super::{opt, rep};

fn probe() -> Probe {
    Probe::fixed(ServerConfig::default())
}

#[test]
fn structured_twice_is_invalid() {
    let mut server = probe();
    assert_eq!(server.last_reply(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    assert_eq!(server.last_reply(opt::STRUCTURED_REPLY, &[]), rep::ERR_INVALID);
}

#[test]
fn extended_twice_is_invalid() {
    let mut server = probe();
    assert_eq!(server.last_reply(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    assert_eq!(server.last_reply(opt::EXTENDED_HEADERS, &[]), rep::ERR_INVALID);
}

#[test]
fn structured_after_extended_is_told_that_extended_headers_are_required() {
    let mut server = probe();
    server.last_reply(opt::EXTENDED_HEADERS, &[]);
    assert_eq!(server.last_reply(opt::STRUCTURED_REPLY, &[]), rep::ERR_EXT_HEADER_REQD);
    server.option(opt::GO, &info_payload(b"disk", &[])).unwrap();
    assert_eq!(server.negotiated().reply_mode, ReplyMode::Extended, "and nothing changed");
}

#[test]
fn extended_after_structured_takes_precedence() {
    let mut server = probe();
    server.last_reply(opt::STRUCTURED_REPLY, &[]);
    assert_eq!(server.last_reply(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    server.option(opt::GO, &info_payload(b"disk", &[])).unwrap();
    assert_eq!(server.negotiated().reply_mode, ReplyMode::Extended);
}

#[test]
fn data_is_invalid_and_changes_nothing() {
    for option in [opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS] {
        let mut server = probe();
        assert_eq!(server.last_reply(option, b"x"), rep::ERR_INVALID);
        server.option(opt::GO, &info_payload(b"disk", &[])).unwrap();
        assert_eq!(server.negotiated().reply_mode, ReplyMode::Simple);
    }
}

#[test]
fn a_server_can_be_as_old_as_it_is_told_to_be() {
    for (best, structured, extended) in [
        (ReplyMode::Simple, rep::ERR_UNSUP, rep::ERR_UNSUP),
        (ReplyMode::Structured, rep::ACK, rep::ERR_UNSUP),
        (ReplyMode::Extended, rep::ACK, rep::ACK),
    ] {
        let config = ServerConfig::new().best_reply_mode(best);
        let mut server = Probe::fixed(config);
        assert_eq!(server.last_reply(opt::STRUCTURED_REPLY, &[]), structured);
        assert_eq!(server.last_reply(opt::EXTENDED_HEADERS, &[]), extended);
    }
}
