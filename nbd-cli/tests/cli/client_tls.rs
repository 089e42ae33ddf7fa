//! The client commands over TLS, with peers and our own server.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::support::tls::credentials::add_psk_user;
use crate::support::tls::{Certificates, TlsServer};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

/// The URI with TLS instead of the one without.
fn secure(server: &Server) -> String {
    server.uri().replacen("nbd+unix", "nbds+unix", 1)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

/// A file with keys for alice and bob.
fn keys(disk: &Disk) -> PathBuf {
    let file = PathBuf::from(disk.beside("keys.psk"));
    add_psk_user(&file, "alice");
    add_psk_user(&file, "bob");
    file
}

#[test]
fn every_command_works_with_certificates() {
    tools!(nbdkit = "nbdkit");
    let Some(certificates) = Certificates::any() else { return };
    let disk = Disk::sparse();
    let good = certificates.good();
    let directory = format!("--tls-certificates={}", good.display());
    let arguments = ["--tls=require", &directory, "--tls-verify-peer", "file", disk.path()];
    let server = Server::nbdkit(&nbdkit, &arguments);
    let uri = secure(&server);
    let options = [directory.as_str(), "--tls-hostname", "localhost"];
    let with = |command: &[&str]| nbd_cli(&[command, &options].concat());

    let said = with(&["info", &uri]).success();
    assert!(said.starts_with("protocol: newstyle-fixed with TLS, using "), "{said}");
    let said = with(&["info", "--json", &uri]).success();
    let json: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(json["TLS"], true);
    assert!(json["exports"][0]["uri"].as_str().expect("a URI").starts_with("nbds+unix://"));
    assert_eq!(with(&["info", "--has", "tls", &uri]).code, Some(0));
    assert_eq!(with(&["list-meta", &uri]).success(), "base:allocation\n");
    assert!(with(&["map", &uri]).success().contains("hole,zero"));
    let copy = disk.beside("copy.img");
    with(&["copy", &uri, &copy]).success();
    disk.assert_equals(copy);

    // The same, with everything in the URI.
    let all = format!("{uri}&tls-certificates={}&tls-hostname=localhost", good.display());
    assert_eq!(nbd_cli(&["info", "--size", &all]).success(), "8388608\n");
    // Without TLS in the URI, and with it on the command line.
    assert_eq!(with(&["info", "--size", "--tls", "require", server.uri()]).code, Some(0));
    says(nbd_cli(&["info", server.uri()]), &["requires TLS", "--tls-certificates"]);
    says(with(&["info", server.uri()]), &["--tls-certificates is given", "nbds"]);
    says(nbd_cli(&["info", &directory, &uri]), &["unix socket", "tls-hostname"]);
    let wrong = ["info", &directory, "--tls-hostname", "other.example", &uri];
    says(nbd_cli(&wrong), &["CN=localhost", "not for 'other.example'"]);
    let nobody = certificates.nobody();
    let none = ["info", "--tls-certificates", text(&nobody), "--tls-hostname=localhost", &uri];
    says(nbd_cli(&none), &["client-cert.pem and client-key.pem", text(&nobody)]);
}

#[test]
fn a_copy_goes_over_several_connections_to_a_writable_disk_and_back() {
    tools!(qemu_nbd = "qemu-nbd", _psktool = "psktool");
    let disk = Disk::sparse();
    let file = keys(&disk);
    let directory = Path::new(disk.path()).parent().expect("a directory").display().to_string();
    let object = format!("tls-creds-psk,id=t,endpoint=server,dir={directory}");
    let blank = disk.blank("blank.img", disk.content().len() as u64);
    let arguments = ["-f", "raw", "--object", &object, "--tls-creds", "t", &blank];
    let server = Server::qemu_nbd(&qemu_nbd, "disk", &arguments);
    let uri = secure(&server).replacen("nbds+unix:///", "nbds+unix://bob@/", 1);
    nbd_cli(&["copy", "--flush", "--tls-psk", text(&file), disk.path(), &uri]).success();
    disk.assert_equals(&blank);
    let back = disk.beside("back.img");
    nbd_cli(&["copy", "--tls-psk", text(&file), &uri, &back]).success();
    disk.assert_equals(back);

    let eve = uri.replacen("bob", "eve", 1);
    let arguments = ["info", "--tls-psk", text(&file), &eve];
    says(nbd_cli(&arguments), &["no key for the user 'eve'", "'alice', 'bob'"]);
    let nobody = uri.replacen("bob@", "", 1);
    says(nbd_cli(&["info", "--tls-psk", text(&file), &nobody]), &["say whose to use"]);
    let other = PathBuf::from(disk.beside("other.psk"));
    add_psk_user(&other, "bob");
    says(nbd_cli(&["info", "--tls-psk", text(&other), &uri]), &["another key for the user 'bob'"]);

    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("our file");
    let said = nbd_cli(&["info", "--size", "--tls-psk", text(&file), &uri]);
    assert!(said.stderr.contains("readable by every user"), "{said:?}");
    said.success();
}

#[test]
fn our_server_and_our_client_agree_with_nbdinfo() {
    tools!(nbdinfo = "nbdinfo", _psktool = "psktool");
    let Some(certificates) = Certificates::any() else { return };
    let good = certificates.good();
    let server = TlsServer::start(&["--tls-certificates", text(&good)]);
    let uri = server.uri_with(&good);
    for options in [&["--size"][..], &["--map"]] {
        let theirs = peer(&nbdinfo, &[options, &[uri.as_str()]].concat());
        let ours = match options {
            ["--map"] => nbd_cli(&["map", &uri]),
            _ => nbd_cli(&["info", "--size", &uri]),
        };
        let ours = ours.success();
        let columns = |text: &str| -> Vec<String> {
            text.split_whitespace().map(ToOwned::to_owned).collect()
        };
        assert_eq!(columns(&ours), columns(&theirs));
    }
    let copy = server.disk.beside("copy.img");
    nbd_cli(&["copy", &uri, &copy]).success();
    server.disk.assert_equals(copy);

    let raw = server.disk.beside("converted.img");
    nbd_cli(&["image", "convert", "--output-format", "raw", &uri, &raw]).success();
    server.disk.assert_equals(raw);
    // Our own refusals reach the user in words.
    let nobody = certificates.nobody();
    says(nbd_cli(&["info", &server.uri_with(&nobody)]), &["client-cert.pem", "certificate"]);
    let late = certificates.expired();
    says(nbd_cli(&["info", &server.uri_with(&late)]), &["client-cert.pem' expired on Jan 31"]);
}

#[test]
fn preferred_tls_is_used_where_it_is_and_only_said_to_be_missing_elsewhere() {
    tools!(nbdkit = "nbdkit", _psktool = "psktool");
    let disk = Disk::sparse();
    let file = keys(&disk);
    let psk = format!("--tls-psk={}", file.display());
    for (server, text) in [("--tls=on", "with TLS"), ("--tls=off", "without TLS")] {
        let server = Server::nbdkit(&nbdkit, &[server, &psk, "file", disk.path()]);
        let uri = server.uri().replacen("nbd+unix:///", "nbd+unix://alice@/", 1);
        let said = nbd_cli(&["info", "--tls", "prefer", &psk, &uri]).success();
        assert!(said.starts_with(&format!("protocol: newstyle-fixed {text}")), "{said}");
        let required = nbd_cli(&["info", "--tls", "require", &psk, &uri]);
        match text {
            "with TLS" => assert_eq!(required.code, Some(0), "{required:?}"),
            _ => says(required, &["refused TLS", "TLS is required"]),
        }
    }
}
