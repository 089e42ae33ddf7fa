//! Slow requests beside fast ones.

use nbd_proto::transmission::{Command, Durability, Fragmentation};

use crate::support::{Client, MODES, Script, Scripted, TestServer, wait_until};

#[test]
fn replies_leave_in_the_order_in_which_they_are_ready() {
    for mode in MODES {
        let script = Script { gated: Some(0..4096), ..Script::default() };
        let disk = Scripted::new(1 << 20, script);
        let server = TestServer::with(Default::default(), disk.clone());
        let mut client = Client::connect(&server, mode);
        let read = Command::Read(Fragmentation::Allowed);
        let slow = client.submit(0, 4096, &read, &[]);
        let slow_write = client.submit(100, 5, &Command::Write(Durability::Cached), b"after");
        wait_until("both are on their way", || disk.gate.arrived() == 2);
        for number in 0..100_u8 {
            // On the same connection, behind the slow ones.
            assert_eq!(client.write(8192, &[number; 100]), Ok(()));
            assert_eq!(client.read(8192, 100), [number; 100]);
        }
        assert_eq!(client.in_flight(), 2);
        disk.gate.open();
        let mut finished = [client.next_finished().0, client.next_finished().0];
        finished.sort_by_key(|cookie| cookie.0);
        assert_eq!(finished, [slow, slow_write]);
    }
}

#[test]
fn a_slow_connection_does_not_hold_up_the_others() {
    let script = Script { gated: Some(0..4096), ..Script::default() };
    let disk = Scripted::new(1 << 20, script);
    let mut config = nbd_server::ServerConfig::default();
    // All on one thread.
    config.workers = std::num::NonZeroUsize::MIN;
    let server = TestServer::with(config, disk.clone());
    let mut slow = Client::connect(&server, MODES[2]);
    for _ in 0..64 {
        slow.submit(0, 4096, &Command::Read(Fragmentation::Allowed), &[]);
    }
    wait_until("they hold what threads they can get", || disk.gate.arrived() >= 16);
    let mut fast = Client::connect(&server, MODES[2]);
    for _ in 0..100 {
        assert_eq!(fast.read(8192, 100), [0; 100]);
    }
    disk.gate.open();
    for _ in 0..64 {
        assert_eq!(slow.next_finished().1.result, Ok(()));
    }
}
