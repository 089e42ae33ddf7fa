//! The seeds of the corpus.

use nbd_proto::handshake::server::ServerConfig;
use nbd_proto::wire::ReplyMode;

use super::common::client::{Driver, Way, session};
use super::common::link::{Cut, Link};
use super::common::listing::{
    chunk, counted, data, extended_chunk, extended_request, extended_status, hole, info_payload,
    meta_payload, option, reply, request, simple_reply, status,
};

type Seed = (&'static str, &'static str, Vec<u8>);

pub(super) fn seeds() -> Vec<Seed> {
    let mut seeds = sessions();
    seeds.extend(options());
    seeds.extend(answers());
    seeds.extend(requests());
    seeds.extend(replies());
    seeds.extend(uris());
    seeds
}

fn with_choice(choice: u8, parts: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![choice];
    bytes.extend(parts.concat());
    bytes
}

/// The client's half of whole sessions, for the server.
fn sessions() -> Vec<Seed> {
    let client = |mode, way| {
        let mut driver = Driver::new(Link::new(ServerConfig::default(), Cut::Whole));
        session(&mut driver, mode, way).expect("a whole session");
        with_choice(0xfc, &[driver.wire.to_server])
    };
    vec![
        ("server_handshake", "session_simple", client(ReplyMode::Simple, Way::ExportName)),
        ("server_handshake", "session_structured", client(ReplyMode::Structured, Way::Go)),
        ("server_handshake", "session_extended", client(ReplyMode::Extended, Way::Go)),
    ]
}

fn options() -> Vec<Seed> {
    let flags = 3_u32.to_be_bytes().to_vec();
    let go = option(7, &info_payload(b"disk", &[1, 2, 3]));
    let server = |name, choice, options: &[Vec<u8>]| {
        let parts = [std::slice::from_ref(&flags), options].concat();
        ("server_handshake", name, with_choice(choice, &parts))
    };
    let meta = meta_payload(b"disk", &[b"base:allocation", b"qemu:", b"x:y"]);
    vec![
        server("starttls", 1, &[option(5, &[]), option(3, &[])]),
        server("starttls_required", 2, &[option(3, &[]), option(5, &[]), go.clone()]),
        server("abort", 0, &[option(2, b"bye")]),
        server("unknown_option", 0, &[option(99, b"abc"), option(4, &[]), go.clone()]),
        server("export_name", 0, &[option(1, b"disk")]),
        server("export_name_4097", 0, &[option(1, &[b'n'; 4097])]),
        server("meta_before_structured", 0, &[option(9, &meta), option(10, &meta)]),
        server("meta", 4, &[option(8, &[]), option(9, &meta), option(10, &meta), go.clone()]),
        server("extended", 0, &[option(11, &[]), option(8, &[]), option(10, &meta), go.clone()]),
        server("go_name_too_long", 0, &[option(7, &[0xff, 0xff, 0xff, 0xff, 0, 0])]),
        server("go_odd_name", 0, &[option(7, &info_payload(b"odd", &[])), go.clone()]),
        ("wire_option", "option", go),
        ("wire_option", "option_reply", reply(3, 2, &counted(b"disk"))),
        ("wire_option", "request", request(1, 1, 2, 3, 4)),
        ("wire_option", "extended_request", extended_request(1, 1, 2, 3, 4)),
        ("wire_option", "chunk", chunk(1, 1, 2, &data(3, b"abc"))),
        ("wire_option", "extended_chunk", extended_chunk(1, 1, 2, 3, b"abc")),
        ("wire_option", "simple_reply", simple_reply(5, 2)),
        (
            "wire_option",
            "huge_length",
            option(3, &[]).into_iter().take(12).chain([0xff; 4]).collect(),
        ),
    ]
}

/// Servers' answers, for the client.
fn answers() -> Vec<Seed> {
    let greeting = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let export = reply(7, 3, b"\0\0\0\0\0\0\0\x10\0\0\x0d\xed");
    let sizes = reply(7, 3, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    let ack = |option| reply(option, 1, &[]);
    let context = |option, name: &[u8]| reply(option, 4, &[b"\0\0\0\0", name].concat());
    let client = |name, choice, parts: &[Vec<u8>]| {
        let parts = [std::slice::from_ref(&greeting), parts].concat();
        ("client_handshake", name, with_choice(choice, &parts))
    };
    let oldstyle = [b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec(), vec![0; 136]].concat();
    vec![
        ("client_handshake", "oldstyle", with_choice(0, &[oldstyle])),
        client("go", 0, &[sizes.clone(), export.clone(), ack(7), simple_reply(5, 1)]),
        client("go_without_export", 0, &[sizes.clone(), ack(7)]),
        client("refused", 0, &[reply(7, 0x8000_0006, b"no such export")]),
        client("size_2_63", 0, &[reply(7, 3, b"\0\0\x80\0\0\0\0\0\0\0\0\x01"), ack(7)]),
        client("list", 4, &[reply(3, 2, &counted(b"disk")), ack(3), export.clone(), ack(7)]),
        client("list_long_name", 4, &[reply(3, 2, b"\xff\xff\xff\xffdisk")]),
        client("export_name", 64, &[b"\0\0\0\0\0\x10\0\0\0\x01".to_vec()]),
        client(
            "contexts",
            1 | 8 | 16,
            &[
                ack(8),
                context(9, b"qemu:"),
                context(9, b"base:allocation"),
                ack(9),
                context(10, b"base:allocation"),
                ack(10),
                sizes,
                export.clone(),
                ack(7),
                chunk(1, 2, 1, &hole(0x1000, 0x1000)),
            ],
        ),
        client("context_unasked", 1 | 16, &[ack(8), context(10, b"x:y"), ack(10)]),
        client("extended", 2, &[ack(11), export, ack(7), extended_chunk(1, 0, 3, 0, &[])]),
    ]
}

fn requests() -> Vec<Seed> {
    let write = [request(0, 1, 1, 0, 4), b"data".to_vec()].concat();
    let all: Vec<Vec<u8>> = (0..9).map(|command| request(0, command, 1, 4096, 512)).collect();
    let extended: Vec<Vec<u8>> =
        (3..8).map(|command| extended_request(0, command, 1, 4096, 1 << 19)).collect();
    let payload =
        [&4096_u64.to_be_bytes()[..], &0_u32.to_be_bytes(), &2_u32.to_be_bytes()].concat();
    let chosen = [extended_request(32, 7, 1, 0, 16), payload].concat();
    let server =
        |name, choice, parts: &[Vec<u8>]| ("server_transmission", name, with_choice(choice, parts));
    vec![
        server("write", 0, &[write.clone(), request(0, 2, 2, 0, 0)]),
        server("commands", 1, &all),
        server("commands_read_only", 0x41, &all),
        server("commands_sectors", 0x81, &all),
        server("past_the_end", 1, &[request(0, 0, 1, 1 << 20, 1), request(0, 1, 1, u64::MAX, 1)]),
        server("write_too_long", 0, &[request(0, 1, 1, 0, u32::MAX)]),
        server("extended_commands", 2, &extended),
        server("status_payload", 2, &[chosen.clone(), chosen]),
        server("status_payload_short", 2, &[extended_request(32, 7, 1, 0, 7), vec![0; 7]]),
        server("bad_magic", 0, &[vec![0; 28]]),
    ]
}

fn replies() -> Vec<Seed> {
    let client =
        |name, choice, parts: &[Vec<u8>]| ("client_transmission", name, with_choice(choice, parts));
    let error = |errno: u32| [&errno.to_be_bytes()[..], b"\0\x03bad"].concat();
    let offset_error = [error(5), 0x1004_u64.to_be_bytes().to_vec()].concat();
    vec![
        client("simple", 0, &[simple_reply(0, 2), simple_reply(0, 1), vec![7; 0x1000]]),
        client(
            "structured_read",
            1,
            &[
                chunk(0, 1, 1, &data(0x1000, &[1; 512])),
                chunk(0, 2, 1, &hole(0x1200, 0xe00)),
                chunk(1, 0, 1, &[]),
            ],
        ),
        client("structured_outside", 1, &[chunk(0, 1, 1, &data(0x1fff, b"ab"))]),
        client(
            "structured_overlap",
            1,
            &[chunk(0, 2, 1, &hole(0x1000, 9)), chunk(0, 2, 1, &hole(0x1008, 9))],
        ),
        client(
            "structured_status",
            1,
            &[
                chunk(0, 5, 2, &status(0, &[(512, 3), (u32::MAX, 0)])),
                chunk(1, 5, 2, &status(2, &[(4096, 1)])),
                chunk(0, 5, 5, &status(2, &[(0, 1)])),
            ],
        ),
        client(
            "structured_error",
            1,
            &[chunk(0, 0x8002, 1, &offset_error), chunk(1, 0x8001, 1, &error(28))],
        ),
        client(
            "extended",
            2,
            &[
                extended_chunk(1, 2, 4, 0x2000, &hole(0x2000, 0x200)),
                extended_chunk(0, 6, 2, 0x1000, &extended_status(0, 1, &[(1 << 40, 1)])),
                extended_chunk(1, 6, 2, 0x1000, &extended_status(2, 1, &[(1, 0)])),
                extended_chunk(1, 0, 3, 0, &[]),
            ],
        ),
        client("unknown_cookie", 1, &[simple_reply(0, 99)]),
    ]
}

fn uris() -> Vec<Seed> {
    [
        ("tcp", "nbd://localhost/disk"),
        ("port", "nbds://example.org:10810//a/../b"),
        ("ipv6", "nbd://[fe80::1%25eth0]:1/x"),
        ("unix", "nbd+unix:///vm%201?socket=/run/nbd%20sock"),
        ("tls", "nbds+unix://me@/x?socket=s&tls-type=psk&tls-psk-file=/k&tls-verify-peer=no"),
        ("certificates", "nbds://h/?tls-certificates=/c%3f&tls-hostname=n;unknown=1&tls-type=x509"),
        ("percent", "nbd://h/%"),
        ("nul", "nbd://h/%00"),
        ("no_socket", "nbd+unix:///x"),
        ("no_scheme", "disk.img"),
    ]
    .into_iter()
    .map(|(name, text)| ("uri", name, text.as_bytes().to_vec()))
    .collect()
}
