//! Requests that are wrong, and what they cost the client that sends them.

use nbd_proto::limits::{MAX_DISCARDED_PAYLOAD, MAX_PAYLOAD};
use nbd_proto::wire::{CommandFlags, CommandType, Errno, ReplyMode, TransmissionFlags};
use nbd_server::export::MemoryExport;

use crate::support::{Client, MODES, Script, Scripted, TestServer, header};

const SIZE: u64 = 1 << 20;

fn server() -> TestServer {
    TestServer::of(MemoryExport::new(SIZE))
}

#[test]
fn a_payload_over_the_maximum_is_consumed_and_answered() {
    let server = server();
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        let length = u64::from(MAX_PAYLOAD) + 1;
        let write = header(CommandType::WRITE, 0, length);
        // Past the end of this disk, too; either is said, and nothing of it is written.
        let errno = client.raw(&write, &vec![9; length as usize]);
        assert!([Errno::EINVAL, Errno::ENOSPC].contains(&errno), "{errno}");
        assert_eq!(client.read(0, 4096), [0; 4096], "{mode:?}");
    }
    let large = TestServer::of(MemoryExport::new(1 << 30));
    for mode in MODES {
        let mut client = Client::connect(&large, mode);
        for length in [u64::from(MAX_PAYLOAD) + 1, MAX_DISCARDED_PAYLOAD] {
            let write = header(CommandType::WRITE, 0, length);
            assert_eq!(client.raw(&write, &vec![9; length as usize]), Errno::EINVAL);
        }
        assert_eq!(client.read(0, 4096), [0; 4096], "{mode:?}");
        let read = header(CommandType::READ, 0, u64::from(MAX_PAYLOAD) + 1);
        assert_eq!(client.raw(&read, &[]), Errno::EINVAL);
    }
}

#[test]
fn a_payload_beyond_reason_ends_the_connection() {
    let server = server();
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        let write = header(CommandType::WRITE, 0, MAX_DISCARDED_PAYLOAD + 1);
        client.send(client.encode(&write));
        client.expect_end();
    }
    assert_eq!(Client::connect(&server, MODES[0]).read(0, 1), [0]);
}

#[test]
fn a_wrong_magic_ends_the_connection_and_no_other() {
    let server = server();
    for mode in MODES {
        let mut other = Client::connect(&server, mode);
        let mut client = Client::connect(&server, mode);
        client.send(vec![0x25; 40]);
        client.expect_end();
        assert_eq!(other.read(0, 1), [0]);
    }
}

#[test]
fn past_the_end_writing_is_enospc_and_everything_else_einval() {
    let server = server();
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        for (offset, length) in [(SIZE, 512), (SIZE - 1, 2), (SIZE + 4096, 1)] {
            let mut ask =
                |command, payload: &[u8]| client.raw(&header(command, offset, length), payload);
            assert_eq!(ask(CommandType::WRITE, &vec![1; length as usize]), Errno::ENOSPC);
            assert_eq!(ask(CommandType::WRITE_ZEROES, &[]), Errno::ENOSPC);
            assert_eq!(ask(CommandType::READ, &[]), Errno::EINVAL);
            assert_eq!(ask(CommandType::TRIM, &[]), Errno::EINVAL);
            assert_eq!(ask(CommandType::CACHE, &[]), Errno::EINVAL);
        }
        let overflowing = header(CommandType::READ, u64::MAX - 1, 4);
        assert_eq!(client.raw(&overflowing, &[]), Errno::EINVAL);
        assert_eq!(client.read(SIZE - 1, 1), [0], "the last byte was not written");
    }
}

#[test]
fn a_read_only_export_answers_eperm_to_whatever_writes() {
    let script = Script { without: Some(TransmissionFlags::empty()), ..Script::default() };
    let read_only = ReadOnly(Scripted::new(SIZE, script));
    let server = TestServer::of(read_only);
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        assert!(client.negotiated.flags.contains(TransmissionFlags::READ_ONLY));
        for flags in [CommandFlags::empty(), CommandFlags::FUA] {
            for command in [CommandType::WRITE, CommandType::WRITE_ZEROES, CommandType::TRIM] {
                let payload = if command == CommandType::WRITE { vec![1; 100] } else { vec![] };
                let request = nbd_proto::wire::RequestHeader { flags, ..header(command, 0, 100) };
                assert_eq!(client.raw(&request, &payload), Errno::EPERM, "{command} {mode:?}");
            }
        }
        assert_eq!(client.read(0, 100), [0; 100]);
    }
}

#[test]
fn requests_without_length_succeed_but_for_block_status() {
    let server = server();
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        for offset in [0, 5, SIZE] {
            for command in [
                CommandType::READ,
                CommandType::WRITE,
                CommandType::TRIM,
                CommandType::CACHE,
                CommandType::WRITE_ZEROES,
                CommandType::FLUSH,
            ] {
                assert_eq!(client.raw(&header(command, offset, 0), &[]), Errno(0), "{command}");
            }
            let status = header(CommandType::BLOCK_STATUS, offset, 0);
            assert_eq!(client.raw(&status, &[]), Errno::EINVAL);
        }
    }
}

#[test]
fn unknown_commands_and_flags_that_do_not_belong_are_einval() {
    let server = server();
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        assert_eq!(client.raw(&header(CommandType(99), 0, 10), &[]), Errno::EINVAL);
        assert_eq!(client.raw(&header(CommandType::RESIZE, 0, 10), &[]), Errno::EINVAL);
        let mut wrong = header(CommandType::WRITE, 0, 10);
        wrong.flags = CommandFlags::FAST_ZERO;
        assert_eq!(client.raw(&wrong, &[1; 10]), Errno::EINVAL, "and its payload is consumed");
        wrong = header(CommandType::READ, 0, 10);
        wrong.flags = CommandFlags::from_bits_retain(1 << 14);
        assert_eq!(client.raw(&wrong, &[]), Errno::EINVAL);
        if mode == ReplyMode::Extended {
            let mut payload = header(CommandType::TRIM, 0, 10);
            payload.flags = CommandFlags::PAYLOAD_LEN;
            assert_eq!(client.raw(&payload, &[7; 10]), Errno::EINVAL);
        }
        assert_eq!(client.read(0, 10), [0; 10]);
    }
}

#[test]
fn what_the_export_does_not_offer_is_einval() {
    let without = TransmissionFlags::SEND_TRIM
        | TransmissionFlags::SEND_WRITE_ZEROES
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_CACHE
        | TransmissionFlags::SEND_FLUSH;
    let script = Script { without: Some(without), ..Script::default() };
    let server = TestServer::with(Default::default(), Scripted::new(SIZE, script));
    let mut client = Client::connect(&server, ReplyMode::Structured);
    for command in [
        CommandType::TRIM,
        CommandType::WRITE_ZEROES,
        CommandType::CACHE,
        CommandType::FLUSH,
        CommandType::BLOCK_STATUS,
    ] {
        assert_eq!(client.raw(&header(command, 0, 10), &[]), Errno::EINVAL, "{command}");
    }
    let mut durable = header(CommandType::WRITE, 0, 1);
    durable.flags = CommandFlags::FUA;
    assert_eq!(client.raw(&durable, &[1]), Errno::EINVAL);
    assert_eq!(client.write(0, &[1]), Ok(()));
}

/// The same disk, read-only.
struct ReadOnly(std::sync::Arc<Scripted>);

impl nbd_server::export::Export for ReadOnly {
    fn info(&self) -> nbd_server::export::ExportInfo {
        let mut info = nbd_server::export::ExportInfo::new(SIZE);
        info.flags |= TransmissionFlags::READ_ONLY;
        info
    }

    fn read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), nbd_server::export::ExportError> {
        self.0.read_at(offset, buffer)
    }
}
