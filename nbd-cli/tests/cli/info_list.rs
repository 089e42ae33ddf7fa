//! `info --list` and `info --size`.

use crate::support::{Server, nbd_cli};

#[test]
fn all_exports_that_are_not_hidden_are_listed() {
    let server = Server::ours(&["a=memory:1M", "b=memory:2M"]);
    let text = nbd_cli(&["info", "--list", server.uri()]).success();
    assert!(text.contains("export=\"a\":\n\texport-size: 1048576 (1M)\n"), "{text}");
    assert!(text.contains("export=\"b\":\n\texport-size: 2097152 (2M)\n"), "{text}");
    assert!(!text.contains("content:"), "{text}");
    let hidden = Server::ours(&["--hidden", "a=memory:1M"]);
    let text = nbd_cli(&["info", "--list", hidden.uri()]).success();
    assert!(!text.contains("export="), "{text}");
    assert_eq!(nbd_cli(&["info", "--size", &hidden.uri_of("a")]).success(), "1048576\n");
}

#[test]
fn the_size_stands_alone() {
    let server = Server::ours(&["memory:12345"]);
    assert_eq!(nbd_cli(&["info", "--size", server.uri()]).success(), "12345\n");
}
