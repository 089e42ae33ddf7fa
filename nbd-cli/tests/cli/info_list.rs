//! `info --list` and `info --size`.

use crate::support::{Server, nbd_cli};
use crate::tools;

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

#[test]
fn an_export_that_the_server_refuses_does_not_hide_the_others() {
    tools!(nbdkit = "nbdkit", nbdinfo = "nbdinfo");
    let list = "list_exports=printf 'NAMES\\ngood\\nbad\\nfine\\n'";
    let open = "open=if [ \"$3\" = bad ]; then echo 'ENOENT no such disk' >&2; exit 1; fi";
    let zeroes = "pread=head -c $3 /dev/zero";
    let server = Server::nbdkit(&nbdkit, &["eval", list, open, "get_size=echo 1048576", zeroes]);
    let uri = server.uri();
    for arguments in [&["--list", uri][..], &["--list", "--json", uri]] {
        let theirs = crate::support::run(std::process::Command::new(&nbdinfo).args(arguments));
        let ours = nbd_cli(&[&["info"], arguments].concat());
        assert_eq!((ours.code, theirs.code), (Some(1), Some(1)), "{ours:?} {theirs:?}");
        for outcome in [&ours, &theirs] {
            assert!(outcome.stdout.contains("\"good\""), "{outcome:?}");
            assert!(outcome.stdout.contains("\"fine\""), "{outcome:?}");
            assert!(!outcome.stdout.contains("\"bad\""), "{outcome:?}");
        }
        assert!(ours.stderr.contains("the export 'bad' is refused"), "{ours:?}");
    }
}
