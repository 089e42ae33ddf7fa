//! `info` of servers with older protocols.

use crate::support::{Server, nbd_cli};
use crate::tools;

#[test]
fn the_protocol_is_named() {
    tools!(nbdkit = "nbdkit");
    for (arguments, first_line) in [
        (&["-o", "memory", "1M"][..], "protocol: oldstyle without TLS, using simple packets"),
        (
            &["--mask-handshake=0", "memory", "1M"],
            "protocol: newstyle without TLS, using simple packets",
        ),
        (
            &["--no-sr", "memory", "1M"],
            "protocol: newstyle-fixed without TLS, using simple packets",
        ),
    ] {
        let server = Server::nbdkit(&nbdkit, arguments);
        let text = nbd_cli(&["info", server.uri()]).success();
        assert_eq!(text.lines().next(), Some(first_line), "{arguments:?}");
        assert!(text.contains("export-size: 1048576 (1M)"), "{arguments:?}: {text}");
    }
}
