//! Section "Structured reply types": answers to a READ that a client refuses.

use bytes::BytesMut;
use nbd_proto::ProtocolError;
use nbd_proto::limits::{
    MAX_CHUNKS_PER_READ, MAX_GAPS_PER_READ, MAX_PAYLOAD, MAX_UNKNOWN_CHUNK_LEN,
};
use nbd_proto::transmission::client::{Event, ServerError, Transmission};
use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_proto::wire::{Errno, ReplyMode};

use super::common::listing::{chunk, data, extended_chunk, hole, simple_reply};
use super::common::negotiated;

const OFFSET: u64 = 0x1000;
const LENGTH: u64 = 512;
const COOKIE: u64 = 1;

const DONE: u16 = 1;
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const BLOCK_STATUS: u16 = 5;
const ERROR: u16 = 0x8001;
const ERROR_OFFSET: u16 = 0x8002;

/// Runs replies against one READ of 512 bytes at 4096 and gives its end.
fn run(mode: ReplyMode, bytes: &[u8]) -> Result<Option<Result<(), ServerError>>, ProtocolError> {
    let mut client = Transmission::new(&negotiated(mode));
    let command = Command::Read(Fragmentation::Allowed);
    client.request(OFFSET, LENGTH, &command, &mut Vec::new()).unwrap();
    drain(&mut client, bytes)
}

fn drain(
    client: &mut Transmission,
    bytes: &[u8],
) -> Result<Option<Result<(), ServerError>>, ProtocolError> {
    let mut input = BytesMut::from(bytes);
    let mut end = None;
    loop {
        match client.advance(&mut input)? {
            Event::NeedsInput => return Ok(end),
            Event::Data { position, length, .. } => {
                assert!(position + length as u64 <= LENGTH, "an event outside the request");
                assert!(input.len() >= length, "the listing holds the data");
                let _ = input.split_to(length);
            }
            Event::Hole { position, length, .. } => {
                assert!(position + length as u64 <= LENGTH, "an event outside the request");
            }
            Event::BlockStatus { .. } => panic!("nobody asked for a status"),
            Event::Finished { result, .. } => end = Some(result),
            other => panic!("{other:?}"),
        }
    }
}

fn structured(kind: u16, payload: &[u8]) -> Vec<u8> {
    chunk(0, kind, COOKIE, payload)
}

fn finish() -> Vec<u8> {
    chunk(DONE, NONE, COOKIE, &[])
}

#[track_caller]
fn refused(chunks: &[Vec<u8>]) -> ProtocolError {
    run(ReplyMode::Structured, &chunks.concat()).expect_err("a client that distrusts the server")
}

fn fine(chunks: &[Vec<u8>]) {
    let end = run(ReplyMode::Structured, &chunks.concat()).unwrap();
    assert_eq!(end, Some(Ok(())));
}

#[test]
fn data_and_holes_in_any_order_are_fine() {
    fine(&[
        structured(OFFSET_HOLE, &hole(OFFSET + 256, 256)),
        structured(OFFSET_DATA, &data(OFFSET, &[1; 256])),
        finish(),
    ]);
    fine(&[chunk(DONE, OFFSET_HOLE, COOKIE, &hole(OFFSET, 512))]);
}

#[test]
fn content_outside_the_request_is_refused() {
    // libnbd 2019-10: a server-controlled offset wrote outside the buffer.
    for offset in [0, OFFSET - 1, OFFSET + 1, OFFSET + 512, u64::MAX, u64::MAX - 511] {
        refused(&[structured(OFFSET_DATA, &data(offset, &[1; 512]))]);
        refused(&[structured(OFFSET_HOLE, &hole(offset, 512))]);
    }
    refused(&[structured(OFFSET_HOLE, &hole(OFFSET, 513))]);
    refused(&[structured(OFFSET_HOLE, &hole(OFFSET, u32::MAX))]);
    refused(&[structured(OFFSET_DATA, &data(OFFSET, &[1; 513]))]);
}

#[test]
fn an_impossible_data_length_is_refused_before_its_data_arrive() {
    let mut header = structured(OFFSET_DATA, &[]);
    header[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    refused(&[header]);
    let mut header = extended_chunk(0, OFFSET_DATA, COOKIE, OFFSET, &[]);
    header[24..32].copy_from_slice(&u64::MAX.to_be_bytes());
    run(ReplyMode::Extended, &header).unwrap_err();
}

#[test]
fn overlapping_content_is_refused() {
    let first = structured(OFFSET_DATA, &data(OFFSET + 100, &[1; 100]));
    for (offset, length) in [(OFFSET, 101), (OFFSET + 199, 1), (OFFSET + 100, 100), (OFFSET, 512)] {
        refused(&[first.clone(), structured(OFFSET_HOLE, &hole(offset, length))]);
        let bytes = vec![2; length as usize];
        refused(&[first.clone(), structured(OFFSET_DATA, &data(offset, &bytes))]);
    }
}

#[test]
fn missing_content_is_refused() {
    refused(&[finish()]);
    refused(&[structured(OFFSET_DATA, &data(OFFSET, &[1; 511])), finish()]);
    refused(&[structured(OFFSET_HOLE, &hole(OFFSET + 1, 511)), finish()]);
    refused(&[chunk(DONE, OFFSET_DATA, COOKIE, &data(OFFSET, &[1; 10]))]);
}

#[test]
fn missing_content_behind_an_error_is_fine() {
    let error = structured(ERROR, &[0, 0, 0, 5, 0, 0]);
    let chunks = [structured(OFFSET_DATA, &data(OFFSET, &[1; 10])), error, finish()];
    let end = run(ReplyMode::Structured, &chunks.concat()).unwrap();
    assert_eq!(end.unwrap().unwrap_err().errno, Errno::EIO);
}

#[test]
fn empty_content_is_refused() {
    refused(&[structured(OFFSET_DATA, &data(OFFSET, &[]))]);
    refused(&[structured(OFFSET_HOLE, &hole(OFFSET, 0))]);
    refused(&[structured(OFFSET_DATA, &[0; 7])]);
}

#[test]
fn chunks_of_the_wrong_length_are_refused() {
    refused(&[structured(OFFSET_HOLE, &hole(OFFSET, 512)[..11])]);
    refused(&[structured(OFFSET_HOLE, &[&hole(OFFSET, 512)[..], b"x"].concat())]);
    refused(&[chunk(DONE, NONE, COOKIE, b"x")]);
    refused(&[structured(NONE, &[])]);
}

#[test]
fn chunks_of_the_wrong_kind_are_refused() {
    for kind in [BLOCK_STATUS, 6, 3, 4, 0x7fff] {
        refused(&[structured(kind, &[0; 24])]);
    }
    let mut client = Transmission::new(&negotiated(ReplyMode::Structured));
    client.request(0, 4096, &Command::Cache, &mut Vec::new()).unwrap();
    drain(&mut client, &structured(OFFSET_DATA, &data(0, &[1; 10]))).unwrap_err();
}

#[test]
fn an_unknown_cookie_is_refused() {
    let unknown = ProtocolError::UnknownCookie { cookie: 99 };
    assert_eq!(refused(&[chunk(DONE, NONE, 99, &[])]), unknown);
    let bytes = simple_reply(0, 99);
    assert_eq!(run(ReplyMode::Simple, &bytes).unwrap_err(), unknown);
    let bytes = extended_chunk(DONE, NONE, 99, OFFSET, &[]);
    assert_eq!(run(ReplyMode::Extended, &bytes).unwrap_err(), unknown);
}

#[test]
fn a_second_answer_is_refused() {
    let whole = chunk(DONE, OFFSET_HOLE, COOKIE, &hole(OFFSET, 512));
    let error = refused(&[whole.clone(), whole]);
    assert_eq!(error, ProtocolError::UnknownCookie { cookie: COOKIE });
}

#[test]
fn a_request_is_known_until_it_is_answered_and_no_longer() {
    let mut client = Transmission::new(&negotiated(ReplyMode::Structured));
    let hole_of = |cookie| chunk(DONE, OFFSET_HOLE, cookie, &hole(OFFSET, 512));
    // One request of every 8 stays open for 800 others, whose cookies end in the same bits.
    let mut open = Vec::new();
    for index in 0..2000_u64 {
        let command = Command::Read(Fragmentation::Allowed);
        let cookie = client.request(OFFSET, LENGTH, &command, &mut Vec::new()).unwrap().0;
        if index % 8 == 0 {
            open.push(cookie);
        } else {
            assert_eq!(drain(&mut client, &hole_of(cookie)), Ok(Some(Ok(()))));
        }
        if open.len() > 100 {
            assert_eq!(drain(&mut client, &hole_of(open.remove(0))), Ok(Some(Ok(()))));
        }
        assert_eq!(client.in_flight(), open.len());
    }
    for &cookie in &open {
        assert_eq!(drain(&mut client, &hole_of(cookie)), Ok(Some(Ok(()))));
        let unknown = Err(ProtocolError::UnknownCookie { cookie });
        assert_eq!(drain(&mut client, &hole_of(cookie)), unknown, "a second answer");
    }
    let unmade = open.last().unwrap() + 8;
    let unknown = Err(ProtocolError::UnknownCookie { cookie: unmade });
    assert_eq!(drain(&mut client, &hole_of(unmade)), unknown, "a request that was not made");
}

#[test]
fn a_structured_read_never_gets_a_simple_reply() {
    for error in [0, 5] {
        run(ReplyMode::Structured, &simple_reply(error, COOKIE)).unwrap_err();
    }
}

#[test]
fn a_reply_of_another_mode_is_refused() {
    run(ReplyMode::Simple, &finish()).unwrap_err();
    run(ReplyMode::Extended, &simple_reply(5, COOKIE)).unwrap_err();
    run(ReplyMode::Extended, &finish()).unwrap_err();
    run(ReplyMode::Structured, &extended_chunk(DONE, NONE, COOKIE, OFFSET, &[])).unwrap_err();
    run(ReplyMode::Simple, &[0; 16]).unwrap_err();
}

#[test]
fn an_extended_reply_repeats_the_offset_of_the_request() {
    let payload = hole(OFFSET, 512);
    let right = extended_chunk(DONE, OFFSET_HOLE, COOKIE, OFFSET, &payload);
    assert_eq!(run(ReplyMode::Extended, &right).unwrap(), Some(Ok(())));
    let wrong = extended_chunk(DONE, OFFSET_HOLE, COOKIE, OFFSET + 1, &payload);
    run(ReplyMode::Extended, &wrong).unwrap_err();
}

#[test]
fn error_chunks_that_contradict_themselves_are_refused() {
    let error = |errno: u32, message_len: u16, rest: &[u8]| {
        [&errno.to_be_bytes()[..], &message_len.to_be_bytes(), rest].concat()
    };
    let offset = |offset: u64| offset.to_be_bytes();
    for payload in [error(5, 1, b""), error(5, 0, b"x"), error(0, 0, b""), vec![0, 0, 0, 5]] {
        refused(&[structured(ERROR, &payload)]);
    }
    for place in [0, OFFSET - 1, OFFSET + 512, u64::MAX] {
        refused(&[structured(ERROR_OFFSET, &error(5, 0, &offset(place)))]);
    }
    refused(&[structured(ERROR_OFFSET, &error(5, 0, &[0; 7]))]);
    refused(&[structured(ERROR_OFFSET, &error(5, 0, &[0; 9]))]);
    let mut endless = structured(ERROR, &[]);
    endless[16..20].copy_from_slice(&(MAX_UNKNOWN_CHUNK_LEN + 1).to_be_bytes());
    refused(&[endless]);
}

#[test]
fn an_unknown_error_chunk_is_an_error() {
    let bytes = chunk(DONE, 0x9234, COOKIE, &[0, 0, 0, 28, 0, 2, b'n', b'o', 1, 2, 3]);
    let end = run(ReplyMode::Structured, &bytes).unwrap();
    let error = end.unwrap().unwrap_err();
    assert_eq!((error.errno, error.message.as_str()), (Errno::ENOSPC, "no"));
}

#[test]
fn an_unknown_error_number_counts_as_einval() {
    let end = run(ReplyMode::Simple, &simple_reply(0x4242, COOKIE)).unwrap();
    let error = end.unwrap().unwrap_err();
    assert_eq!(error.errno.normalised(), Errno::EINVAL);
    assert!(error.to_string().contains("0x4242"), "{error}");
}

#[test]
fn replies_may_come_in_any_order() {
    let mut client = Transmission::new(&negotiated(ReplyMode::Structured));
    let read = Command::Read(Fragmentation::Allowed);
    let first = client.request(0, 4, &read, &mut Vec::new()).unwrap();
    let second = client.request(8, 4, &read, &mut Vec::new()).unwrap();
    let third = client.request(0, 4, &Command::Write(Durability::Cached), &mut Vec::new()).unwrap();
    let bytes = [
        chunk(0, OFFSET_HOLE, second.0, &hole(8, 2)),
        chunk(DONE, OFFSET_HOLE, first.0, &hole(0, 4)),
        simple_reply(0, third.0),
        chunk(DONE, OFFSET_HOLE, second.0, &hole(10, 2)),
    ];
    assert_eq!(drain(&mut client, &bytes.concat()).unwrap(), Some(Ok(())));
    assert_eq!(client.in_flight(), 0);
}

#[test]
fn an_answer_in_endless_pieces_is_ended() {
    let mut client = Transmission::new(&negotiated(ReplyMode::Structured));
    let read = Command::Read(Fragmentation::Allowed);
    client.request(0, u64::from(MAX_PAYLOAD), &read, &mut Vec::new()).unwrap();
    let mut input = BytesMut::new();
    for place in 0..MAX_CHUNKS_PER_READ as u64 {
        input.extend_from_slice(&structured(OFFSET_HOLE, &hole(place, 1)));
        let event = client.advance(&mut input).unwrap();
        assert!(matches!(event, Event::Hole { length: 1, .. }), "{event:?}");
    }
    input.extend_from_slice(&structured(OFFSET_HOLE, &hole(MAX_CHUNKS_PER_READ as u64, 1)));
    let error = client.advance(&mut input).unwrap_err();
    assert!(matches!(error, ProtocolError::BadChunk { .. }), "{error}");
}

#[test]
fn an_answer_scattered_backwards_is_ended_before_it_costs_time() {
    let mut client = Transmission::new(&negotiated(ReplyMode::Structured));
    let read = Command::Read(Fragmentation::Allowed);
    client.request(0, u64::from(MAX_PAYLOAD), &read, &mut Vec::new()).unwrap();
    let mut input = BytesMut::new();
    for gap in 0..MAX_GAPS_PER_READ as u64 {
        let place = u64::from(MAX_PAYLOAD) - 2 * gap - 1;
        input.extend_from_slice(&structured(OFFSET_HOLE, &hole(place, 1)));
        assert!(matches!(client.advance(&mut input), Ok(Event::Hole { .. })));
    }
    input.extend_from_slice(&structured(OFFSET_HOLE, &hole(0, 1)));
    assert!(matches!(client.advance(&mut input), Err(ProtocolError::BadChunk { .. })));
}

#[test]
fn the_servers_text_cannot_drive_a_terminal() {
    let error = ServerError::new(Errno::EIO).with_message("\u{1b}[2Jgone");
    let text = error.to_string();
    assert!(text.contains("gone") && !text.contains('\u{1b}'), "{text}");
}
