//! Exports that some clients may use and others may not.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nbd_proto::wire::{CommandType, Errno, OptionReplyType, ReplyMode, TransmissionFlags};
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{AccessRules, ClientRule, ExportRegistry, Quota, Server, ServerConfig};

use crate::support::{Client, TestServer, header, wait_until};

fn disk() -> ExportEntry {
    ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)))
}

fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// One export for this user, one for another, one that this user may read.
fn server() -> TestServer {
    let rules = AccessRules::new;
    let exports = ExportRegistry::new();
    let add = |name: &str, rules| exports.add(name, disk().access(rules)).unwrap();
    add("ours", rules().allow(ClientRule::User(own_user())));
    add("theirs", rules().allow(ClientRule::User(own_user() + 1)));
    add("read", rules().read_only(ClientRule::User(own_user())));
    add("network", rules().allow(ClientRule::Network("127.0.0.0/8".parse().unwrap())));
    exports.set_default("theirs");
    TestServer::start(ServerConfig::default(), exports)
}

#[test]
fn a_client_finds_the_exports_it_may_use_and_no_others() {
    let server = server();
    let listed: Vec<_> = Client::list(&server).into_iter().map(|export| export.name).collect();
    assert_eq!(listed, ["ours", "read"]);
    let unknown = Client::info(&server, "no such export").unwrap_err();
    assert_eq!(unknown.reply, OptionReplyType::ERR_UNKNOWN);
    for name in ["theirs", "network", ""] {
        let error = Client::info(&server, name).unwrap_err();
        assert_eq!(error, unknown, "it is answered like a name that does not exist");
        assert!(Client::on(server.connect(), ReplyMode::Extended, name).is_none());
    }
    assert!(Client::on(server.connect(), ReplyMode::Extended, "ours").is_some());
}

#[test]
fn a_client_that_may_only_read_is_told_so_and_cannot_write() {
    let server = server();
    let mut reader = Client::open(&server, ReplyMode::Extended, "read", &[]);
    assert!(reader.negotiated.flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(reader.read(0, 4), [0; 4]);
    assert_eq!(reader.raw(&header(CommandType::WRITE, 0, 512), &[1; 512]), Errno::EPERM);
    assert_eq!(reader.read(0, 4), [0; 4]);
    let mut writer = Client::open(&server, ReplyMode::Extended, "ours", &[]);
    assert_eq!(writer.write(0, &[1; 512]), Ok(()));
}

#[test]
fn addresses_of_tcp_clients_are_looked_at() {
    use std::io::{Read as _, Write as _};
    let exports = ExportRegistry::new();
    let network = |text: &str| ClientRule::Network(text.parse().unwrap());
    exports.add("here", disk().access(AccessRules::new().allow(network("127.0.0.1")))).unwrap();
    exports.add("there", disk().access(AccessRules::new().allow(network("192.0.2.0/24")))).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    let address = nbd_server::ListenAddress::Tcp("127.0.0.1:0".into());
    let bound = runtime.block_on(server.listen(&address)).unwrap();
    let nbd_server::BoundAddress::Tcp(address) = bound[0] else { panic!("{bound:?}") };
    let _context = runtime.enter();
    let _server = server.start();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let mut list = vec![0, 0, 0, 3];
    list.extend_from_slice(b"IHAVEOPT\0\0\0\x03\0\0\0\0IHAVEOPT\0\0\0\x02\0\0\0\0");
    stream.write_all(&list).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let contains = |name: &[u8]| answer.windows(name.len()).any(|window| window == name);
    assert!(contains(b"here") && !contains(b"there"), "{answer:x?}");
}

#[test]
fn one_client_more_than_the_quota_is_refused_and_let_in_when_another_has_left() {
    let mut quota = Quota::default();
    quota.connections = 2.try_into().ok();
    let exports = ExportRegistry::new();
    exports.add("disk", disk().client_quota(quota)).unwrap();
    exports.add("other", disk()).unwrap();
    let server = TestServer::start(ServerConfig::default(), exports);
    let connect = |name| Client::on(server.connect(), ReplyMode::Extended, name);
    let _first = connect("disk").unwrap();
    let second = connect("disk").unwrap();
    assert!(connect("disk").is_none());
    assert!(connect("other").is_some(), "each export has its own quota");
    assert!(Client::info(&server, "disk").is_ok(), "asking takes no place");
    drop(second);
    wait_until("the place is free", || connect("disk").is_some());
}

#[test]
fn a_client_of_a_socket_pair_has_a_user() {
    let exports = ExportRegistry::new();
    let rules = AccessRules::new().allow(ClientRule::User(own_user()));
    exports.add("", disk().access(rules)).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let _context = runtime.enter();
    let server = Server::new(ServerConfig::default(), exports).start();
    let (ours, theirs) = UnixStream::pair().unwrap();
    runtime.block_on(server.serve_connection(theirs)).unwrap();
    assert!(Client::on(ours, ReplyMode::Extended, "").is_some());
}
