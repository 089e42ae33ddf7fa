//! Replies: what the server writes and the client reads.

use bytes::BytesMut;
use nbd_proto::transmission::client::{Event, ServerError, Transmission};
use nbd_proto::transmission::{
    Command, ExtentLimit, Fragmentation, Position, ReplyEncoder, RequestTag,
};
use nbd_proto::wire::{BlockDescriptor, CommandType, Cookie, Errno, MetaContextId, ReplyMode};

use super::common::listing::bytes;
use super::common::negotiated;

const OFFSET: u64 = 0x1000;

fn tag(command: CommandType) -> RequestTag {
    RequestTag::new(Cookie(1), command, OFFSET)
}

/// Feeds `listing` to a client with one request in flight, one byte at a time, and gives its
/// events and the data.
fn events(
    mode: ReplyMode,
    length: u64,
    command: &Command,
    listing: &[u8],
) -> (Vec<Event>, Vec<u8>) {
    let mut client = Transmission::new(&negotiated(mode));
    client.request(OFFSET, length, command, &mut Vec::new()).unwrap();
    let (mut events, mut data) = (Vec::new(), Vec::new());
    let (mut input, mut due) = (BytesMut::new(), 0);
    for byte in listing {
        input.extend_from_slice(&[*byte]);
        loop {
            if due > 0 {
                let taken = input.split_to(due.min(input.len()));
                due -= taken.len();
                data.extend_from_slice(&taken);
                if due > 0 {
                    break;
                }
            }
            match client.advance(&mut input).unwrap() {
                Event::NeedsInput => break,
                event => {
                    if let Event::Data { length, .. } = event {
                        due = length;
                    }
                    events.push(event);
                }
            }
        }
    }
    assert!(input.is_empty());
    assert_eq!(client.in_flight(), 0, "the reply is complete");
    (events, data)
}

fn read() -> Command {
    Command::Read(Fragmentation::Allowed)
}

const FINISHED: Event = Event::Finished { cookie: Cookie(1), result: Ok(()) };

#[test]
fn simple_replies() {
    let encoder = ReplyEncoder::new(ReplyMode::Simple);
    let listing = bytes(
        "67446698              # simple reply magic
         00000000              # no error
         0000000000000001      # cookie
         'data'",
    );
    let mut out = Vec::new();
    encoder.data_header(tag(CommandType::READ), OFFSET, 4, Position::Last, &mut out);
    out.extend(b"data");
    assert_eq!(out, listing);
    let (seen, data) = events(ReplyMode::Simple, 4, &read(), &listing);
    assert_eq!(seen, [Event::Data { cookie: Cookie(1), position: 0, length: 4 }, FINISHED]);
    assert_eq!(data, b"data");

    let listing = bytes("67446698 00000005 0000000000000001    # EIO, no data");
    let mut out = Vec::new();
    encoder.error(tag(CommandType::READ), Errno::EIO, "never sent", &mut out);
    assert_eq!(out, listing);
    let (seen, _) = events(ReplyMode::Simple, 4, &read(), &listing);
    let error = ServerError::new(Errno::EIO);
    assert_eq!(seen, [Event::Finished { cookie: Cookie(1), result: Err(error) }]);
}

#[test]
fn structured_read_in_pieces() {
    let listing = bytes(
        "668e33ef              # structured reply magic
         0000                  # more follows
         0001                  # OFFSET_DATA
         0000000000000001      # cookie
         0000000c              # 12 bytes:
         0000000000001000      #   offset
         'data'
         668e33ef 0000 0002    # OFFSET_HOLE
         0000000000000001 0000000c
         0000000000001004      #   offset
         00000200              #   length
         668e33ef 0001 0000    # DONE, NONE
         0000000000000001 00000000",
    );
    let encoder = ReplyEncoder::new(ReplyMode::Structured);
    let mut out = Vec::new();
    encoder.data_header(tag(CommandType::READ), OFFSET, 4, Position::More, &mut out);
    out.extend(b"data");
    encoder.hole(tag(CommandType::READ), OFFSET + 4, 0x200, Position::More, &mut out);
    encoder.success(tag(CommandType::READ), &mut out);
    assert_eq!(out, listing);

    let (seen, data) = events(ReplyMode::Structured, 0x204, &read(), &listing);
    assert_eq!(
        seen,
        [
            Event::Data { cookie: Cookie(1), position: 0, length: 4 },
            Event::Hole { cookie: Cookie(1), position: 4, length: 0x200 },
            FINISHED
        ]
    );
    assert_eq!(data, b"data");
}

#[test]
fn structured_success_of_other_commands_is_simple() {
    let listing = bytes("67446698 00000000 0000000000000001");
    let mut out = Vec::new();
    ReplyEncoder::new(ReplyMode::Structured).success(tag(CommandType::CACHE), &mut out);
    assert_eq!(out, listing);
    let (seen, _) = events(ReplyMode::Structured, 4, &Command::Cache, &listing);
    assert_eq!(seen, [FINISHED]);
}

#[test]
fn structured_block_status() {
    let listing = bytes(
        "668e33ef 0000 0005            # BLOCK_STATUS, more follows
         0000000000000001 00000014     # 20 bytes:
         00000000                      #   context 0
         00000200 00000003             #   512 bytes: HOLE, ZERO
         00000e00 00000000             #   3584 bytes: data
         668e33ef 0001 0005            # DONE, BLOCK_STATUS
         0000000000000001 0000000c
         00000002                      #   context 2
         00001000 00000001             #   4 KiB: DIRTY",
    );
    let first =
        [BlockDescriptor { length: 0x200, flags: 3 }, BlockDescriptor { length: 0xe00, flags: 0 }];
    let second = [BlockDescriptor { length: 0x1000, flags: 1 }];
    let encoder = ReplyEncoder::new(ReplyMode::Structured);
    let tag = tag(CommandType::BLOCK_STATUS);
    let mut out = Vec::new();
    encoder.block_status(tag, MetaContextId(0), &first, Position::More, &mut out);
    encoder.block_status(tag, MetaContextId(2), &second, Position::Last, &mut out);
    assert_eq!(out, listing);
    let command = Command::BlockStatus(ExtentLimit::Many, None);
    let (seen, _) = events(ReplyMode::Structured, 0x1000, &command, &listing);
    assert_eq!(
        seen,
        [
            Event::BlockStatus {
                cookie: Cookie(1),
                context: MetaContextId(0),
                descriptors: first.to_vec()
            },
            Event::BlockStatus {
                cookie: Cookie(1),
                context: MetaContextId(2),
                descriptors: second.to_vec()
            },
            FINISHED
        ]
    );
}

#[test]
fn structured_errors() {
    let listing = bytes(
        "668e33ef 0000 8002            # ERROR_OFFSET, more follows
         0000000000000001 00000014     # 20 bytes:
         00000005                      #   EIO
         0006 'sector'                 #   message
         0000000000001002              #   offset
         668e33ef 0001 8001            # DONE, ERROR
         0000000000000001 0000000a
         0000001c                      #   ENOSPC
         0004 'full'",
    );
    let encoder = ReplyEncoder::new(ReplyMode::Structured);
    let tag = tag(CommandType::READ);
    let mut out = Vec::new();
    encoder.error_at(tag, Errno::EIO, OFFSET + 2, "sector", Position::More, &mut out);
    encoder.error(tag, Errno::ENOSPC, "full", &mut out);
    assert_eq!(out, listing);
    let (seen, _) = events(ReplyMode::Structured, 8, &read(), &listing);
    // The first of several errors is the cause.
    let error = ServerError::new(Errno::EIO).with_message("sector").with_offset(OFFSET + 2);
    assert_eq!(seen, [Event::Finished { cookie: Cookie(1), result: Err(error) }]);
}

#[test]
fn extended_replies() {
    let listing = bytes(
        "6e8a278c              # extended reply magic
         0000                  # more follows
         0001                  # OFFSET_DATA
         0000000000000001      # cookie
         0000000000001000      # offset of the request
         000000000000000c      # 12 bytes:
         0000000000001000      #   offset
         'data'
         6e8a278c 0001 0002    # DONE, OFFSET_HOLE
         0000000000000001 0000000000001000 000000000000000c
         0000000000001004      #   offset
         00000200              #   length, 32 bits even here",
    );
    let encoder = ReplyEncoder::new(ReplyMode::Extended);
    let mut out = Vec::new();
    encoder.data_header(tag(CommandType::READ), OFFSET, 4, Position::More, &mut out);
    out.extend(b"data");
    encoder.hole(tag(CommandType::READ), OFFSET + 4, 0x200, Position::Last, &mut out);
    assert_eq!(out, listing);
    let (seen, data) = events(ReplyMode::Extended, 0x204, &read(), &listing);
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[2], FINISHED);
    assert_eq!(data, b"data");

    let listing = bytes(
        "6e8a278c 0001 0000    # DONE, NONE
         0000000000000001 0000000000001000 0000000000000000",
    );
    let mut out = Vec::new();
    encoder.success(tag(CommandType::CACHE), &mut out);
    assert_eq!(out, listing);
    assert_eq!(events(ReplyMode::Extended, 4, &Command::Cache, &listing).0, [FINISHED]);

    let listing = bytes(
        "6e8a278c 0001 8001    # DONE, ERROR
         0000000000000001 0000000000001000 000000000000000a
         0000005f              #   ENOTSUP
         0004 'slow'",
    );
    let mut out = Vec::new();
    encoder.error(tag(CommandType::WRITE_ZEROES), Errno::ENOTSUP, "slow", &mut out);
    assert_eq!(out, listing);
}

#[test]
fn extended_block_status() {
    let listing = bytes(
        "6e8a278c 0001 0006            # DONE, BLOCK_STATUS_EXT
         0000000000000001 0000000000001000 0000000000000028
         00000002                      #   context 2
         00000002                      #   two descriptors
         0000000200000000 0000000000000001
         0000000000001000 0000000000000000",
    );
    let descriptors = [
        BlockDescriptor { length: 1 << 33, flags: 1 },
        BlockDescriptor { length: 0x1000, flags: 0 },
    ];
    let encoder = ReplyEncoder::new(ReplyMode::Extended);
    let mut out = Vec::new();
    encoder.block_status(
        tag(CommandType::BLOCK_STATUS),
        MetaContextId(2),
        &descriptors,
        Position::Last,
        &mut out,
    );
    assert_eq!(out, listing);
    let command = Command::BlockStatus(ExtentLimit::Many, Some([MetaContextId(2)].into()));
    let (seen, _) = events(ReplyMode::Extended, (1 << 33) + 0x1000, &command, &listing);
    assert_eq!(
        seen[0],
        Event::BlockStatus {
            cookie: Cookie(1),
            context: MetaContextId(2),
            descriptors: descriptors.to_vec()
        }
    );
}
