//! Requests: what the client writes and the server reads.

use nbd_proto::transmission::client::Transmission as Client;
use nbd_proto::transmission::server::{Parsed, Transmission as Server};
use nbd_proto::transmission::{
    Command, Durability, ExtentLimit, Fragmentation, Request, Speed, ZeroMode,
};
use nbd_proto::wire::{Cookie, MetaContextId, ReplyMode};

use super::common::listing::bytes;
use super::common::negotiated;

/// Holds `listing` against both sides: the client's first request, and what the server makes of it.
fn check(mode: ReplyMode, offset: u64, length: u64, command: Command, listing: &str) {
    let expected = bytes(listing);
    let mut out = Vec::new();
    let cookie =
        Client::new(&negotiated(mode)).request(offset, length, &command, &mut out).unwrap();
    assert_eq!(out, expected, "what the client sends for {command:?}");
    let parsed = Server::new(&negotiated(mode)).parse(&expected).unwrap();
    let request = Request::new(cookie, command, offset, length);
    assert_eq!(parsed, Parsed::Request { request, consumed: expected.len() });
    for end in 0..expected.len() {
        let parsed = Server::new(&negotiated(mode)).parse(&expected[..end]).unwrap();
        let Parsed::NeedsInput(needed) = parsed else { panic!("{end} bytes: {parsed:?}") };
        assert!(needed > end && needed <= expected.len(), "{needed} wanted after {end}");
    }
}

#[test]
fn compact_requests_of_every_command() {
    let compact = |offset, length, command, listing| {
        check(ReplyMode::Structured, offset, length, command, listing);
    };
    compact(
        0x1000,
        0x200,
        Command::Read(Fragmentation::Forbidden),
        "25609513              # request magic
         0004                  # DF
         0000                  # READ
         0000000000000001      # cookie
         0000000000001000      # offset
         00000200              # length",
    );
    compact(
        0x1000,
        0x200,
        Command::Write(Durability::Fua),
        "25609513 0001 0001    # FUA, WRITE
         0000000000000001 0000000000001000 00000200",
    );
    compact(
        0,
        0,
        Command::Flush,
        "25609513 0000 0003    # FLUSH
         0000000000000001 0000000000000000 00000000",
    );
    compact(
        0xfffffff000,
        0x1000,
        Command::Trim(Durability::Cached),
        "25609513 0000 0004    # TRIM
         0000000000000001 000000fffffff000 00001000",
    );
    compact(
        0,
        0xffffffff,
        Command::Cache,
        "25609513 0000 0005    # CACHE
         0000000000000001 0000000000000000 ffffffff",
    );
    compact(
        0,
        0x1000,
        Command::WriteZeroes(ZeroMode::KeepAllocated, Speed::FastOnly, Durability::Fua),
        "25609513 0013 0006    # FUA, NO_HOLE, FAST_ZERO; WRITE_ZEROES
         0000000000000001 0000000000000000 00001000",
    );
    compact(
        0,
        0x1000,
        Command::BlockStatus(ExtentLimit::One, None),
        "25609513 0008 0007    # REQ_ONE, BLOCK_STATUS
         0000000000000001 0000000000000000 00001000",
    );
}

#[test]
fn disconnect() {
    let listing = "25609513 0000 0002    # DISC
                   0000000000000001 0000000000000000 00000000";
    let mut out = Vec::new();
    let mut client = Client::new(&negotiated(ReplyMode::Simple));
    client.request(0, 0, &Command::Disconnect, &mut out).unwrap();
    assert_eq!(out, bytes(listing));
    assert_eq!(client.in_flight(), 0, "DISC has no reply");
    let parsed = Server::new(&negotiated(ReplyMode::Simple)).parse(&out).unwrap();
    let Parsed::Request { request, consumed: 28 } = parsed else { panic!("{parsed:?}") };
    assert_eq!(request.command, Command::Disconnect);
}

#[test]
fn extended_requests() {
    let extended = |offset, length, command, listing| {
        check(ReplyMode::Extended, offset, length, command, listing);
    };
    extended(
        0x1000,
        0x200,
        Command::Read(Fragmentation::Allowed),
        "21e41c71              # extended request magic
         0000                  # no flags
         0000                  # READ
         0000000000000001      # cookie
         0000000000001000      # offset
         0000000000000200      # length of the range",
    );
    extended(
        0x1000,
        0x200,
        Command::Write(Durability::Cached),
        "21e41c71 0020 0001    # PAYLOAD_LEN, WRITE
         0000000000000001 0000000000001000
         0000000000000200      # length of the payload",
    );
    extended(
        0,
        1 << 40,
        Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Cached),
        "21e41c71 0000 0006    # WRITE_ZEROES
         0000000000000001 0000000000000000
         0000010000000000      # 1 TiB at once",
    );
    extended(
        0x1000,
        1 << 33,
        Command::BlockStatus(ExtentLimit::Many, Some([MetaContextId(2), MetaContextId(0)].into())),
        "21e41c71 0020 0007    # PAYLOAD_LEN, BLOCK_STATUS
         0000000000000001 0000000000001000
         0000000000000010      # length of the payload
         0000000200000000      # length of the range
         00000002 00000000     # the contexts wanted",
    );
}

#[test]
fn cookies_differ_from_request_to_request() {
    let mut client = Client::new(&negotiated(ReplyMode::Simple));
    let mut out = Vec::new();
    let read = Command::Read(Fragmentation::Allowed);
    let first = client.request(0, 1, &read, &mut out).unwrap();
    let second = client.request(0, 1, &read, &mut out).unwrap();
    assert_eq!((first, second), (Cookie(1), Cookie(2)));
    assert_eq!(client.in_flight(), 2);
}
