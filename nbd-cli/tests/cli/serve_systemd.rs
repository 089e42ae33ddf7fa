//! Sockets passed by a service manager.

use std::process::Command;

use crate::support::service_manager::started_by_service_manager;
use crate::support::{Disk, PROGRAM, Server, nbd_cli};
use crate::tools;

#[test]
fn listen_fds_is_used_by_itself() {
    tools!(python = "python3");
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let mut command = started_by_service_manager(&python, &socket, "serve");
    let server = Server::start(command.arg("memory:5M"), (&socket).into());
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
