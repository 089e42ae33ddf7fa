//! Requests that wait for a quota.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::transmission::{Command, Fragmentation};
use nbd_proto::wire::{CommandType, Errno, ReplyMode};
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{ExportRegistry, Quota, ServerConfig};

use crate::support::{Client, TestServer, header, wait_until};

const READ: Command = Command::Read(Fragmentation::Allowed);

fn bytes_per_second(rate: u64) -> Quota {
    let mut quota = Quota::default();
    quota.bytes_per_second = NonZeroU64::new(rate);
    quota
}

fn requests_per_second(rate: u64) -> Quota {
    let mut quota = Quota::default();
    quota.requests_per_second = NonZeroU64::new(rate);
    quota
}

fn disk() -> ExportEntry {
    ExportEntry::new(Arc::new(MemoryExport::new(64 << 20)))
}

/// One thread for all clients.
fn config() -> ServerConfig {
    let mut config = ServerConfig::default();
    config.workers = NonZeroUsize::MIN;
    config
}

fn serve(slow: ExportEntry) -> TestServer {
    let exports = ExportRegistry::new();
    exports.add("slow", slow).unwrap();
    exports.add("fast", disk()).unwrap();
    TestServer::start(config(), exports)
}

/// A client whose second request waits for hours.
fn waiting(server: &TestServer) -> Client {
    let mut client = Client::open(server, ReplyMode::Extended, "slow", &[]);
    client.read(0, 1 << 20);
    client.submit(0, 1 << 20, &READ, &[]);
    client
}

#[test]
fn a_client_over_its_quota_delays_nobody_else_on_its_thread() {
    for quota in [bytes_per_second(1), requests_per_second(1)] {
        let server = serve(disk().client_quota(quota));
        let mut slow = Client::open(&server, ReplyMode::Extended, "slow", &[]);
        // More than the buffers of the connection hold.
        for _ in 0..1000 {
            slow.submit(
                0,
                16384,
                &Command::Write(nbd_server::export::Durability::Cached),
                &[7; 16384],
            );
        }
        let mut fast = Client::open(&server, ReplyMode::Extended, "fast", &[]);
        for _ in 0..1000 {
            assert_eq!(fast.write(4096, &[1; 4096]), Ok(()));
        }
        let entry = server.handle().exports().find("slow").unwrap().1;
        let mut written = [7; 1];
        entry.export().read_at(0, &mut written).unwrap();
        assert_eq!(written, [7], "the first one was carried out");
        assert_eq!(server.handle().clients().len(), 2);
    }
}

#[test]
fn a_request_that_waits_goes_on_when_the_quota_is_lifted() {
    let server = serve(disk().quota(bytes_per_second(1)));
    let mut client = waiting(&server);
    let entry = server.handle().exports().find("slow").unwrap().1;
    drop(entry.quota(Quota::default()));
    assert_eq!(client.next_finished().1.result, Ok(()));
}

#[test]
fn a_server_that_ends_does_not_wait_for_quotas() {
    let mut server = serve(disk().quota(bytes_per_second(1)));
    let mut client = waiting(&server);
    // Until the request has arrived.
    std::thread::sleep(Duration::from_millis(100));
    server.begin_stop();
    assert_eq!(client.next_finished().1.result, Ok(()));
    server.stop().unwrap();
}

#[test]
fn a_client_that_leaves_while_it_waits_is_let_go() {
    let server = serve(disk().quota(bytes_per_second(1 << 20)));
    let mut first = Client::open(&server, ReplyMode::Extended, "slow", &[]);
    first.read(0, 32 << 20);
    let mut second = Client::open(&server, ReplyMode::Extended, "slow", &[]);
    for _ in 0..32 {
        second.submit(0, 32 << 20, &READ, &[]);
    }
    drop(second);
    wait_until("it is gone", || server.handle().clients().len() == 1);
}

#[test]
fn a_client_that_waits_for_its_quota_does_not_stall() {
    let mut config = config();
    config.stall_timeout = Some(Duration::from_millis(100));
    let exports = ExportRegistry::new();
    exports.add("", disk().quota(requests_per_second(1))).unwrap();
    let server = TestServer::start(config, exports);
    let mut client = Client::connect(&server, ReplyMode::Extended);
    for _ in 0..3 {
        assert_eq!(client.write(0, &[1; 100_000]), Ok(()));
    }
}

/// They took the time of the server, and their payloads that of the network, as often as the client
/// liked.
#[test]
fn requests_that_are_refused_count_against_the_quota() {
    let past_the_end = header(CommandType::WRITE, 64 << 20, 4096);
    for quota in [bytes_per_second(1), requests_per_second(1)] {
        let server = serve(disk().quota(quota));
        let mut client = Client::open(&server, ReplyMode::Extended, "slow", &[]);
        for _ in 0..100 {
            client.send([client.encode(&past_the_end), vec![7; 4096]].concat());
        }
        let mut other = Client::open(&server, ReplyMode::Extended, "fast", &[]);
        assert_ne!(client.raw_reply().1, Errno(0));
        for _ in 0..100 {
            assert_eq!(other.write(0, &[1; 4096]), Ok(()));
        }
        let entry = server.handle().exports().find("slow").unwrap().1;
        let refused =
            server.handle().statistics().exports.remove("slow").unwrap().requests.errors();
        assert!((1..100).contains(&refused), "{refused} were refused at once");
        drop(entry.quota(Quota::default()));
        for _ in 1..100 {
            assert_ne!(client.raw_reply().1, Errno(0));
        }
        assert_eq!(client.write(0, &[1; 4096]), Ok(()), "the connection goes on");
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_refused_request_has_used_its_quota() {
    let server = serve(disk().quota(bytes_per_second(1)));
    let past_the_end = header(CommandType::WRITE, 64 << 20, 1 << 20);
    let mut first = Client::open(&server, ReplyMode::Extended, "slow", &[]);
    first.send([first.encode(&past_the_end), vec![7; 100]].concat());
    first.finish_sending();
    assert!(first.read_to_end().is_empty());
    wait_until("it is gone", || server.handle().clients().is_empty());
    let mut second = Client::open(&server, ReplyMode::Extended, "slow", &[]);
    second.submit(0, 1, &READ, &[]);
    let mut other = Client::open(&server, ReplyMode::Extended, "fast", &[]);
    for _ in 0..100 {
        assert_eq!(other.write(0, &[1; 4096]), Ok(()));
    }
    let statistics = server.handle().statistics().exports.remove("slow").unwrap();
    assert_eq!(statistics.requests.requests(), 0, "its request waits");
    let entry = server.handle().exports().find("slow").unwrap().1;
    drop(entry.quota(Quota::default()));
    assert_eq!(second.next_finished().1.result, Ok(()));
}
