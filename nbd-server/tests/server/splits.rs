//! The stream of a client cut in pieces: it makes no difference where.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use nbd_proto::wire::{
    ChunkHeader, CommandFlags, CommandType, Cookie, ReplyMode, RequestHeader, SimpleReplyHeader,
    magic,
};
use nbd_server::export::{Durability, Export, MemoryExport};

use crate::support::{MODES, TestServer};

/// A request with its payload.
type Sent = (RequestHeader, Vec<u8>);

/// One of every kind, none of them touching what another reads.
fn requests(mode: ReplyMode) -> Vec<Sent> {
    let none = CommandFlags::empty();
    let mut list = vec![
        (CommandType::READ, none, 0, 50, vec![]),
        (CommandType::WRITE, none, 4096, 30, vec![6; 30]),
        (CommandType::WRITE, CommandFlags::FUA, 5000, 1, vec![7]),
        // Over the end: its payload has to be thrown away.
        (CommandType::WRITE, none, (1 << 20) - 1, 20, vec![8; 20]),
        (CommandType::TRIM, none, 8192, 100, vec![]),
        (CommandType::WRITE_ZEROES, CommandFlags::NO_HOLE, 12288, 1 << 16, vec![]),
        (CommandType::FLUSH, none, 0, 0, vec![]),
        (CommandType::CACHE, none, 0, 100, vec![]),
        (CommandType::READ, none, 1 << 20, 1, vec![]),
        (CommandType(77), none, 0, 0, vec![]),
        (CommandType::READ, none, 100, 0, vec![]),
        (CommandType::READ, none, 200, 3, vec![]),
    ];
    if mode != ReplyMode::Simple {
        list.push((CommandType::READ, CommandFlags::DF, 1000, 10, vec![]));
        list.push((CommandType::BLOCK_STATUS, none, 0, 4096, vec![]));
    }
    if mode == ReplyMode::Extended {
        let payload = [&4096_u64.to_be_bytes()[..], &0_u32.to_be_bytes()].concat();
        list.push((CommandType::BLOCK_STATUS, CommandFlags::PAYLOAD_LEN, 0, 12, payload));
    }
    let header = |(place, (command, flags, offset, length, payload)): (usize, _)| {
        let cookie = Cookie(0x1000 + place as u64);
        (RequestHeader { flags, command, cookie, offset, length }, payload)
    };
    list.into_iter().enumerate().map(header).collect()
}

fn stream(mode: ReplyMode, requests: &[Sent]) -> Vec<u8> {
    let mut bytes = b"\0\0\0\x03".to_vec();
    let mut option = |number: u32, payload: &[u8]| {
        bytes.extend_from_slice(b"IHAVEOPT");
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
    };
    let contexts = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
    match mode {
        ReplyMode::Simple => {}
        ReplyMode::Structured => option(8, &[]),
        ReplyMode::Extended => option(11, &[]),
    }
    if mode != ReplyMode::Simple {
        option(10, contexts);
    }
    option(6, &[0; 6]);
    option(7, &[0; 6]);
    for (header, payload) in requests {
        match mode {
            ReplyMode::Extended => header.encode_extended(&mut bytes),
            _ => header.encode_compact(&mut bytes).unwrap(),
        }
        bytes.extend_from_slice(payload);
    }
    bytes
}

/// What the server says to a stream that comes in these pieces.
fn answer(server: &TestServer, pieces: &[&[u8]]) -> Vec<u8> {
    let mut stream = server.connect();
    let mut output = stream.try_clone().unwrap();
    for (place, piece) in pieces.iter().enumerate() {
        if place > 0 {
            // Long enough, mostly, for the server to see the pieces one by one.
            std::thread::sleep(Duration::from_micros(100));
        }
        output.write_all(piece).unwrap();
    }
    output.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

/// Splits an answer into the greeting and options, and the replies by their cookie: those may come
/// in any order.
fn sort(mode: ReplyMode, requests: &[Sent], answer: &[u8]) -> (Vec<u8>, BTreeMap<u64, Vec<u8>>) {
    let wanted = match mode {
        ReplyMode::Simple => magic::SIMPLE_REPLY,
        ReplyMode::Structured => magic::STRUCTURED_REPLY,
        ReplyMode::Extended => magic::EXTENDED_REPLY,
    };
    let starts_reply = |window: &[u8]| {
        let found = u32::from_be_bytes(window.try_into().unwrap());
        found == wanted || found == magic::SIMPLE_REPLY
    };
    let start = answer.windows(4).position(starts_reply).expect("there are replies");
    let (handshake, mut rest) = answer.split_at(start);
    let mut replies: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    while !rest.is_empty() {
        let (cookie, length) = match u32::from_be_bytes(rest[..4].try_into().unwrap()) {
            magic::SIMPLE_REPLY => {
                let header = SimpleReplyHeader::decode(rest).unwrap();
                let request = requests.iter().find(|(sent, _)| sent.cookie == header.cookie);
                let request = request.unwrap().0;
                let has_data = request.command == CommandType::READ && header.error.0 == 0;
                let data = if has_data { request.length as usize } else { 0 };
                (header.cookie, SimpleReplyHeader::LEN + data)
            }
            magic::STRUCTURED_REPLY => {
                let header = ChunkHeader::decode_structured(rest).unwrap().unwrap();
                (header.cookie, ChunkHeader::STRUCTURED_LEN + header.length as usize)
            }
            magic::EXTENDED_REPLY => {
                let header = ChunkHeader::decode_extended(rest).unwrap().unwrap().0;
                (header.cookie, ChunkHeader::EXTENDED_LEN + header.length as usize)
            }
            other => panic!("{other:#x} is not a reply"),
        };
        let (reply, next) = rest.split_at(length);
        replies.entry(cookie.0).or_default().extend_from_slice(reply);
        rest = next;
    }
    (handshake.to_vec(), replies)
}

#[test]
fn every_cut_of_a_session_gives_the_same_replies() {
    let disk = MemoryExport::new(1 << 20);
    let content: Vec<u8> = (0..4096_u32).map(|n| n as u8).collect();
    disk.write_at(0, &content, Durability::Cached).unwrap();
    let server = TestServer::of(disk);
    for mode in MODES {
        let requests = requests(mode);
        let bytes = stream(mode, &requests);
        let whole = sort(mode, &requests, &answer(&server, &[&bytes]));
        assert_eq!(whole.1.len(), requests.len(), "every request is answered");
        for cut in 1..bytes.len() {
            let (head, tail) = bytes.split_at(cut);
            let cut_answer = sort(mode, &requests, &answer(&server, &[head, tail]));
            assert_eq!(cut_answer, whole, "{mode:?} cut after {cut} bytes");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(sort(mode, &requests, &answer(&server, &single)), whole, "{mode:?} in bytes");
    }
}
