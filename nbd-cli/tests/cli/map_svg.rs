//! `map --svg`.

use std::process::Command;

use crate::support::{Disk, Server, is_sparse_here, nbd_cli, run, says};
use crate::tools;

/// Prints the facts of a picture as an XML parser finds them.
const FACTS: &str = r#"
import sys, xml.etree.ElementTree as tree
root = tree.parse(sys.argv[1]).getroot()
svg = "{http://www.w3.org/2000/svg}"
ids = {node.get("id"): node.text for node in root if node.get("id")}
print(root.tag == svg + "svg", root.get("role"))
for id in root.get("aria-labelledby").split():
    print(ids[id])
for path in root.iter(svg + "path"):
    print(path.get("class"), path.get("d").count("M"))
print(*[node.text for node in root.iter(svg + "text") if ": " in node.text], sep="\n")
print("dark" in root.find(svg + "style").text)
"#;

#[test]
fn the_picture_is_well_formed_and_says_what_map_says() {
    tools!(python = "python3");
    let disk = Disk::sparse();
    if is_sparse_here(&disk).is_none() {
        return;
    }
    let server = Server::ours(&[&format!("<a&b>={}", disk.path())]);
    let (uri, picture) = (server.uri_of("%3Ca&b%3E"), disk.beside("disk.svg"));
    nbd_cli(&["map", "--svg", &picture, &uri]).success();
    let facts = run(Command::new(&python).args(["-c", FACTS, &picture])).success();
    let facts: Vec<_> = facts.lines().collect();
    assert_eq!(facts[0], "True img");
    assert!(facts[1].ends_with("(base:allocation)") && facts[1].contains("a%26b"), "{facts:?}");
    let described =
        "Disk of 8.0 MiB: data 1.1 MiB (13.3 %), hole, reads as zero 6.9 MiB (86.7 %). ";
    assert!(facts[2].starts_with(described), "{facts:?}");
    // The chart has 64 cells in a row and 16 rows: 8K in each.
    let cells = |class: &str| {
        let fact = facts.iter().find_map(|fact| fact.strip_prefix(class)?.strip_prefix(' '));
        fact.and_then(|count| count.parse::<usize>().ok())
    };
    let (data, hole) = (cells("data").expect("data"), cells("hole-zero").expect("holes"));
    assert!(data >= 136 && (1024..1040).contains(&(data + hole)), "{facts:?}");
    assert!(facts.contains(&"data: 1.1 MiB (13.3 %)"), "{facts:?}");
    assert_eq!(facts.last(), Some(&"True"));
    let printed = nbd_cli(&["map", "--svg", "-", &uri]).success();
    assert_eq!(std::fs::read_to_string(&picture).expect("a file"), printed);
    server.end();
    // What is shown of an image is what belongs to it.
    let image = nbd_cli(&["image", "map", "--svg", "-", disk.path()]).success();
    assert!(image.contains("in this layer: 1.1 MiB (13.3 %)"), "{image}");
}

#[test]
fn a_browser_draws_the_picture() {
    tools!(chromium = "chromium");
    let server = Server::ours(&["memory:1M"]);
    let disk = Disk::sparse();
    let picture = disk.beside("disk.svg");
    nbd_cli(&["map", "--svg", &picture, server.uri()]).success();
    let mut browser = Command::new(chromium);
    browser.args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]);
    browser.arg(format!("--user-data-dir={}", disk.beside("browser")));
    let page = run(browser.arg(format!("file://{picture}"))).success();
    assert!(!page.contains("parsererror"), "{page}");
    assert!(page.contains("hole, reads as zero: 1.0 MiB (100.0 %)"), "{page}");
}

#[test]
fn only_a_picture_is_replaced() {
    let server = Server::ours(&["memory:1M"]);
    let disk = Disk::sparse();
    let found = std::fs::read(disk.path()).expect("a file");
    let refused = nbd_cli(&["map", "--svg", disk.path(), server.uri()]);
    says(refused, &[disk.path(), "exists and is not a picture"]);
    assert!(found == std::fs::read(disk.path()).expect("a file"));
    let picture = disk.beside("disk.svg");
    for _ in 0..2 {
        nbd_cli(&["map", "--svg", &picture, server.uri()]).success();
    }
    // A failure leaves no file behind.
    let other = disk.beside("other.svg");
    says(nbd_cli(&["image", "map", "--svg", &other, "/nowhere"]), &["/nowhere"]);
    assert!(!std::path::Path::new(&other).exists());
    let both = nbd_cli(&["map", "--svg", &other, "--chart", server.uri()]);
    assert!(both.stderr.contains("cannot be used with"), "{both:?}");
}
