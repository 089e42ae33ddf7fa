//! Clients that owe something and do nothing about it, under TLS.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::tls::TlsMode;
use nbd_server::{ExportRegistry, ServerConfig};
use openssl::ssl::SslVersion;

use super::client::{Session, keyed, request, rest};
use super::{ALICES_KEY, DISK_LEN, psk};
use crate::support::{TestServer, wait_until};

#[test]
fn who_stalls_is_closed_and_who_is_slow_is_served() {
    let limit = Duration::from_millis(800);
    let (_directory, credentials) = psk();
    let mut config = ServerConfig::default();
    config.tls = TlsMode::Require(credentials);
    config.stall_timeout = Some(limit);
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(DISK_LEN)))).unwrap();
    let server = TestServer::start(config, exports);
    let open = || Session::open(&server, keyed("alice", ALICES_KEY, SslVersion::TLS1_3)).0;

    let mut slow = open();
    slow.write_all(&request(0, 7, 0, 16 << 20)).unwrap();
    let (mut stalled, mut greedy) = (open(), open());
    stalled.write_all(&request(1, 7, 0, 1 << 20)).unwrap();
    stalled.write_all(&[0x55; 100_000]).unwrap();
    greedy.write_all(&request(0, 7, 0, 16 << 20)).unwrap();
    // Less than what has to leave the socket before there is room in it again.
    for _ in 0..24 {
        slow.read_exact(&mut [0; 16 << 10]).unwrap();
        std::thread::sleep(limit / 8);
    }
    assert_eq!(rest(stalled.get_mut()).len(), 0);
    wait_until("both others are gone", || server.handle().clients().len() == 1);
    slow.read_exact(&mut vec![0; (16 << 20) + 16 - 24 * (16 << 10)]).unwrap();
}
