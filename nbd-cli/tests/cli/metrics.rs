//! `serve --metrics`: the metrics and the bounds of their server.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::http::{exchange, get, get_from};
use crate::support::{Disk, Server, nbd_cli, run, says};

/// What Prometheus' parser for Python makes of a text: a list of name, labels and value.
fn parsed(directory: &Disk, text: &str) -> Option<Vec<(String, Value, f64)>> {
    const SCRIPT: &str = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families as families
text = open(sys.argv[1]).read()
samples = [s for family in families(text) for s in family.samples]
print(json.dumps([[s.name, s.labels, s.value] for s in samples]))
";
    // That of the system: the module is one of its packages.
    let python = Path::new("/usr/bin/python3");
    let module = Path::new("/usr/lib/python3/dist-packages/prometheus_client/parser.py");
    if !python.is_file() || !module.is_file() {
        assert!(std::env::var_os("CI").is_none(), "python3-prometheus-client is not installed");
        eprintln!("skipped: python3-prometheus-client is not installed");
        return None;
    }
    let file = directory.beside("metrics.txt");
    std::fs::write(&file, text).expect("a file");
    let output = run(Command::new(python).args(["-c", SCRIPT, &file])).success();
    Some(serde_json::from_str(&output).expect("JSON"))
}

#[test]
fn a_scraper_reads_what_a_counted_load_did() {
    let disk = Disk::sparse();
    let socket = disk.beside("metrics");
    let address = format!("unix:{socket}");
    let source = format!("a\"b\\c={}", disk.path());
    let server = Server::ours(&["--metrics", &address, &source, "memory=memory:1M"]);
    let uri = server.uri_of("memory");
    let load =
        ["bench", "-w", "write", "--destroy-data", "--requests", "500", "--json", &uri, "-b", "4K"];
    let report = nbd_cli(&load).json();
    let load = ["bench", "--requests", "300", "--json", &uri, "-b", "512"];
    nbd_cli(&load).success();
    let Some(samples) = parsed(&disk, &get(Path::new(&socket), "/metrics")) else { return };
    let value = |name: &str, labels: Value| {
        let found = samples.iter().find(|(found, of, _)| found == name && *of == labels);
        found.unwrap_or_else(|| panic!("no {name}{labels} in {samples:?}")).2
    };
    let write = || json!({"export": "memory", "command": "write"});
    let read = || json!({"export": "memory", "command": "read"});
    assert_eq!(report["requests"], 500, "{report}");
    assert_eq!(value("nbd_requests_total", write()), 500.0);
    assert_eq!(value("nbd_request_bytes_total", write()), 500.0 * 4096.0);
    assert_eq!(value("nbd_request_errors_total", write()), 0.0);
    assert_eq!(value("nbd_requests_total", read()), 300.0);
    assert_eq!(value("nbd_request_bytes_total", read()), 300.0 * 512.0);
    assert_eq!(value("nbd_request_duration_seconds_count", read()), 300.0);
    let mut infinite = read();
    infinite["le"] = "+Inf".into();
    assert_eq!(value("nbd_request_duration_seconds_bucket", infinite), 300.0);
    let mean = value("nbd_request_duration_seconds_sum", read()) / 300.0;
    assert!(mean > 0.0 && mean < 60.0, "{mean}");
    assert_eq!(value("nbd_ring_requests_total", json!({"command": "write"})), 0.0, "no file");
    assert_eq!(value("nbd_ring_waits_total", json!({"kind": "poll"})), 0.0, "no file");
    assert_eq!(value("nbd_export_clients", json!({"export": "memory"})), 0.0);
    assert!(value("nbd_export_clients_total", json!({"export": "memory"})) >= 2.0);
    assert_eq!(value("nbd_export_size_bytes", json!({"export": "memory"})), 1048576.0);
    // The names are as they were given, and the disk is as `map` says.
    let named = |kind: &str| json!({"export": "a\"b\\c", "kind": kind});
    let totals = nbd_cli(&["map", "--totals", "--json", &server.uri_of("a\"b\\c")]).success();
    let totals: Vec<Value> = serde_json::from_str(&totals).expect("JSON");
    for total in totals {
        let kind = total["description"].as_str().expect("a name");
        let found = value("nbd_export_allocation_bytes", named(kind));
        assert_eq!(found, total["size"].as_f64().expect("a number"), "{kind}");
    }
    server.end();
    assert!(!Path::new(&socket).exists(), "its socket is removed");
}

#[test]
fn only_what_is_there_is_answered_and_only_to_pages_of_this_machine() {
    let disk = Disk::sparse();
    let socket = disk.beside("metrics");
    let server = Server::ours(&["--metrics", &format!("unix:{socket}"), disk.path()]);
    let socket = Path::new(&socket);
    assert_eq!(get(socket, "/healthz"), "ok\n");
    for (path, status) in [("/nothing", 404), ("/map.json?export=x", 404), ("/metrics/", 404)] {
        assert_eq!(get_from(socket, path, "localhost").status, status, "{path}");
    }
    let post = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    assert!(exchange(socket, post).starts_with("HTTP/1.1 405 "));
    let head = b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let head = exchange(socket, head);
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(head.to_lowercase().contains("content-security-policy: default-src 'none'"), "{head}");
    let long = format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    assert!(!exchange(socket, long.as_bytes()).starts_with("HTTP/1.1 200"));
    assert!(!exchange(socket, b"\x16\x03\x01nonsense\r\n\r\n").starts_with("HTTP/1.1 200"));
    // Clients that are silent leave places to others.
    let silent: Vec<_> =
        (0..20).map(|_| UnixStream::connect(socket).expect("it listens")).collect();
    assert_eq!(get(socket, "/healthz"), "ok\n");
    drop(silent);
    server.end();
}

#[test]
fn a_name_that_points_at_this_machine_is_not_answered() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    drop(listener);
    let server = Server::ours(&["--metrics", &port.to_string(), "memory:1M"]);
    let status = |host: &str| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        let text = format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).expect("it is read");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("a reply");
        reply.split(' ').nth(1).expect("a status").to_owned()
    };
    for host in ["localhost", "LOCALHOST:1", &format!("127.0.0.1:{port}"), "[::1]:80"] {
        assert_eq!(status(host), "200", "{host}");
    }
    for host in ["evil.example", "evil.example:9810", "localhost.evil.example"] {
        assert_eq!(status(host), "421", "{host}");
    }
    server.end();
}

#[test]
fn an_address_that_cannot_be_used_is_named() {
    let says_of = |address: &str, parts: &[&str]| {
        says(nbd_cli(&["serve", "--metrics", address, "--listen", ":0", "memory:1M"]), parts);
    };
    says_of("unix:/nowhere/metrics", &["/nowhere/metrics", "--metrics"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    says_of(&address, &[&address, "another program listens there"]);
}
