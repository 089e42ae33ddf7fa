//! `info --can`, `--is` and `--has`: exit 0 for yes, 2 for no, 1 for an error.

use crate::support::{Disk, Server, nbd_cli, run};
use crate::tools;

const QUESTIONS: [(&str, &str); 14] = [
    ("--is", "read-only"),
    ("--is", "rotational"),
    ("--is", "tls"),
    ("--can", "cache"),
    ("--can", "connect"),
    ("--can", "df"),
    ("--can", "fast-zero"),
    ("--can", "flush"),
    ("--can", "fua"),
    ("--can", "multi-conn"),
    ("--can", "read"),
    ("--can", "trim"),
    ("--can", "write"),
    ("--can", "zero"),
];

#[test]
fn every_answer_is_nbdinfos() {
    tools!(nbdinfo = "nbdinfo", nbdkit = "nbdkit", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let servers = [
        Server::nbdkit(&nbdkit, &["memory", "1M"]),
        Server::nbdkit(&nbdkit, &["-r", "--no-sr", "memory", "1M"]),
        Server::nbdkit(&nbdkit, &["-o", "memory", "1M"]),
        Server::qemu_nbd(&qemu_nbd, "x", &["-f", "raw", disk.path()]),
    ];
    for server in &servers {
        for (option, what) in QUESTIONS {
            let arguments = [option, what, server.uri()];
            let theirs = run(std::process::Command::new(&nbdinfo).args(arguments));
            let ours = nbd_cli(&["info", option, what, server.uri()]);
            assert_eq!(ours.code, theirs.code, "{arguments:?}");
            assert_eq!((ours.stdout.as_str(), ours.stderr.as_str()), ("", ""), "{arguments:?}");
        }
    }
}

#[test]
fn newer_properties_are_known() {
    let server = Server::ours(&["memory:1M"]);
    for (option, what, code) in [
        ("--has", "structured-reply", 0),
        ("--has", "extended-headers", 0),
        ("--can", "block-status-payload", 0),
        ("--is", "tls", 2),
    ] {
        let outcome = nbd_cli(&["info", option, what, server.uri()]);
        assert_eq!(outcome.code, Some(code), "{what}: {outcome:?}");
    }
}

#[test]
fn an_unknown_property_is_an_error() {
    let server = Server::ours(&["memory:1M"]);
    assert_eq!(nbd_cli(&["info", "--can", "fly", server.uri()]).code, Some(1));
    assert_eq!(nbd_cli(&["info", "--can", "connect", &server.uri_of("x")]).code, Some(1));
}
