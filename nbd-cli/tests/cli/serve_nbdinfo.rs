//! nbdinfo as the judge of our server.

use crate::support::{Disk, Server, peer};
use crate::tools;

#[test]
fn it_finds_everything_that_an_image_can_do() {
    tools!(nbdinfo = "nbdinfo");
    let disk = Disk::sparse();
    let server = Server::ours(&["-D", "my disk", "-A", disk.path()]);
    let text = peer(&nbdinfo, &["--json", server.uri()]);
    let info: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["description"], "my disk");
    assert_eq!(export["export-size"], 8 << 20);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "qemu:allocation-depth"]));
    for key in ["can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn"] {
        assert_eq!(export[key], true, "{key}: {text}");
    }
    for key in ["can_trim", "can_zero"] {
        assert_eq!(export[key], true, "{key}: {text}");
    }
    assert_eq!(export["is_read_only"], false);
}

#[test]
fn it_lists_all_exports() {
    tools!(nbdinfo = "nbdinfo");
    let server = Server::ours(&["one=memory:1M", "two=memory:2M"]);
    let text = peer(&nbdinfo, &["--list", "--json", server.uri()]);
    let info: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
    let exports = info["exports"].as_array().expect("a list");
    let names: Vec<_> = exports.iter().map(|export| export["export-name"].clone()).collect();
    assert_eq!(names, ["one", "two"]);
}
