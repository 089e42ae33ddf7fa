//! Both machines joined in memory: whole sessions in every reply mode, with the bytes split
//! anywhere.

mod common;

use bytes::BytesMut;
use common::client::{Driver, Stop, Way, session};
use common::link::{Cut, Link, Numbers, Recording, ServerEnd};
use nbd_proto::handshake::server::ServerConfig;
use nbd_proto::wire::ReplyMode;

const SESSIONS: [(ReplyMode, Way); 5] = [
    (ReplyMode::Simple, Way::ExportName),
    (ReplyMode::Simple, Way::Go),
    (ReplyMode::Structured, Way::ExportName),
    (ReplyMode::Structured, Way::Go),
    (ReplyMode::Extended, Way::Go),
];

fn run(mode: ReplyMode, way: Way, cut: Cut) -> Link {
    let mut driver = Driver::new(Link::new(ServerConfig::default(), cut));
    session(&mut driver, mode, way).unwrap_or_else(|stop| panic!("{mode:?} {way:?}: {stop:?}"));
    while !driver.out.is_empty() {
        let Driver { wire, input, out } = &mut driver;
        common::link::Wire::exchange(wire, out, input);
    }
    assert!(driver.input.is_empty(), "the server sent more than was asked for");
    let ServerEnd::Disk(disk) = &driver.wire.server else { panic!("no transmission phase") };
    assert!(disk.is_disconnected, "DISC has to arrive");
    driver.wire
}

#[test]
fn whole_sessions_succeed_in_every_mode() {
    for (mode, way) in SESSIONS {
        run(mode, way, Cut::Whole);
    }
}

#[test]
fn sessions_fed_one_byte_at_a_time_exchange_the_same_bytes() {
    for (mode, way) in SESSIONS {
        let whole = run(mode, way, Cut::Whole);
        let bytewise = run(mode, way, Cut::OneByte);
        assert_eq!(whole.to_server, bytewise.to_server, "{mode:?} {way:?}");
        assert_eq!(whole.to_client, bytewise.to_client, "{mode:?} {way:?}");
    }
}

#[test]
fn sessions_cut_at_random_exchange_the_same_bytes() {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |now| now.as_nanos() as u64 | 1);
    println!("seed {seed}");
    let mut seeds = Numbers(seed);
    for (mode, way) in SESSIONS {
        let whole = run(mode, way, Cut::Whole);
        for _ in 0..20 {
            let cut = Cut::Random(Numbers(seeds.next() | 1));
            println!("{mode:?} {way:?} {cut:?}");
            let random = run(mode, way, cut);
            assert_eq!(whole.to_server, random.to_server);
            assert_eq!(whole.to_client, random.to_client);
        }
    }
}

#[test]
fn every_prefix_of_a_server_stream_leaves_the_client_waiting() {
    for (mode, way) in SESSIONS {
        let whole = run(mode, way, Cut::Whole);
        for end in 0..whole.to_client.len() {
            let mut driver = Driver::new(Recording(&whole.to_client[..end]));
            let stop = session(&mut driver, mode, way).expect_err("a part of the session");
            assert!(matches!(stop, Stop::Starved), "{mode:?} {way:?}, {end} bytes: {stop:?}");
        }
        let mut driver = Driver::new(Recording(&whole.to_client));
        session(&mut driver, mode, way).expect("the whole session");
    }
}

#[test]
fn every_prefix_of_a_client_stream_leaves_the_server_waiting() {
    for (mode, way) in SESSIONS {
        let whole = run(mode, way, Cut::Whole);
        for end in 0..whole.to_server.len() {
            let mut link = Link::new(ServerConfig::default(), Cut::Whole);
            let mut out = BytesMut::from(&whole.to_server[..end]);
            let mut input = BytesMut::new();
            // Panics inside if the server finds an error in the stream.
            while common::link::Wire::exchange(&mut link, &mut out, &mut input) {}
            assert_eq!(input, whole.to_client[..input.len()], "{mode:?} {way:?}, {end} bytes");
            let is_over = match &link.server {
                ServerEnd::Disk(disk) => disk.is_disconnected,
                ServerEnd::Closed => true,
                ServerEnd::Handshake(_) => false,
            };
            assert!(!is_over, "{mode:?} {way:?}: the session ended after {end} bytes");
        }
    }
}
