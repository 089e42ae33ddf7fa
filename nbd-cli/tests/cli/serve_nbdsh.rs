//! nbdsh as the judge of our server: requests that the other tools never send.

use std::process::Command;

use crate::support::{Disk, Server, run, tool};

/// Runs a script in nbdsh, if that is there.
fn nbdsh(server: &Server, script: &str) -> Option<String> {
    let nbdsh = tool("nbdsh")?;
    let mut command = Command::new(nbdsh);
    // Its module belongs to the system's Python, which need not be the first one.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:{path}"));
    Some(run(command.args(["-u", server.uri(), "-c", script])).success())
}

#[test]
fn errors_are_those_of_the_specification_and_the_connection_lives() {
    let disk = Disk::sparse();
    let server = Server::ours(&[disk.path()]);
    let script = r"
import errno
h.set_strict_mode(0)
def expect(name, call):
    try:
        call()
        print('nothing failed')
    except nbd.Error as error:
        assert error.errno == name, (error.errno, name)
size = h.get_size()
expect('EINVAL', lambda: h.pread(512, size))
expect('ENOSPC', lambda: h.pwrite(b'x' * 512, size - 100))
expect('EINVAL', lambda: h.trim(4096, size))
assert len(h.pread(512, size - 512)) == 512
print('alive')
";
    let Some(text) = nbdsh(&server, script) else { return };
    assert_eq!(text, "alive\n");
}

#[test]
fn a_read_only_disk_refuses_all_changes() {
    let server = Server::ours(&["--read-only", "memory:1M"]);
    let script = r"
h.set_strict_mode(0)
for change in [lambda: h.pwrite(b'x' * 512, 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)]:
    try:
        change()
        print('changed')
    except nbd.Error as error:
        assert error.errno == 'EPERM', error.errno
print(h.pread(4, 0))
";
    let Some(text) = nbdsh(&server, script) else { return };
    assert!(!text.contains("changed") && text.contains(r"\x00\x00\x00\x00"), "{text}");
}

#[test]
fn writes_on_one_connection_are_seen_on_another() {
    let server = Server::ours(&["memory:1M"]);
    let script = r"
other = nbd.NBD()
other.connect_uri(h.get_uri())
h.pwrite(b'shared', 1000)
assert bytes(other.pread(6, 1000)) == b'shared'
h.zero(6, 1000, nbd.CMD_FLAG_FAST_ZERO)
assert bytes(other.pread(6, 1000)) == bytes(6)
print(h.can_multi_conn())
";
    let Some(text) = nbdsh(&server, script) else { return };
    assert_eq!(text, "True\n");
}
