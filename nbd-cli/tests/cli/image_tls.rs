//! `nbd-cli image` with exports that need TLS.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::tls::credentials::add_psk_user;
use crate::support::tls::{Certificates, TlsServer};
use crate::support::{Disk, Server, nbd_cli, peer, run, says};
use crate::tools;

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

/// The disk on a server that wants a certificate, and its URI.
fn serve_with_certificates(nbdkit: &Path, disk: &Disk, directory: &str) -> (Server, String) {
    let arguments = ["--tls=require", directory, "--tls-verify-peer", "file", disk.path()];
    let server = Server::nbdkit(nbdkit, &arguments);
    let uri = server.uri().replacen("nbd+unix", "nbds+unix", 1);
    (server, uri)
}

#[test]
fn every_image_command_that_takes_exports_takes_certificates() {
    tools!(nbdkit = "nbdkit");
    let Some(certificates) = Certificates::any() else { return };
    let disk = Disk::sparse();
    let directory = format!("--tls-certificates={}", certificates.good().display());
    let (server, uri) = serve_with_certificates(&nbdkit, &disk, &directory);
    let options = [directory.as_str(), "--tls-hostname", "localhost"];
    let with = |command: &[&str]| nbd_cli(&[&["image"], command, &options].concat());

    assert!(with(&["info", &uri]).success().contains("with TLS"));
    assert!(with(&["map", &uri]).success().contains("zero"));
    with(&["measure", "-O", "qcow2", &uri]).success();
    assert_eq!(with(&["compare", disk.path(), &uri]).success(), "the disks are the same\n");
    let copy = disk.beside("copy.img");
    with(&["convert", &uri, &copy]).success();
    disk.assert_equals(copy);

    says(nbd_cli(&["image", "info", server.uri()]), &["requires TLS", "--tls-certificates"]);
    // Credentials that nothing uses are a mistake.
    for command in [&["info", disk.path()][..], &["map", disk.path()], &["measure", "--size", "1"]]
    {
        says(with(command), &["--tls-certificates is given", "nbds"]);
    }
    assert_eq!(with(&["compare", disk.path(), disk.path()]).code, Some(2));
}

#[test]
fn servers_that_a_trusted_image_names_get_the_same_options() {
    tools!(nbdkit = "nbdkit", qemu_img = "qemu-img");
    let Some(certificates) = Certificates::any() else { return };
    let disk = Disk::sparse();
    let directory = format!("--tls-certificates={}", certificates.good().display());
    let (_server, uri) = serve_with_certificates(&nbdkit, &disk, &directory);
    let overlay = disk.beside("overlay.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-u", "-b", &uri, "-F", "raw", &overlay, "8M"];
    peer(&qemu_img, &create);
    let options = ["--trust-image", &directory, "--tls-hostname", "localhost", "--timeout", "60s"];
    let with = |command: &[&str]| nbd_cli(&[&["image"], command, &options].concat());

    assert_eq!(with(&["compare", disk.path(), &overlay]).success(), "the disks are the same\n");
    assert!(with(&["info", "--backing-chain", &overlay]).success().contains(&uri));
    assert!(with(&["map", &overlay]).success().contains("zero"));
    with(&["measure", "-O", "qcow2", &overlay]).success();
    let copy = disk.beside("copy.img");
    with(&["convert", &overlay, &copy]).success();
    disk.assert_equals(copy);
    // The certificate is held against the name here, too.
    let wrong = ["--trust-image", &directory, "--tls-hostname", "elsewhere.example"];
    says(nbd_cli(&[&["image", "map"][..], &wrong, &[&overlay]].concat()), &["certificate"]);
}

#[test]
fn a_pre_shared_key_opens_both_ends_of_a_conversion() {
    tools!(qemu_nbd = "qemu-nbd", _psktool = "psktool");
    let disk = Disk::sparse();
    let file = PathBuf::from(disk.beside("keys.psk"));
    add_psk_user(&file, "alice");
    let directory = Path::new(disk.path()).parent().expect("a directory").display().to_string();
    let object = format!("tls-creds-psk,id=t,endpoint=server,dir={directory}");
    let blank = disk.blank("blank.img", disk.content().len() as u64);
    let serve = |path: &str| {
        let options = ["-f", "raw", "--object", &object, "--tls-creds", "t", path];
        let server = Server::qemu_nbd(&qemu_nbd, "disk", &options);
        let uri = server.uri().replacen("nbd+unix:///", "nbds+unix://alice@/", 1);
        (server, uri)
    };
    let ((_from, source), (_to, destination)) = (serve(disk.path()), serve(&blank));
    let psk = format!("--tls-psk={}", file.display());
    nbd_cli(&["image", "convert", "--flush", &psk, &source, &destination]).success();
    nbd_cli(&["image", "compare", &psk, &source, &destination]).success();
    disk.assert_equals(&blank);
}

#[test]
fn a_key_with_a_pass_phrase_is_refused_in_words() {
    tools!(openssl = "openssl");
    let Some(certificates) = Certificates::any() else { return };
    let good = certificates.good();
    let server = TlsServer::start(&["--tls-certificates", text(&good)]);
    let directory = server.disk.beside("locked");
    std::fs::create_dir(&directory).expect("room");
    for name in ["ca-cert.pem", "client-cert.pem"] {
        std::fs::copy(good.join(name), Path::new(&directory).join(name)).expect("a copy");
    }
    let (key, locked) = (good.join("client-key.pem"), format!("{directory}/client-key.pem"));
    let arguments = ["pkey", "-in", text(&key), "-out", &locked, "-aes256", "-passout", "pass:x"];
    peer(&openssl, &arguments);
    let uri = server.uri_with(Path::new(&directory));
    // Without a terminal, nobody can be asked.
    let said = run(Command::new(crate::support::PROGRAM).args(["image", "info", &uri]));
    says(said, &["client-key.pem", "encrypted", "without a pass phrase"]);
}
