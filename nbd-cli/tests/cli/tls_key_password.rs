//! Encrypted private keys: `passwordid` of QEMU's credentials, and `--tls-key-password-file` and
//! `--source-tls-key-password-file`.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_nbd::{Foreground, ours};
use crate::support::tls::{Certificates, TlsServer};
use crate::support::{Disk, Server, nbd_cli, run};
use crate::tools;

/// Certificates whose keys are encrypted, as PKCS #8, and files with the right password and a wrong
/// one.
fn locked(certificates: &Certificates) -> [String; 3] {
    let (good, locked) = (certificates.good(), certificates.path("locked"));
    std::fs::create_dir(&locked).expect("a directory");
    for file in std::fs::read_dir(&good).expect("the directory") {
        let file = file.expect("a file").path();
        std::fs::copy(&file, locked.join(file.file_name().expect("a name"))).expect("a copy");
    }
    for key in ["server-key.pem", "client-key.pem"] {
        let mut openssl = Command::new("openssl");
        openssl.args(["pkcs8", "-topk8", "-v2", "aes-256-cbc", "-passout", "pass:letmein", "-in"]);
        run(openssl.arg(good.join(key)).arg("-out").arg(locked.join(key))).success();
        let text = std::fs::read_to_string(locked.join(key)).expect("the key");
        assert!(text.contains("BEGIN ENCRYPTED PRIVATE KEY"), "{text}");
    }
    let [right, wrong] = ["right", "wrong"].map(|name| certificates.path(name));
    std::fs::write(&right, "letmein\n").expect("room");
    std::fs::write(&wrong, "letmeout\n").expect("room");
    [locked, right, wrong].map(|path| text(&path))
}

fn text(path: &Path) -> String {
    path.to_str().expect("a plain name").to_owned()
}

#[test]
fn a_secret_opens_the_keys_of_qemus_credentials() {
    tools!(theirs = "qemu-nbd", _openssl = "openssl", _qemu_img = "qemu-img");
    let Some(certificates) = Certificates::any() else { return };
    let [directory, ..] = locked(&certificates);
    let disk = Disk::sparse();
    let object = |end: &str, password: &str| {
        format!("tls-creds-x509,id=tls0,endpoint={end},dir={directory}{password}")
    };
    let with = ",passwordid=sec0";
    let (right, wrong) = ("secret,id=sec0,data=letmein", "secret,id=sec0,data=letmeout");
    for server in [Command::new(&theirs), ours()] {
        let object_of_server = object("server", with);
        let arguments = ["--object", right, "--object", &object_of_server, "--tls-creds=tls0"];
        let more = ["-t", "-e5", "-f", "raw", "-r", disk.path()];
        let server = Foreground::start(server, &[&arguments[..], &more].concat());
        for (secret, password, part) in [
            (right, with, None),
            (wrong, with, Some("does not open it")),
            (right, "", Some("not given")),
        ] {
            let object = object("client", password);
            let arguments = ["--object", secret, "--object", &object, "--tls-creds=tls0"];
            let list = ["-L", "-k", server.socket(), "--tls-hostname", "localhost"];
            for mut client in [Command::new(&theirs), ours()] {
                let listed = run(client.args(arguments).args(list));
                assert_eq!(listed.code, Some(if part.is_none() { 0 } else { 1 }), "{listed:?}");
                if let (Some(part), true) = (part, client.get_program() != theirs.as_os_str()) {
                    assert!(listed.stderr.contains(part), "{listed:?}");
                    assert!(listed.stderr.contains("client-key.pem"), "{listed:?}");
                }
            }
            let image = format!(
                "driver=nbd,server.type=unix,server.path={},tls-creds=tls0,tls-hostname=localhost",
                server.socket()
            );
            let info =
                ["qemu-img", "info", "--object", secret, "--object", &object, "--image-opts"];
            let info = nbd_cli(&[&info[..], &[&image]].concat());
            assert_eq!(info.code, Some(if part.is_none() { 0 } else { 1 }), "{info:?}");
        }
    }
    for (secret, password, part) in
        [(wrong, with, "does not open it"), (right, "", "it is encrypted")]
    {
        let object = object("server", password);
        let arguments = ["--object", secret, "--object", &object, "--tls-creds=tls0"];
        let refused = run(ours().args(arguments).args(["-f", "raw", disk.path()]));
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.stderr.contains(part), "{refused:?}");
        assert!(refused.stderr.contains("server-key.pem"), "{refused:?}");
    }
}

#[test]
fn a_password_file_opens_the_keys_of_server_and_client() {
    tools!(_openssl = "openssl");
    let Some(certificates) = Certificates::any() else { return };
    let [directory, right, wrong] = locked(&certificates);
    let credentials = ["--tls-certificates", &directory];
    let password = |file| [&credentials[..], &["--tls-key-password-file", file]].concat();
    let server = TlsServer::start(&password(&right));
    let socket = server.server.socket().display();
    let uri = format!("nbds+unix:///?socket={socket}&tls-hostname=localhost");
    let info = |credentials: &[&str]| nbd_cli(&[&["info"], credentials, &[&uri]].concat());
    info(&password(&right)).success();
    for (credentials, part) in [
        (password(&wrong), "it is encrypted, and the password does not open it"),
        (credentials.to_vec(), "it is encrypted, and its password is not given"),
        (password("/nowhere"), "--tls-key-password-file"),
    ] {
        let refused = info(&credentials);
        assert!(refused.code == Some(1) && refused.stderr.contains(part), "{refused:?}");
    }
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let serve = |credentials: &[&str]| {
        nbd_cli(&[&["serve", "--socket", &socket], credentials, &[disk.path()]].concat())
    };
    for (credentials, part) in [
        (password(&wrong), "it is encrypted, and the password does not open it"),
        (credentials.to_vec(), "it is encrypted; give its password"),
        (vec!["--tls-key-password-file", &right], "--tls-certificates"),
    ] {
        let refused = serve(&credentials);
        assert!(refused.code == Some(1) && refused.stderr.contains(part), "{refused:?}");
    }
}

#[test]
fn a_password_file_opens_the_key_for_the_server_of_a_source() {
    tools!(_openssl = "openssl");
    let Some(certificates) = Certificates::any() else { return };
    let [directory, right, wrong] = locked(&certificates);
    let credentials = ["--tls-certificates", &text(&certificates.good())];
    let upstream = Server::ours(&[&credentials[..], &["memory:1M"]].concat());
    let uri = format!("nbds+unix:///?socket={}", upstream.socket().display());
    let plain = uri.replacen("nbds", "nbd", 1);
    let without = ["--source-tls-certificates", &directory, "--source-tls-hostname", "localhost"];
    let alone = |file| ["--source-tls-key-password-file", file];
    let with = |file| [&without[..], &alone(file)].concat();
    let server = Server::ours(&[&with(&right)[..], &[&uri]].concat());
    assert_eq!(nbd_cli(&["info", "--size", server.uri()]).success(), "1048576\n");
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let missing = disk.beside("missing");
    for (options, source, parts) in [
        (with(&wrong), &*uri, ["client-key.pem", "the password does not open it: give the right"]),
        (without.to_vec(), &*uri, ["client-key.pem", "its password is not given: give it"]),
        (
            with(&missing),
            &*uri,
            ["--source-tls-key-password-file", "does not exist; check the path"],
        ),
        (alone(&right).to_vec(), &*plain, ["--source-tls-key-password-file is given", "nbds"]),
        (alone(&right).to_vec(), "memory:1M", ["--source-tls-key-password-file", "no source is"]),
    ] {
        let refused = nbd_cli(&[&["serve", "--socket", &socket], &options[..], &[source]].concat());
        let is_said = parts.iter().all(|part| refused.stderr.contains(part));
        assert!(refused.code == Some(1) && is_said, "{parts:?}: {refused:?}");
    }
}
