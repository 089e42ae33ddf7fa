//! A bad sector in the middle of a read.

use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_proto::wire::{Errno, ReplyMode};
use nbd_server::export::MayBlock;

use crate::support::{Client, MODES, Script, Scripted, TestServer};

const BAD: u64 = 300 * 1024 + 4096;
const LENGTH: u64 = 1 << 20;

fn disk(prompt: MayBlock) -> std::sync::Arc<Scripted> {
    let script = Script { bad: Some(BAD..BAD + 512), prompt: Some(prompt), ..Script::default() };
    let disk = Scripted::new(4 << 20, script);
    let content: Vec<u8> = (0..4_u32 << 20).map(|n| (n / 512) as u8 | 1).collect();
    nbd_server::export::Export::write_at(&disk.disk, 0, &content, Durability::Cached).unwrap();
    disk
}

fn server(prompt: MayBlock) -> TestServer {
    TestServer::with(Default::default(), disk(prompt))
}

#[test]
fn the_part_in_front_of_it_is_sent_and_the_error_says_where() {
    for (mode, prompt) in [
        (ReplyMode::Structured, MayBlock::Yes),
        (ReplyMode::Extended, MayBlock::Yes),
        (ReplyMode::Structured, MayBlock::No),
    ] {
        let server = server(prompt);
        let mut client = Client::connect(&server, mode);
        let outcome = client.request(5, LENGTH, &Command::Read(Fragmentation::Allowed));
        let error = outcome.result.unwrap_err();
        assert_eq!(error.errno, Errno::EIO);
        assert_eq!(error.offset, Some(BAD), "the sector, not the whole read");
        assert_eq!(error.message, "a bad sector");
        let good = (BAD - 5) as usize;
        assert_eq!(outcome.parts, [(0, good)]);
        assert!(
            outcome.data[..good]
                .iter()
                .enumerate()
                .all(|(at, byte)| { *byte == ((at + 5) / 512) as u8 | 1 })
        );
        assert_eq!(client.read(2 << 20, 4096).len(), 4096, "the connection lives");
    }
}

#[test]
fn a_read_that_begins_with_it_is_an_error_without_data() {
    let server = server(MayBlock::Yes);
    let mut client = Client::connect(&server, ReplyMode::Structured);
    let outcome = client.request(BAD, 8192, &Command::Read(Fragmentation::Allowed));
    let error = outcome.result.unwrap_err();
    assert_eq!((error.errno, error.offset), (Errno::EIO, Some(BAD)));
    assert!(outcome.parts.is_empty());
}

#[test]
fn without_chunks_or_with_df_the_whole_read_fails_and_the_connection_lives() {
    for prompt in [MayBlock::Yes, MayBlock::No] {
        let server = server(prompt);
        for mode in MODES {
            let mut client = Client::connect(&server, mode);
            let fragmentation = match mode {
                ReplyMode::Simple => Fragmentation::Allowed,
                _ => Fragmentation::Forbidden,
            };
            let outcome = client.request(0, LENGTH, &Command::Read(fragmentation));
            assert_eq!(outcome.result.unwrap_err().errno, Errno::EIO, "{mode:?}");
            assert!(outcome.parts.is_empty());
            assert_eq!(client.read(2 << 20, 4096).len(), 4096);
        }
    }
}

#[test]
fn a_write_to_it_fails_and_the_connection_lives() {
    for prompt in [MayBlock::Yes, MayBlock::No] {
        let server = server(prompt);
        for mode in MODES {
            let mut client = Client::connect(&server, mode);
            for length in [512, 100_000] {
                let error = client.write(BAD, &vec![1; length]).unwrap_err();
                assert_eq!(error.errno, Errno::EIO, "{mode:?}");
            }
            assert_eq!(client.write(0, &[1; 512]), Ok(()));
        }
    }
}
