//! Sockets passed in systemd's way.

use std::path::Path;
use std::process::Command;

use super::PROGRAM;

/// Listens, then becomes the program.
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

/// The program under test with this sub-command, started by a service manager that listens on
/// `socket`.
pub(crate) fn started_by_service_manager(
    python: &Path,
    socket: &str,
    sub_command: &str,
) -> Command {
    let mut command = Command::new(python);
    command.args(["-c", LAUNCHER, socket, PROGRAM, sub_command]);
    command
}
