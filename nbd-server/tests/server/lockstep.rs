//! A client with one request at a time, which the server waits for in its reads.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use nbd_server::ServerConfig;
use nbd_server::export::MemoryExport;

use crate::support::{Client, MODES, Random, TestServer, wait_until};

/// More single requests than the server wants to see before it waits.
const MANY: u64 = 200;

fn one_thread() -> TestServer {
    let mut config = ServerConfig::default();
    config.workers = NonZeroUsize::MIN;
    TestServer::with(config, Arc::new(MemoryExport::new(64 << 20)))
}

fn fall_into_step(client: &mut Client) {
    for number in 0..MANY {
        client.read(number * 4096, 4096);
    }
}

#[test]
fn everything_is_exact_in_step_and_out_of_it() {
    let mut random = Random::new();
    let server = one_thread();
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        for length in [1, 512, 4096, 40_000, 3 << 20, 100] {
            fall_into_step(&mut client);
            // Longer than the server waits, then each kind of payload and reply.
            std::thread::sleep(Duration::from_millis(10));
            let data = random.bytes(length);
            client.write(4711, &data).unwrap();
            assert!(client.read(4711, length as u64) == data, "{length} bytes, {mode:?}");
            fall_into_step(&mut client);
            client.write(815, &data).unwrap();
            assert!(client.read(815, length as u64) == data, "{length} bytes, {mode:?}");
        }
    }
}

#[test]
fn another_client_of_the_thread_is_served_meanwhile() {
    let server = one_thread();
    let mut first = Client::connect(&server, MODES[2]);
    fall_into_step(&mut first);
    let mut second = Client::connect(&server, MODES[2]);
    for number in 0..MANY {
        first.read(number, 10);
        second.read(number, 10);
    }
}

#[test]
fn a_client_that_goes_is_noticed_and_the_server_ends() {
    let mut server = one_thread();
    let mut client = Client::connect(&server, MODES[0]);
    fall_into_step(&mut client);
    drop(client);
    let mut client = Client::connect(&server, MODES[0]);
    fall_into_step(&mut client);
    server.begin_stop();
    wait_until("the server has ended", || server.has_ended());
}
