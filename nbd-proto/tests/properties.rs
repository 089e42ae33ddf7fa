//! Properties that hold for all values: what is written is read back the same, and no bytes
//! whatever make a reader panic. A failing case is printed with what reproduces it.

// Strategies fail like tests; clippy.toml allows it in functions marked as tests only.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::BytesMut;
use common::negotiated;
use nbd_proto::NbdUri;
use nbd_proto::handshake::client::{AwaitStep, ClientHandshake, ClientStep, InfoRequest};
use nbd_proto::handshake::server::{Handshake, ServerConfig, TlsPolicy};
use nbd_proto::transmission::client::{Event, Transmission as Client};
use nbd_proto::transmission::server::{Parsed, Transmission as Server};
use nbd_proto::transmission::{
    Command, Durability, ExtentLimit, Fragmentation, Position, ReplyEncoder, Request, RequestTag,
    Speed, ZeroMode,
};
use nbd_proto::uri::{Security, TlsKind, TlsParameters, Transport};
use nbd_proto::wire::{
    BlockDescriptor, ChunkHeader, CommandFlags, CommandType, Cookie, Errno, MetaContextId,
    MetaContextName, OptionHeader, OptionReplyHeader, OptionReplyType, OptionType, ReplyFlags,
    ReplyMode, ReplyType, RequestHeader, SimpleReplyHeader,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn any_mode() -> impl Strategy<Value = ReplyMode> {
    prop_oneof![Just(ReplyMode::Simple), Just(ReplyMode::Structured), Just(ReplyMode::Extended)]
}

fn chunk_mode() -> impl Strategy<Value = ReplyMode> {
    prop_oneof![Just(ReplyMode::Structured), Just(ReplyMode::Extended)]
}

fn durability() -> impl Strategy<Value = Durability> {
    prop_oneof![Just(Durability::Cached), Just(Durability::Fua)]
}

fn range_command() -> impl Strategy<Value = Command> {
    let limit = prop_oneof![Just(ExtentLimit::Many), Just(ExtentLimit::One)];
    let zero_mode = prop_oneof![Just(ZeroMode::MayUnmap), Just(ZeroMode::KeepAllocated)];
    let speed = prop_oneof![Just(Speed::Any), Just(Speed::FastOnly)];
    prop_oneof![
        Just(Command::Read(Fragmentation::Allowed)),
        Just(Command::Read(Fragmentation::Forbidden)),
        durability().prop_map(Command::Write),
        durability().prop_map(Command::Trim),
        Just(Command::Cache),
        (zero_mode, speed, durability())
            .prop_map(|(mode, speed, durability)| Command::WriteZeroes(mode, speed, durability)),
        limit.prop_map(|limit| Command::BlockStatus(limit, None)),
    ]
}

proptest! {
    #[test]
    fn headers_are_read_back_as_they_were_written(
        flags: u16, kind: u16, cookie: u64, offset: u64, length: u64, word: u32,
    ) {
        let mut out = Vec::new();
        let request = RequestHeader {
            flags: CommandFlags::from_bits_retain(flags),
            command: CommandType(kind),
            cookie: Cookie(cookie),
            offset,
            length,
        };
        request.encode_extended(&mut out);
        prop_assert_eq!(RequestHeader::decode_extended(&out), Ok(Some(request)));
        out.clear();
        let request = RequestHeader { length: u64::from(word), ..request };
        request.encode_compact(&mut out).unwrap();
        prop_assert_eq!(RequestHeader::decode_compact(&out), Ok(Some(request)));
        out.clear();
        let chunk = ChunkHeader {
            flags: ReplyFlags::from_bits_retain(flags),
            reply: ReplyType(kind),
            cookie: Cookie(cookie),
            length,
        };
        chunk.encode_extended(offset, &mut out);
        prop_assert_eq!(ChunkHeader::decode_extended(&out), Ok(Some((chunk, offset))));
        out.clear();
        let chunk = ChunkHeader { length: u64::from(word), ..chunk };
        chunk.encode_structured(&mut out);
        prop_assert_eq!(ChunkHeader::decode_structured(&out), Ok(Some(chunk)));
        out.clear();
        let simple = SimpleReplyHeader { error: Errno(word), cookie: Cookie(cookie) };
        simple.encode(&mut out);
        prop_assert_eq!(SimpleReplyHeader::decode(&out), Some(simple));
    }

    #[test]
    fn option_headers_are_read_back_as_they_were_written(
        option: u32, reply: u32, length in 0..=32_u32 << 20,
    ) {
        let mut out = Vec::new();
        let header = OptionHeader { option: OptionType(option), length };
        header.encode(&mut out);
        prop_assert_eq!(OptionHeader::decode(&out), Ok(Some(header)));
        out.clear();
        let header = OptionReplyHeader {
            option: OptionType(option),
            reply: OptionReplyType(reply),
            length,
        };
        header.encode(&mut out);
        prop_assert_eq!(OptionReplyHeader::decode(&out), Ok(Some(header)));
    }

    #[test]
    fn what_a_client_sends_the_server_understands(
        mode in any_mode(), offset in 0..1_u64 << 39, length in 1..=32_u64 << 20,
        command in range_command(),
    ) {
        let negotiated = negotiated(mode);
        let mut out = Vec::new();
        let sent = Client::new(&negotiated).request(offset, length, &command, &mut out);
        let is_status = matches!(command, Command::BlockStatus(..));
        let is_df = command == Command::Read(Fragmentation::Forbidden);
        if mode == ReplyMode::Simple && (is_status || is_df) {
            // Refused here or there: in simple mode neither exists.
            let refused = sent.is_err()
                || matches!(Server::new(&negotiated).parse(&out), Ok(Parsed::Rejected { .. }));
            prop_assert!(refused);
        } else {
            let cookie = sent.unwrap();
            let parsed = Server::new(&negotiated).parse(&out).unwrap();
            let request = Request::new(cookie, command, offset, length);
            prop_assert_eq!(parsed, Parsed::Request { request, consumed: out.len() });
        }
    }

    #[test]
    fn valid_requests_are_inside_the_export(bytes in vec(any::<u8>(), 0..64), mode in any_mode()) {
        let negotiated = negotiated(mode);
        let mut message = match mode {
            ReplyMode::Extended => 0x21e4_1c71_u32,
            _ => 0x2560_9513,
        }
        .to_be_bytes()
        .to_vec();
        message.extend(bytes);
        if let Ok(Parsed::Request { request, consumed }) = Server::new(&negotiated).parse(&message)
        {
            prop_assert!(consumed <= message.len());
            if !matches!(request.command, Command::Flush | Command::Disconnect) {
                prop_assert!(request.offset.checked_add(request.length).unwrap() <= negotiated.size);
            }
        }
    }

    #[test]
    fn a_read_in_any_pieces_arrives_whole(
        mode in chunk_mode(), lengths in vec(1..2000_u32, 1..20), holes: u32, order: u64,
    ) {
        let total: u32 = lengths.iter().sum();
        let mut pieces = Vec::new();
        let mut at = 0;
        for (index, length) in lengths.iter().enumerate() {
            pieces.push((at, *length, holes & (1 << index) != 0));
            at += length;
        }
        let start = (order % pieces.len() as u64) as usize;
        pieces.rotate_left(start);
        let mut client = Client::new(&negotiated(mode));
        let read = Command::Read(Fragmentation::Allowed);
        let offset = 1 << 30;
        let cookie =
            client.request(offset, u64::from(total), &read, &mut Vec::new()).unwrap();
        let tag = RequestTag::new(cookie, CommandType::READ, offset);
        let encoder = ReplyEncoder::new(mode);
        let mut input = BytesMut::new();
        for (index, (at, length, is_hole)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let position = if last { Position::Last } else { Position::More };
            let place = offset + u64::from(*at);
            if *is_hole {
                encoder.hole(tag, place, *length, position, &mut input);
            } else {
                encoder.data_header(tag, place, *length, position, &mut input);
                input.extend(std::iter::repeat_n(1 + *at as u8 / 2, *length as usize));
            }
        }
        let mut answered = vec![false; total as usize];
        loop {
            let (position, length) = match client.advance(&mut input).unwrap() {
                Event::Data { position, length, .. } => {
                    let data = input.split_to(length);
                    prop_assert_eq!(data[0], 1 + position as u8 / 2);
                    (position as usize, length)
                }
                Event::Hole { position, length, .. } => (position as usize, length),
                Event::Finished { result, .. } => {
                    prop_assert_eq!(result, Ok(()));
                    break;
                }
                event => return Err(TestCaseError::fail(format!("{event:?}"))),
            };
            answered[position..position + length].fill(true);
        }
        prop_assert!(answered.into_iter().all(|answered| answered));
    }

    #[test]
    fn extents_are_read_back_as_far_as_they_were_written(
        mode in chunk_mode(), extents in vec((1..u64::MAX, any::<u32>()), 1..50),
    ) {
        let extents: Vec<BlockDescriptor> = extents
            .into_iter()
            .map(|(length, flags)| BlockDescriptor { length, flags: u64::from(flags) })
            .collect();
        let negotiated = negotiated(mode);
        let mut client = Client::new(&negotiated);
        let command = Command::BlockStatus(ExtentLimit::Many, None);
        let length = 1 << 31;
        let cookie = client.request(0, length, &command, &mut Vec::new()).unwrap();
        let tag = RequestTag::new(cookie, CommandType::BLOCK_STATUS, 0);
        // A server clips to the request.
        let mut left = length;
        let clipped: Vec<BlockDescriptor> = extents
            .into_iter()
            .map_while(|extent| {
                let length = extent.length.min(left);
                left -= length;
                (length > 0).then_some(BlockDescriptor { length, ..extent })
            })
            .collect();
        let mut input = BytesMut::new();
        let encoder = ReplyEncoder::new(mode);
        for (index, (context, _)) in negotiated.meta_contexts.iter().enumerate() {
            let position = if index == 1 { Position::Last } else { Position::More };
            encoder.block_status(tag, *context, &clipped, position, &mut input);
        }
        for (context, _) in &negotiated.meta_contexts {
            let event = client.advance(&mut input).unwrap();
            let descriptors = clipped.clone();
            prop_assert_eq!(event, Event::BlockStatus { cookie, context: *context, descriptors });
        }
        prop_assert_eq!(client.advance(&mut input), Ok(Event::Finished { cookie, result: Ok(()) }));
    }

    #[test]
    fn bytes_of_any_kind_never_panic_a_server(
        bytes in vec(any::<u8>(), 0..300), client_flags in 0..8_u32, option in 0..13_u32,
        tls in 0..3_usize,
    ) {
        let tls = [TlsPolicy::Off, TlsPolicy::Allow, TlsPolicy::Require][tls];
        let mut out = BytesMut::new();
        let config = ServerConfig::new().tls(tls);
        let handshake = Handshake::start(config, &mut out);
        let mut input = BytesMut::from(&client_flags.to_be_bytes()[..]);
        input.extend_from_slice(&common::listing::option(option, &bytes));
        input.extend_from_slice(&bytes);
        let _ = common::serve_handshake(handshake, &mut input, &mut out);
    }

    #[test]
    fn bytes_of_any_kind_never_panic_a_client(
        bytes in vec(any::<u8>(), 0..300), reply in 0..6_u32, is_error: bool,
    ) {
        let mut out = BytesMut::new();
        let mut input = BytesMut::from(&bytes[..]);
        let _ = ClientHandshake::new().advance(&mut input, &mut out);
        let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT\0\x03"[..]);
        let step = ClientHandshake::new().advance(&mut input, &mut out).unwrap();
        let ClientStep::Newstyle(phase) = step else { panic!("newstyle") };
        let awaiting = phase.info("disk", InfoRequest::ALL, &mut out).unwrap();
        let reply = if is_error { reply | 0x8000_0000 } else { reply };
        input.extend_from_slice(&common::listing::reply(6, reply, &bytes));
        input.extend_from_slice(&bytes);
        if let Ok(AwaitStep::Refused { error, .. }) = awaiting.advance(&mut input) {
            prop_assert!(is_error);
            let text = error.to_string();
            prop_assert!(!text.chars().any(char::is_control));
        }
    }

    #[test]
    fn selected_contexts_are_those_asked_for(picks in vec(0..4_usize, 0..8)) {
        let known = [
            MetaContextName::base_allocation(),
            MetaContextName::qemu_allocation_depth(),
            MetaContextName::qemu_dirty_bitmap("b0").unwrap(),
            MetaContextName::new("x-other:thing").unwrap(),
        ];
        let asked: Vec<MetaContextName> = picks.iter().map(|pick| known[*pick].clone()).collect();
        let mut driver = common::client::Driver::new(common::link::Link::new(
            ServerConfig::default(),
            common::link::Cut::Whole,
        ));
        let phase = driver.greet().unwrap();
        let awaiting = phase.structured_reply(&mut driver.out).unwrap();
        let phase = driver.ask(awaiting).unwrap().unwrap();
        let awaiting = phase.set_meta_context("disk", &asked, &mut driver.out).unwrap();
        let (selected, _) = driver.ask(awaiting).unwrap().unwrap();
        let expected: Vec<(MetaContextId, MetaContextName)> = (0..3)
            .filter(|index| picks.contains(index))
            .map(|index| (MetaContextId(index as u32), known[index].clone()))
            .collect();
        prop_assert_eq!(selected, expected);
    }

    #[test]
    fn uris_are_read_back_as_they_were_written(uri in any_uri()) {
        let text = uri.to_string();
        prop_assert!(text.is_ascii(), "{}", text);
        prop_assert_eq!(text.parse::<NbdUri>(), Ok(uri), "{}", text);
    }

    #[test]
    fn text_of_any_kind_never_panics_the_uri_parser(text in ".*") {
        let _ = text.parse::<NbdUri>();
        let _ = format!("nbd://{text}").parse::<NbdUri>();
        let _ = format!("nbd+unix:///?socket={text}").parse::<NbdUri>();
    }
}

/// Text without NUL, which no string of the protocol contains.
fn text() -> impl Strategy<Value = String> {
    "[^\\x00]{0,20}"
}

fn full_text() -> impl Strategy<Value = String> {
    "[^\\x00]{1,20}"
}

fn any_uri() -> impl Strategy<Value = NbdUri> {
    let host = prop_oneof![
        "[a-zA-Z0-9][a-zA-Z0-9.-]{0,20}".prop_map(String::from),
        any::<std::net::Ipv4Addr>().prop_map(|address| address.to_string()),
        any::<std::net::Ipv6Addr>().prop_map(|address| address.to_string()),
        Just("fe80::1%eth0".to_owned()),
    ];
    let tcp = (host, 1..=u16::MAX).prop_map(|(host, port)| Transport::Tcp { host, port });
    let unix = full_text().prop_map(|path| Transport::Unix { path: path.into() });
    let kind =
        prop_oneof![Just(TlsKind::Anonymous), Just(TlsKind::X509), Just(TlsKind::PreSharedKey)];
    let tls = (
        option::of(kind),
        option::of(full_text()),
        option::of(full_text()),
        option::of(full_text()),
        any::<Option<bool>>(),
    )
        .prop_map(|(kind, certificates, psk_file, hostname, verify_peer)| {
            let mut tls = TlsParameters::default();
            tls.kind = kind;
            tls.certificates = certificates.map(Into::into);
            tls.psk_file = psk_file.map(Into::into);
            tls.hostname = hostname;
            tls.verify_peer = verify_peer;
            tls
        });
    let security = prop_oneof![Just(Security::Plain), Just(Security::Tls)];
    (prop_oneof![tcp, unix], security, text(), option::of(full_text()), tls).prop_map(
        |(transport, security, export_name, user, tls)| {
            let mut uri = NbdUri::new(transport, export_name);
            (uri.security, uri.user, uri.tls) = (security, user, tls);
            uri
        },
    )
}
