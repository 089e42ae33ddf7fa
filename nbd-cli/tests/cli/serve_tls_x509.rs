//! Our server with certificates, judged by programs that use GnuTLS.

use std::process::Command;

use crate::support::tls::credentials::{Authority, Maker, Role, Validity};
use crate::support::tls::{Certificates, TlsServer, Version, compare_by_qemu_img};
use crate::support::{Disk, Outcome, nbd_cli, peer, run, says};
use crate::tools;

fn serve(certificates: &Certificates, arguments: &[&str]) -> TlsServer {
    let directory = certificates.good();
    let directory = directory.to_str().expect("a plain name");
    TlsServer::start(&[&["--tls-certificates", directory], arguments].concat())
}

#[test]
fn every_client_reads_the_disk_over_every_version_with_certificates_of_both_tools() {
    tools!(nbdinfo = "nbdinfo", nbdcopy = "nbdcopy", qemu_img = "qemu-img");
    for maker in Maker::ALL {
        let Some(certificates) = Certificates::make(maker) else { return };
        let server = serve(&certificates, &[]);
        let uri = server.server.uri();
        for version in Version::ALL {
            let disk = &server.disk;
            let size = version.hold(disk, Command::new(&nbdinfo).args(["--size", uri]));
            assert_eq!(size.success().trim(), "8388608", "{maker:?}, {version:?}");
            server.expect_log(&["CN=alice,O=Example", version.in_log()]);
            let copy = disk.beside("copy.img");
            version.hold(disk, Command::new(&nbdcopy).args([uri, &copy])).success();
            disk.assert_equals(copy);
            let priority = version.priority();
            let dir = certificates.good().display().to_string();
            let credentials = format!("dir={dir},priority={priority}");
            compare_by_qemu_img(&qemu_img, &server, &credentials, ",file.tls-hostname=localhost")
                .success();
        }
    }
}

#[test]
fn nbdcopy_writes_over_several_connections() {
    tools!(nbdcopy = "nbdcopy");
    let Some(certificates) = Certificates::any() else { return };
    let server = serve(&certificates, &[]);
    let other = Disk::sparse();
    let source = other.blank("random.img", 48 << 20);
    let content: Vec<u8> =
        (0..48 << 17).flat_map(|n: u64| (n * 0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&source, &content).expect("room");
    let target = other.blank("target.img", 48 << 20);
    let directory = certificates.good();
    let writable = ["--tls-certificates", directory.to_str().expect("a plain name"), &target];
    let writable = crate::support::Server::ours(&writable);
    peer(&nbdcopy, &["--connections=4", &source, writable.uri()]);
    let back = other.beside("back.img");
    peer(&nbdcopy, &["--connections=4", writable.uri(), &back]);
    assert!(std::fs::read(&back).expect("a copy") == content);
    writable.end();
    assert!(std::fs::read(&target).expect("the target") == content);
    peer(&nbdcopy, &[other.path(), server.server.uri()]);
}

#[test]
fn clients_with_wrong_or_missing_certificates_are_refused_and_the_log_says_why() {
    tools!(nbdinfo = "nbdinfo");
    let Some(certificates) = Certificates::any() else { return };
    let maker = Maker::ALL.into_iter().find(|maker| maker.is_installed()).expect("made above");
    let server = serve(&certificates, &[]);
    for (directory, reason) in [
        (certificates.expired(), &["CN=alice,O=Example", "expired", "new one"][..]),
        // GnuTLS keeps back a certificate of an authority that the server did not ask for.
        (certificates.stranger(maker), &["the client presented no certificate", "ca-cert.pem"]),
        (certificates.nobody(), &["the client presented no certificate", "client-cert.pem"]),
    ] {
        refused(run(Command::new(&nbdinfo).arg(server.uri_with(&directory))));
        server.expect_log(reason);
    }
    let plain = format!("nbd+unix:///?socket={}", server.server.socket().display());
    refused(run(Command::new(&nbdinfo).args(["--size", &plain])));
    peer(&nbdinfo, &["--size", &server.uri_with(&certificates.good())]);
}

#[track_caller]
fn refused(outcome: Outcome) {
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
}

#[test]
fn a_revoked_certificate_is_refused() {
    tools!(nbdinfo = "nbdinfo", _certtool = "certtool");
    let Some(certificates) = Certificates::make(Maker::Certtool) else { return };
    let (good, mallory) = (certificates.good(), certificates.path("mallory"));
    certificates.authority.issue(Role::Client, "mallory", Validity::Now, &mallory);
    certificates.authority.revoke(&mallory.join("client-cert.pem"), &good.join("ca-crl.pem"));
    let server = serve(&certificates, &[]);
    refused(run(Command::new(&nbdinfo).args(["--size", &server.uri_with(&mallory)])));
    server.expect_log(&["CN=mallory", "revoked"]);
    peer(&nbdinfo, &["--size", &server.uri_with(&good)]);
}

#[test]
fn without_verification_anyone_gets_in() {
    tools!(nbdinfo = "nbdinfo");
    let Some(certificates) = Certificates::any() else { return };
    let server = serve(&certificates, &["--tls-verify-peer=off"]);
    peer(&nbdinfo, &["--size", &server.uri_with(&certificates.nobody())]);
    server.expect_log(&["a client without a certificate"]);
}

#[test]
fn only_those_on_the_list_get_in() {
    tools!(nbdinfo = "nbdinfo");
    let Some(certificates) = Certificates::any() else { return };
    let list = certificates.path("clients");
    let server = serve(&certificates, &["--tls-authz", list.to_str().expect("a plain name")]);
    let uri = server.uri_with(&certificates.good());
    let try_now = || run(Command::new(&nbdinfo).args(["--size", &uri]));
    refused(try_now());
    server.expect_log(&["cannot read the list of clients"]);
    std::fs::write(&list, "CN=bob,*\n").expect("a list");
    refused(try_now());
    server.expect_log(&["CN=alice,O=Example is not on the list"]);
    std::fs::write(&list, "CN=al*,O=Example\n").expect("a list");
    try_now().success();
    let server =
        serve(&certificates, &["--tls-authz", "CN=bob,*", "--tls-authz", "O=Example,CN=*"]);
    peer(&nbdinfo, &["--size", &server.uri_with(&certificates.good())]);
}

#[test]
fn certificates_are_read_again_on_sighup() {
    tools!(nbdinfo = "nbdinfo");
    let Some(certificates) = Certificates::any() else { return };
    let maker = Maker::ALL.into_iter().find(|maker| maker.is_installed()).expect("made above");
    let server = serve(&certificates, &[]);
    // Another authority takes over: it issues the server's certificate as well.
    let other_ca = certificates.path("other-ca");
    std::fs::create_dir(&other_ca).expect("a directory");
    let other = Authority::new(maker, &other_ca, "Yet another authority");
    other.issue(Role::Server, "localhost", Validity::Now, &certificates.good());
    other.issue(Role::Client, "carol", Validity::Now, &certificates.path("carol"));
    let carol = server.uri_with(&certificates.path("carol"));
    refused(run(Command::new(&nbdinfo).args(["--size", &carol])));
    server.reload("reloaded");
    peer(&nbdinfo, &["--size", &carol]);
    std::fs::write(certificates.good().join("server-key.pem"), "none").expect("a file");
    server.reload("the previous ones stay in use");
    peer(&nbdinfo, &["--size", &carol]);
}

#[test]
fn certificates_that_cannot_be_used_are_named() {
    let Some(certificates) = Certificates::any() else { return };
    let good = certificates.good();
    let try_with = |directory: &std::path::Path, more: &[&str]| {
        let directory = directory.to_str().expect("a plain name");
        nbd_cli(&[&["serve", "--tls-certificates", directory], more, &["memory:1M"]].concat())
    };
    let empty = certificates.path("empty");
    std::fs::create_dir(&empty).expect("a directory");
    says(try_with(&empty, &[]), &["server-cert.pem", "no such file"]);
    let expired = certificates.path("expired-server");
    certificates.authority.issue(Role::Server, "localhost", Validity::Expired, &expired);
    says(try_with(&expired, &[]), &["CN=localhost,O=Example", "has expired on Jan 31"]);
    let other = certificates.path("other-key");
    certificates.authority.issue(Role::Server, "localhost", Validity::Now, &other);
    std::fs::copy(good.join("server-key.pem"), other.join("server-key.pem")).expect("a copy");
    says(try_with(&other, &[]), &["does not belong to the certificate", "server-key.pem"]);
    std::fs::write(other.join("server-key.pem"), "nothing").expect("a file");
    says(try_with(&other, &[]), &["server-key.pem", "no private key"]);
    std::fs::remove_file(expired.join("ca-cert.pem")).expect("there");
    std::fs::write(good.join("ca-crl.pem"), "nothing").expect("a file");
    says(try_with(&good, &[]), &["ca-crl.pem", "no list"]);
}
