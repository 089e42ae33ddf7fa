//! The status page of `serve --metrics`, and the numbers behind it.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::http::get;
use crate::support::{Disk, Server, nbd_cli, run};
use crate::tools;

/// The bytes of each kind, as `map --totals` tells.
fn totals(uri: &str, kind: &str) -> u64 {
    let totals = nbd_cli(&["map", "--totals", "--json", uri]).success();
    let totals: Vec<Value> = serde_json::from_str(&totals).expect("JSON");
    let found = totals.iter().find(|total| total["description"] == kind);
    found.map_or(0, |total| total["size"].as_u64().expect("a number"))
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn the_picture_of_a_disk_is_what_map_says_cell_by_cell() {
    let disk = Disk::sparse();
    let socket = disk.beside("metrics");
    let server = Server::ours(&["--metrics", &format!("unix:{socket}"), disk.path()]);
    let answer = parsed(&get(Path::new(&socket), "/map.json?export="));
    let map = &answer["map"];
    let cell = map["cell-length"].as_u64().expect("a length");
    assert_eq!(map["size"], disk.content().len());
    let extents = nbd_cli(&["map", "--json", server.uri()]).success();
    let extents: Vec<Value> = serde_json::from_str(&extents).expect("JSON");
    let number = |value: &Value| value.as_u64().expect("a number");
    for (kind, name) in [(0, "data"), (1, "hole"), (2, "zero"), (3, "hole-zero")] {
        let cells = map["allocation"][name].as_array().expect("cells");
        for (index, found) in (0..).zip(cells) {
            let (start, end) = (index * cell, (index + 1) * cell);
            let expected: u64 = extents
                .iter()
                .filter(|extent| extent["type"] == kind)
                .map(|extent| {
                    let offset = number(&extent["offset"]);
                    let stop = offset + number(&extent["length"]);
                    stop.min(end).saturating_sub(offset.max(start))
                })
                .sum();
            assert_eq!(number(found), expected, "{name} in cell {index}");
        }
    }
    server.end();
}

#[test]
fn the_numbers_of_exports_and_clients_are_those_of_the_load() {
    let disk = Disk::sparse();
    let socket = disk.beside("metrics");
    let server = Server::ours(&["--metrics", &format!("unix:{socket}"), "m=memory:1M"]);
    let uri = server.uri_of("m");
    nbd_cli(&["bench", "--requests", "400", "-b", "4K", &uri]).success();
    let mut status = parsed(&get(Path::new(&socket), "/status.json"));
    while status["clients"] != serde_json::json!([]) {
        // The client has ended; the server may not have noticed yet.
        std::thread::sleep(std::time::Duration::from_millis(10));
        status = parsed(&get(Path::new(&socket), "/status.json"));
    }
    let export = &status["exports"][0];
    assert_eq!((&export["name"], &export["size"]), (&"m".into(), &1_048_576.into()));
    let read = &export["commands"]["read"];
    assert_eq!((&read["requests"], &read["errors"]), (&400.into(), &0.into()), "{read}");
    assert_eq!(read["bytes"], 400 * 4096);
    let sum = |value: &Value| -> u64 {
        value.as_array().expect("a list").iter().filter_map(Value::as_u64).sum()
    };
    assert_eq!(sum(&read["latency"]), 400);
    assert_eq!(sum(&export["activity"]["read"]), 400 * 4096);
    assert_eq!(sum(&export["activity"]["written"]), 0);
    server.end();
}

#[test]
fn a_browser_shows_the_numbers_of_map() {
    tools!(chromium = "chromium");
    let disk = Disk::sparse();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port().to_string();
    drop(listener);
    let name = "<b>disk<i>\u{202e}x";
    let source = format!("{name}={}", disk.path());
    let server = Server::ours(&["--metrics", &port, &source]);
    let mut browser = Command::new(chromium);
    browser.args(["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]);
    browser.arg(format!("--user-data-dir={}", disk.beside("browser"))).arg("--dump-dom");
    browser.arg(format!("http://127.0.0.1:{port}/"));
    let page = run(&mut browser).success();
    assert!(page.contains("&lt;b&gt;disk&lt;i&gt;\\u{202e}x</h2>"), "a name is text: {page}");
    for (class, kind) in [("data", "data"), ("hole-zero", "hole,zero")] {
        let cell = format!("data-class=\"{class}\" data-bytes=\"");
        let (_, rest) = page.split_once(&cell).unwrap_or_else(|| panic!("no {class} in {page}"));
        let bytes = rest.split('"').next().and_then(|bytes| bytes.parse::<u64>().ok());
        assert_eq!(
            bytes,
            Some(totals(&server.uri_of("%3Cb%3Edisk%3Ci%3E%E2%80%AEx"), kind)),
            "{class}"
        );
    }
    for part in
        ["<html lang=\"en\">", "<main>", "role=\"status\"", "aria-label=\"Disk of 8.0 MiB: "]
    {
        assert!(page.contains(part), "no {part} in {page}");
    }
    server.end();
}

#[test]
fn the_page_refers_to_nothing_elsewhere() {
    let page = include_str!("../../jobs/src/monitor/page.html");
    for outside in ["http://", "https://", "//cdn", "@import", "src="] {
        let found: Vec<_> = page.lines().filter(|line| line.contains(outside)).collect();
        let allowed = |line: &&str| line.contains("http://www.w3.org/2000/svg");
        assert!(found.iter().all(allowed), "{outside}: {found:?}");
    }
    // Names come from users: they never become markup.
    assert!(!page.contains("innerHTML"));
}
