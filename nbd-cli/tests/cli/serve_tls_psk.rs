//! Our server with pre-shared keys, judged by programs that use GnuTLS.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::support::tls::credentials::add_psk_user;
use crate::support::tls::{TlsServer, Version, compare_by_qemu_img};
use crate::support::{nbd_cli, peer, run, says};
use crate::tools;

/// A directory with a file of keys for alice and for bob.
fn keys() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("keys.psk");
    add_psk_user(&file, "alice");
    add_psk_user(&file, "bob");
    (directory, file)
}

#[test]
fn every_client_reads_the_disk_over_every_version() {
    tools!(nbdinfo = "nbdinfo", nbdcopy = "nbdcopy", qemu_img = "qemu-img", _psktool = "psktool");
    let (directory, file) = keys();
    let server = TlsServer::start(&["--tls-psk", file.to_str().expect("a plain name")]);
    let disk = &server.disk;
    for version in Version::ALL {
        for user in ["alice", "bob"] {
            let uri = server.uri_of_user(user, &file);
            let size = version.hold(disk, Command::new(&nbdinfo).args(["--size", &uri]));
            assert_eq!(size.success().trim(), "8388608", "{user}, {version:?}");
            server.expect_log(&[&format!("\"{user}\""), version.in_log()]);
        }
        let copy = disk.beside("copy.img");
        version.hold(disk, Command::new(&nbdcopy).args([server.server.uri(), &copy])).success();
        disk.assert_equals(copy);
        let dir = directory.path().display();
        let priority = version.priority();
        let credentials = format!("dir={dir},username=alice,priority={priority}");
        compare_by_qemu_img(&qemu_img, &server, &credentials, "").success();
    }
    // What the slowest cipher would cost a client with default settings, the server's order saves.
    server.expect_log(&["TLSv1.3", "TLS_AES_128_GCM_SHA256"]);
    server.expect_log(&["TLSv1.2", "AES128-GCM"]);
}

#[test]
fn a_wrong_key_and_an_unknown_user_are_refused_alike_and_the_log_tells_them_apart() {
    tools!(nbdinfo = "nbdinfo", _psktool = "psktool");
    let (_directory, file) = keys();
    let server = TlsServer::start(&["--tls-psk", file.to_str().expect("a plain name")]);
    let other = file.with_file_name("other.psk");
    add_psk_user(&other, "alice");
    add_psk_user(&other, "eve");
    for version in Version::ALL {
        let try_as = |user| {
            let uri = server.uri_of_user(user, &other);
            let outcome = version.hold(&server.disk, Command::new(&nbdinfo).arg(uri));
            assert_eq!(outcome.code, Some(1), "{outcome:?}");
            outcome.stderr
        };
        assert_eq!(try_as("alice"), try_as("eve"), "{version:?}");
    }
    server.expect_log(&["wrong key for the user \"alice\""]);
    server.expect_log(&["there is no user \"eve\" in the key file"]);
    let plain = format!("nbd+unix:///?socket={}", server.server.socket().display());
    assert_eq!(run(Command::new(&nbdinfo).args(["--size", &plain])).code, Some(1));
}

#[test]
fn keys_are_read_again_on_sighup() {
    tools!(nbdinfo = "nbdinfo", _psktool = "psktool");
    let (_directory, file) = keys();
    let server = TlsServer::start(&["--tls-psk", file.to_str().expect("a plain name")]);
    add_psk_user(&file, "carol");
    let uri = server.uri_of_user("carol", &file);
    assert_eq!(run(Command::new(&nbdinfo).args(["--size", &uri])).code, Some(1));
    server.reload("reloaded");
    peer(&nbdinfo, &["--size", &uri]);
    server.server.end();
}

#[test]
fn where_tls_is_a_choice_some_exports_are_for_tls_only() {
    tools!(nbdinfo = "nbdinfo", _psktool = "psktool");
    let (_directory, file) = keys();
    let file = file.to_str().expect("a plain name");
    let arguments = ["--tls=allow", "--tls-only", "secret", "--tls-psk", file, "secret=memory:1M"];
    let server = crate::support::Server::ours(&[&arguments[..], &["public=memory:2M"]].concat());
    peer(&nbdinfo, &["--size", &server.uri_of("public")]);
    assert_eq!(run(Command::new(&nbdinfo).arg(server.uri_of("secret"))).code, Some(1));
    assert_eq!(peer(&nbdinfo, &["--size", server.uri()]).trim(), "1048576");
}

#[test]
fn a_key_file_that_everybody_can_read_is_used_with_a_warning() {
    tools!(_psktool = "psktool");
    let (_directory, file) = keys();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).expect("an own file");
    let server = TlsServer::start(&["--tls-psk", file.to_str().expect("a plain name")]);
    server.expect_log(&["WARN", "keys.psk", "every user", "chmod 600"]);
}

#[test]
fn options_that_do_not_fit_together_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("keys.psk");
    std::fs::write(&file, "alice:00112233445566778899aabbccddeeff\nbob:0011\n").expect("a file");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).expect("an own file");
    let file = file.to_str().expect("a plain name");
    for (arguments, parts) in [
        (&["--tls", "require"][..], &["needs credentials", "--tls-psk"][..]),
        (&["--tls-psk", "/nonexistent"], &["/nonexistent", "no such file"]),
        (&["--tls-psk", file], &["keys.psk", "line 2", "key of 2 bytes"]),
        (&["--tls-psk", file, "--tls-authz", "CN=a"], &["--tls-certificates"]),
        (&["--tls-psk", file, "--tls-only", "x"], &["--tls=allow"]),
        (&["--tls-authz", "list", "--tls-authz", "CN=a", "--tls-certificates", "."], &["one file"]),
    ] {
        says(nbd_cli(&[&["serve"], arguments, &["memory:1M"]].concat()), parts);
    }
}
