//! Sockets that a service manager hands over.

use std::process::Command;

use crate::support::{Disk, PROGRAM, Server, nbd_cli};
use crate::tools;

/// Listens, then becomes `nbd-cli` as systemd would start it.
const LAUNCHER: &str = r"
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(8)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ['LISTEN_FDS'] = '1'
os.environ['LISTEN_PID'] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
";

#[test]
fn listen_fds_is_used_by_itself() {
    tools!(python = "python3");
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let mut command = Command::new(python);
    command.args(["-c", LAUNCHER, &socket, PROGRAM, "serve", "memory:5M"]);
    let server = Server::start(&mut command, (&socket).into());
    assert_eq!(server.uri(), format!("nbd+unix:///?socket={socket}"));
    assert_eq!(nbd_cli(&["info", "--size", server.uri()]).success(), "5242880\n");
    server.end();
    assert!(std::path::Path::new(&socket).exists(), "the file is the service manager's");
}

#[test]
fn sockets_for_another_process_are_not_ours() {
    let mut command = Command::new(PROGRAM);
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    command.args(["serve", "--run", "echo $LISTEN_PID", "memory:1M"]);
    assert_eq!(crate::support::run(&mut command).success(), "\n");
}
