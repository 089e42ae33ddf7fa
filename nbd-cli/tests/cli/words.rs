//! Messages for common mistakes.

use std::io::{BufRead as _, Write as _};
use std::os::unix::net::UnixListener;

use crate::support::{Disk, Server, nbd_cli, says};

#[test]
fn a_name_that_speaks_of_another_format_is_remarked_on() {
    let disk = Disk::sparse();
    let image = disk.beside("x.qcow2");
    let made = nbd_cli(&["image", "create", &image, "1M"]);
    assert!(made.stderr.contains("becomes a raw image"), "{made:?}");
    made.success();
    std::fs::remove_file(&image).expect("it was made");
    let made = nbd_cli(&["image", "create", "-f", "qcow2", &image, "1M"]);
    assert!(made.stderr.is_empty(), "{made:?}");
    made.success();
    let converted = nbd_cli(&["image", "convert", &image, &disk.beside("y.vmdk")]);
    assert!(converted.stderr.contains("add --output-format vmdk"), "{converted:?}");
    converted.success();
    let converted = nbd_cli(&["image", "convert", &image, &disk.beside("y.qed")]);
    assert!(converted.stderr.contains("choose a name"), "{converted:?}");
    converted.success();
    let converted = nbd_cli(&["image", "convert", &image, &disk.beside("z.QCOW2")]);
    assert!(converted.stderr.contains("add --output-format qcow2"), "{converted:?}");
    converted.success();
    let restored = nbd_cli(&["restore", "-q", &image, &disk.beside("w.qcow2")]);
    assert!(restored.stderr.contains("add --output-format qcow2"), "{restored:?}");
    restored.success();
}

#[test]
fn an_export_is_not_copied_to_itself() {
    let disk = Disk::sparse();
    let server = Server::ours(&["--format", "raw", disk.path()]);
    says(nbd_cli(&["copy", server.uri(), server.uri()]), &["is the source and the destination"]);
    let convert = ["image", "convert", "-n", "-O", "raw", server.uri(), server.uri()];
    says(nbd_cli(&convert), &["is the source and the destination"]);
}

#[test]
fn an_image_is_not_converted_to_itself() {
    let disk = Disk::sparse();
    let overlay = disk.beside("overlay.qcow2");
    let create = ["image", "create", "-f", "qcow2", "-F", "raw", "-b", disk.path(), &overlay];
    nbd_cli(&create).success();
    for (from, to) in [(disk.path(), disk.path()), (&overlay, &overlay), (&overlay, disk.path())] {
        for options in [&["-O", "raw"][..], &["-O", "raw", "-n"]] {
            let outcome = nbd_cli(&[&["image", "convert"], options, &[from, to]].concat());
            let said = &outcome.stderr;
            assert!(said.contains("shares its data with the source"), "{options:?}: {outcome:?}");
            // That advice would lose the disk, and that program is not there.
            assert!(!said.contains("remove it") && !said.contains("another program"), "{said}");
            assert_eq!(outcome.code, Some(1), "{outcome:?}");
        }
    }
}

#[test]
fn the_option_for_ports_of_others_leads_to_ours() {
    let outcome = nbd_cli(&["serve", "--port", "10901", "memory:1M"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("--listen 127.0.0.1:10901"), "{outcome:?}");
}

#[test]
fn a_socket_for_nbd_clients_is_not_taken_for_a_control_socket() {
    let server = Server::ours(&["memory:1M"]);
    let socket = server.socket().to_str().expect("a plain name").to_owned();
    says(nbd_cli(&["control", &socket, "list"]), &["a socket for NBD clients", "--control"]);
}

#[test]
fn servers_of_other_protocols_are_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    for (greeting, words) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "it speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it speaks SSH"),
    ] {
        let answer = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().expect("a client");
                let _ = stream.write_all(greeting);
            });
            nbd_cli(&["info", &uri])
        });
        says(answer, &["not an NBD server", words]);
    }
}

#[test]
fn what_is_wrong_with_a_request_is_said_in_a_sentence() {
    let directory = tempfile::tempdir().expect("a directory");
    let control = directory.path().join("control");
    let control_text = control.to_str().expect("a plain name");
    let _server = Server::ours(&["--control", control_text, "memory:1M"]);
    let stream = std::os::unix::net::UnixStream::connect(&control).expect("it listens");
    let mut stream = std::io::BufReader::new(stream);
    for (request, words) in [
        (r#"{"command":"nope"}"#, "there is no command 'nope'; there are 'list',"),
        ("list", "a request is one line of JSON, and this is not JSON"),
        (r#"{"command":"remove-export"}"#, r#"the command 'remove-export' needs \"name\""#),
    ] {
        writeln!(stream.get_mut(), "{request}").expect("it reads");
        let mut reply = String::new();
        stream.read_line(&mut reply).expect("it answers");
        assert!(reply.contains(words) && !reply.contains("column"), "{reply}");
    }
}

#[test]
fn the_values_of_questions_are_listed_once() {
    let help = nbd_cli(&["info", "--help"]);
    let count = help.stdout.matches("extended-headers").count();
    assert_eq!(count, 1, "{help:?}");
}
