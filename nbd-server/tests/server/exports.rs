//! Several exports in one server.

use std::sync::Arc;

use nbd_proto::handshake::ListedExport;
use nbd_proto::wire::{OptionReplyType, ReplyMode, TransmissionFlags};
use nbd_server::export::{Durability, Export, ExportEntry, MemoryExport};
use nbd_server::{ExportRegistry, ServerConfig};

use crate::support::{Client, MODES, TestServer};

fn disk(byte: u8, size: u64) -> ExportEntry {
    let disk = MemoryExport::new(size);
    disk.write_at(0, &[byte], Durability::Cached).unwrap();
    ExportEntry::new(Arc::new(disk))
}

fn server() -> (TestServer, ExportRegistry) {
    let exports = ExportRegistry::new();
    exports.add("alpha", disk(1, 4096).description("the first disk")).unwrap();
    exports.add("beta/β %", disk(2, 8192)).unwrap();
    exports.add("secret", disk(3, 512).hidden().description("not for everyone")).unwrap();
    exports.set_default("alpha");
    (TestServer::start(ServerConfig::default(), exports.clone()), exports)
}

#[test]
fn each_name_leads_to_its_disk_and_no_name_to_the_default() {
    let (server, _) = server();
    for (name, byte, size) in
        [("alpha", 1, 4096), ("beta/β %", 2, 8192), ("secret", 3, 512), ("", 1, 4096)]
    {
        for mode in MODES {
            let mut client = Client::open(&server, mode, name, &[]);
            assert_eq!(client.negotiated.size, size);
            assert_eq!(client.read(0, 1), [byte], "{name}");
        }
    }
}

#[test]
fn names_and_descriptions_are_told_and_hidden_exports_not_listed() {
    let (server, _) = server();
    let listed = |name: &str, description: &str| ListedExport::new(name, description);
    assert_eq!(Client::list(&server), [listed("alpha", "the first disk"), listed("beta/β %", "")]);
    let default = Client::info(&server, "").unwrap();
    assert_eq!(default.canonical_name.as_deref(), Some("alpha"));
    assert_eq!(default.description.as_deref(), Some("the first disk"));
    let hidden = Client::info(&server, "secret").unwrap();
    assert_eq!((hidden.size, hidden.description.as_deref()), (512, Some("not for everyone")));
}

#[test]
fn an_unknown_name_is_refused_and_says_so() {
    let (server, _) = server();
    for name in ["gamma", "Alpha", "alpha ", "/alpha"] {
        let error = Client::info(&server, name).unwrap_err();
        assert_eq!(error.reply, OptionReplyType::ERR_UNKNOWN, "{name}");
        assert!(!error.message.is_empty());
    }
}

#[test]
fn exports_come_and_go_while_clients_are_connected() {
    // Often: a client that was told yes a moment ago has its export as well.
    for _ in 0..50 {
        let (server, exports) = server();
        let mut client = Client::open(&server, ReplyMode::Extended, "alpha", &[]);
        assert!(exports.remove("alpha").is_some());
        exports.add("gamma", disk(4, 1024)).unwrap();
        assert!(Client::info(&server, "alpha").is_err());
        assert_eq!(Client::open(&server, ReplyMode::Extended, "gamma", &[]).read(0, 1), [4]);
        assert_eq!(client.read(0, 1), [1], "who has it keeps it");
    }
}

#[test]
fn flags_that_need_chunks_are_told_only_where_there_are_chunks() {
    let (server, _) = server();
    let flags = |mode| Client::open(&server, mode, "alpha", &[]).negotiated.flags;
    assert!(!flags(ReplyMode::Simple).contains(TransmissionFlags::SEND_DF));
    assert!(flags(ReplyMode::Structured).contains(TransmissionFlags::SEND_DF));
    assert!(flags(ReplyMode::Extended).contains(TransmissionFlags::SEND_DF));
    for mode in MODES {
        let all = TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::CAN_MULTI_CONN;
        assert!(flags(mode).contains(all), "{mode:?}");
    }
}

#[test]
fn a_server_told_to_behave_like_an_older_one_does() {
    for (best, other) in
        [(ReplyMode::Simple, ReplyMode::Structured), (ReplyMode::Structured, ReplyMode::Extended)]
    {
        let mut config = ServerConfig::default();
        config.best_reply_mode = best;
        let server = TestServer::with(config, Arc::new(MemoryExport::new(4096)));
        assert_eq!(Client::connect(&server, best).read(0, 1), [0]);
        assert!(Client::refuses_mode(&server, other));
    }
}
