//! Memory that clients can make the server take.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbd_proto::transmission::{Command, Durability, ExtentLimit, Fragmentation, Speed, ZeroMode};
use nbd_proto::wire::{CommandType, MetaContextName, ReplyMode};
use nbd_server::ServerConfig;
use nbd_server::export::{Export as _, MayBlock, MemoryExport};

use crate::support::{Client, MODES, Random, Script, Scripted, TestServer, header, wait_until};

const LARGE: u64 = 32 << 20;

/// Bytes that the server reads for a client that sends `count` requests and never takes a reply.
fn begun(mode: ReplyMode, prompt: MayBlock, length: u64, count: usize) -> usize {
    let disk = Scripted::new(64 << 20, Script { prompt: Some(prompt), ..Script::default() });
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let client = Client::connect(&server, mode);
    let request = client.encode(&header(CommandType::READ, 0, length));
    client.send(request.repeat(count));
    // It has stopped when nothing new begins for a while. One that goes on gets through `count`.
    let mut last = usize::MAX;
    wait_until("the server has stopped to read", || {
        std::thread::sleep(Duration::from_millis(200));
        let now = disk.bytes_read.load(Ordering::SeqCst);
        now > 0 && std::mem::replace(&mut last, now) == now
    });
    last
}

#[test]
fn a_client_that_never_reads_is_not_read_from_any_more() {
    for mode in MODES {
        for prompt in [MayBlock::Yes, MayBlock::No] {
            // 64 MiB of the connection's budget, and one request of any size beyond it.
            let begun = begun(mode, prompt, LARGE, 5000) as u64;
            assert!(begun <= (64 << 20) + LARGE, "{begun} bytes read");
        }
    }
}

#[test]
fn long_reads_hold_a_few_steps_of_memory_where_replies_may_be_split() {
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        for prompt in [MayBlock::Yes, MayBlock::No] {
            // Steps in the pool, replies that wait, and what the sockets hold.
            let begun = begun(mode, prompt, LARGE, 5000);
            assert!(begun <= 12 << 20, "{begun} bytes read");
        }
    }
}

#[test]
fn long_reads_in_steps_give_what_the_disk_holds() {
    const SIZE: u64 = 40 << 20;
    let mut random = Random::new();
    for prompt in [MayBlock::Yes, MayBlock::No] {
        let disk = Scripted::new(SIZE, Script { prompt: Some(prompt), ..Script::default() });
        let content = random.bytes(SIZE as usize);
        disk.disk.write_at(0, &content, Durability::Cached).unwrap();
        let server = TestServer::with(ServerConfig::default(), disk.clone());
        for mode in MODES {
            let mut client = Client::connect(&server, mode);
            let mut expected = HashMap::new();
            for fragmentation in [Fragmentation::Allowed, Fragmentation::Forbidden] {
                if mode == ReplyMode::Simple && fragmentation == Fragmentation::Forbidden {
                    continue;
                }
                for _ in 0..4 {
                    let length = (1 << 20) + random.below(LARGE - (1 << 20));
                    let offset = random.below(SIZE - length);
                    let cookie = client.submit(offset, length, &Command::Read(fragmentation), &[]);
                    expected.insert(cookie, offset as usize..(offset + length) as usize);
                    let cookie = client.submit(offset, 10, &Command::Read(fragmentation), &[]);
                    expected.insert(cookie, offset as usize..offset as usize + 10);
                }
            }
            while !expected.is_empty() {
                let (cookie, outcome) = client.next_finished();
                let range = expected.remove(&cookie).unwrap();
                assert_eq!(outcome.result, Ok(()), "{mode:?}");
                assert!(outcome.data == content[range], "{mode:?} {prompt:?}");
            }
        }
    }
}

#[test]
fn beside_very_many_clients_that_take_no_replies_fewer_are_made_in_advance() {
    const CLIENTS: usize = 200;
    let prompt = Some(MayBlock::No);
    let disk = Scripted::new(1 << 20, Script { prompt, ..Script::default() });
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let read = |clients: &mut Vec<Client>, count: usize| {
        let begun = disk.reads.load(Ordering::SeqCst);
        for _ in 0..count {
            let client = Client::connect(&server, ReplyMode::Simple);
            client.send(client.encode(&header(CommandType::READ, 0, 32 << 10)).repeat(1000));
            clients.push(client);
        }
        // They have all they can get when it is no more after a while.
        let mut last = 0;
        wait_until("the server has stopped to read", || {
            std::thread::sleep(Duration::from_millis(300));
            let now = disk.reads.load(Ordering::SeqCst);
            now >= begun + count && std::mem::replace(&mut last, now) == now
        });
        last - begun
    };
    let mut clients = Vec::new();
    let alone = read(&mut clients, 1);
    read(&mut clients, CLIENTS);
    let beside_all = read(&mut clients, 1);
    // What the system's buffers take is the same for both.
    let in_server = (1 << 20) / (32 << 10);
    assert!(beside_all + in_server / 2 <= alone, "{alone} alone, {beside_all} beside all");
    // A client that comes now is served nevertheless.
    let mut good = Client::connect(&server, ReplyMode::Extended);
    for _ in 0..100 {
        good.submit(0, 32 << 10, &Command::Read(Fragmentation::Allowed), &[]);
    }
    for _ in 0..100 {
        assert_eq!(good.next_finished().1.result, Ok(()));
    }
}

#[test]
fn large_reads_that_are_in_memory_take_their_part_of_the_budget_too() {
    let mut config = ServerConfig::default();
    config.memory_limit = 2 * LARGE as usize;
    let prompt = Some(MayBlock::No);
    let disk = Scripted::new(64 << 20, Script { prompt, ..Script::default() });
    let server = TestServer::with(config, disk.clone());
    let mut clients: Vec<_> = (0..8)
        .map(|_| {
            let client = Client::connect(&server, ReplyMode::Simple);
            client.send(client.encode(&header(CommandType::READ, 0, LARGE)));
            client
        })
        .collect();
    let read = || disk.bytes_read.load(Ordering::SeqCst) as u64;
    wait_until("two are read", || read() == 2 * LARGE);
    // As long as nobody takes its reply there is no memory for another one.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(read(), 2 * LARGE);
    for client in &mut clients {
        client.finish_sending();
    }
    std::thread::scope(|scope| {
        for mut client in clients {
            scope.spawn(move || assert_eq!(client.read_to_end().len(), 16 + LARGE as usize));
        }
    });
    assert_eq!(read(), 8 * LARGE);
}

#[test]
fn many_small_requests_are_bounded_as_well() {
    for prompt in [MayBlock::Yes, MayBlock::No] {
        let begun = begun(ReplyMode::Extended, prompt, 4096, 40_000);
        // What waits in the server, what was under way, and what the sockets hold.
        assert!(begun <= 16 << 20, "{begun} bytes read");
    }
}

#[test]
fn large_requests_of_many_connections_take_turns_in_a_small_budget() {
    let mut config = ServerConfig::default();
    config.memory_limit = 1 << 20;
    config.connection_memory_limit = 1 << 20;
    config.workers = NonZeroUsize::new(2).unwrap();
    let disk = Scripted::new(64 << 20, Script::default());
    let server = TestServer::with(config, disk);
    let mut random = Random::new();
    std::thread::scope(|scope| {
        for index in 0..8_u64 {
            let mut random = random.fork();
            let server = &server;
            scope.spawn(move || {
                let mut client = Client::connect(server, MODES[index as usize % 3]);
                for _ in 0..4 {
                    let length = (300 << 10) + random.below(3 << 20);
                    let data = random.bytes(length as usize);
                    assert_eq!(client.write(index * (8 << 20), &data), Ok(()));
                    assert!(client.read(index * (8 << 20), length) == data);
                }
            });
        }
    });
}

#[test]
fn clients_that_hold_the_whole_budget_and_stall_stop_nobody_who_asks_for_less() {
    let mut config = ServerConfig::default();
    config.memory_limit = 64 << 20;
    let disk = Scripted::new(64 << 20, Script::default());
    let server = TestServer::with(config, disk);
    let stalled: Vec<Client> = (0..4)
        .map(|index| {
            let client = Client::connect(&server, ReplyMode::Simple);
            // The payload never comes, or the reply is never taken.
            let kind = if index % 2 == 0 { CommandType::WRITE } else { CommandType::READ };
            client.send(client.encode(&header(kind, 0, LARGE)));
            client
        })
        .collect();
    let mut random = Random::new();
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        for length in [4096, 100 << 10, 1 << 20] {
            let data = random.bytes(length);
            assert_eq!(client.write(40 << 20, &data), Ok(()));
            assert!(client.read(40 << 20, length as u64) == data);
        }
    }
    drop(stalled);
}

#[test]
fn clients_that_leave_while_they_wait_for_memory_are_forgotten() {
    let mut config = ServerConfig::default();
    config.memory_limit = LARGE as usize;
    let server = TestServer::with(config, Arc::new(MemoryExport::new(64 << 20)));
    let begin = || {
        let client = Client::connect(&server, ReplyMode::Extended);
        let mut bytes = client.encode(&header(CommandType::WRITE, 0, LARGE));
        bytes.resize(bytes.len() + 1000, 0x55);
        client.send(bytes);
        client
    };
    let _has_all_memory = begin();
    let wait: Vec<_> = (0..8).map(|_| begin()).collect();
    drop(wait);
    wait_until("they are gone", || server.handle().clients().len() == 1);
}

#[test]
fn requests_already_received_are_answered_after_a_pause_of_the_client() {
    // More requests than the receive buffer holds, which all wait because nothing can be sent; then
    // everything is wanted at once.
    for prompt in [MayBlock::Yes, MayBlock::No] {
        let disk = Scripted::new(1 << 20, Script { prompt: Some(prompt), ..Script::default() });
        let server = TestServer::with(ServerConfig::default(), disk);
        let mut client = Client::connect(&server, ReplyMode::Simple);
        let count = 30_000;
        for _ in 0..count {
            client.submit(0, 4096, &Command::Read(Fragmentation::Allowed), &[]);
        }
        std::thread::sleep(Duration::from_millis(300));
        for _ in 0..count {
            assert_eq!(client.next_finished().1.result, Ok(()));
        }
    }
}

#[test]
fn requests_about_the_largest_disk_there_is_are_answered() {
    let server =
        TestServer::with(ServerConfig::default(), Arc::new(MemoryExport::new(i64::MAX as u64)));
    let contexts = [MetaContextName::base_allocation()];
    let mut client = Client::open(&server, ReplyMode::Extended, "", &contexts);
    let size = i64::MAX as u64;
    assert_eq!(client.read(size - 10, 10), [0; 10]);
    let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::FastOnly, Durability::Cached);
    for command in [zeroes, Command::Trim(Durability::Cached), Command::Cache] {
        assert_eq!(client.request(0, size, &command).result, Ok(()));
    }
    // The answer may be short, but it says something.
    let status = client.request(0, size, &Command::BlockStatus(ExtentLimit::Many, None));
    assert!(status.statuses[0].1[0].length > 0);
}
