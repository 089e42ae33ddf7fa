//! `nbd-cli tls`: certificates that every peer accepts, in files that are never lost.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::support::tls::{TlsServer, compare_by_qemu_img};
use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer, run, says};
use crate::tools;

/// An authority with a server 'localhost' and a client 'laptop-1'.
struct Pki {
    directory: TempDir,
}

impl Pki {
    fn new() -> Self {
        let pki = Self { directory: tempfile::tempdir().expect("a directory") };
        let root = pki.root();
        nbd_cli(&["tls", "init", &root]).success();
        let names = ["localhost", "vmhost.example.com", "127.0.0.1", "::1"];
        nbd_cli(&[&["tls", "server", "-a", &root][..], &names].concat()).success();
        let client = ["tls", "client", "-a", &root, "--organization", "Example", "laptop-1"];
        nbd_cli(&client).success();
        pki
    }

    fn root(&self) -> String {
        self.path("pki")
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("a plain name").to_owned()
    }

    fn server(&self) -> String {
        self.path("pki/localhost")
    }

    fn client(&self) -> String {
        self.path("pki/laptop-1")
    }

    /// What `tls show --json` says of the file that ends in this.
    fn shown(&self, file: &str) -> serde_json::Value {
        let text = nbd_cli(&["tls", "show", "--json", &self.root()]).success();
        let all: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
        let found = all
            .into_iter()
            .find(|entry| entry["file"].as_str().is_some_and(|name| name.ends_with(file)));
        found.unwrap_or_else(|| panic!("{file} is missing in {text}"))
    }
}

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::metadata(path).expect("a file").permissions().mode() & 0o7777
}

/// Every file below a directory with its contents.
fn tree(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let contents = fs::read(&path).expect("a file");
                files.push((path, contents));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn tls_certificates_are_valid_for_gnutls_and_openssl() {
    tools!(certtool = "certtool", openssl = "openssl");
    let pki = Pki::new();
    let authority = pki.path("pki/ca-cert.pem");
    let server = format!("{}/server-cert.pem", pki.server());
    let client = format!("{}/client-cert.pem", pki.client());
    const SERVER: &str = "1.3.6.1.5.5.7.3.1";
    const CLIENT: &str = "1.3.6.1.5.5.7.3.2";
    let verify = |file: &str, purpose: &str, name: Option<&str>| {
        let mut command = Command::new(&certtool);
        command.args(["--verify", "--load-ca-certificate", &authority, "--infile", file]);
        command.args(["--verify-purpose", purpose]);
        run(command.args(name.map(|name| format!("--verify-hostname={name}"))))
    };
    for name in ["localhost", "vmhost.example.com", "127.0.0.1", "::1"] {
        verify(&server, SERVER, Some(name)).success();
    }
    verify(&client, CLIENT, None).success();
    assert_ne!(verify(&server, SERVER, Some("other.example.com")).code, Some(0));
    assert_ne!(verify(&server, CLIENT, None).code, Some(0), "it is a server's");
    assert_ne!(verify(&client, SERVER, None).code, Some(0), "it is a client's");
    for (file, purpose) in [(&server, "sslserver"), (&client, "sslclient")] {
        let arguments =
            ["verify", "-x509_strict", "-purpose", purpose, "-CAfile", &authority, file];
        peer(&openssl, &arguments);
    }
}

#[test]
fn tls_files_serve_qemu_nbdkit_and_libnbd_in_both_roles() {
    tools!(nbdinfo = "nbdinfo", qemu_img = "qemu-img", qemu_nbd = "qemu-nbd", nbdkit = "nbdkit");
    let pki = Pki::new();
    let server = TlsServer::start(&["--tls-certificates", &pki.server()]);
    let uri = server.uri_with(Path::new(&pki.client()));
    assert_eq!(peer(&nbdinfo, &["--size", &uri]).trim(), "8388608");
    server.expect_log(&["CN=laptop-1,O=Example"]);
    let credentials = format!("dir={}", pki.client());
    compare_by_qemu_img(&qemu_img, &server, &credentials, ",file.tls-hostname=localhost").success();

    let disk = Disk::sparse();
    let directory = format!("--tls-certificates={}", pki.server());
    let arguments = ["--tls=require", &directory, "--tls-verify-peer", "file", disk.path()];
    let theirs = Server::nbdkit(&nbdkit, &arguments);
    let object = format!("tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={}", pki.server());
    let arguments = ["-f", "raw", "--object", &object, "--tls-creds", "t", "-r", disk.path()];
    let qemu = Server::qemu_nbd(&qemu_nbd, "disk", &arguments);
    for server in [&theirs, &qemu] {
        let uri = server.uri().replacen("nbd+unix", "nbds+unix", 1);
        for name in ["localhost", "vmhost.example.com"] {
            let options = ["--tls-certificates", &pki.client(), "--tls-hostname", name];
            let size = nbd_cli(&[&["info", "--size", &uri][..], &options].concat()).success();
            assert_eq!(size.trim(), "8388608");
        }
        // A client without a certificate of its own is refused.
        let alone = pki.path("alone");
        fs::create_dir_all(&alone).expect("a directory");
        fs::copy(pki.path("pki/ca-cert.pem"), format!("{alone}/ca-cert.pem")).expect("a copy");
        let options = ["--tls-certificates", &alone, "--tls-hostname", "localhost"];
        let refused = nbd_cli(&[&["info", "--size", &uri][..], &options].concat());
        assert_eq!(refused.code, Some(1), "{refused:?}");
    }
}

#[test]
fn tls_psk_serves_qemu_nbdkit_and_libnbd_in_both_roles() {
    tools!(nbdinfo = "nbdinfo", qemu_img = "qemu-img", qemu_nbd = "qemu-nbd", nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let keys = disk.beside("server/keys.psk");
    let client = disk.beside("client/keys.psk");
    nbd_cli(&["tls", "psk", "bob", "--file", &keys]).success();
    fs::create_dir(disk.beside("client")).expect("a directory");
    nbd_cli(&["tls", "psk", "alice", "--file", &keys, "--client-file", &client]).success();
    assert_eq!((mode(&keys), mode(&client), mode(disk.beside("server"))), (0o600, 0o600, 0o700));

    let server = TlsServer::start(&["--tls-psk", &keys]);
    let uri = server.uri_of_user("alice", Path::new(&client));
    assert_eq!(peer(&nbdinfo, &["--size", &uri]).trim(), "8388608");
    let credentials = format!("username=alice,dir={}", disk.beside("client"));
    compare_by_qemu_img(&qemu_img, &server, &credentials, "").success();

    let psk = format!("--tls-psk={keys}");
    let theirs = Server::nbdkit(&nbdkit, &["--tls=require", &psk, "file", disk.path()]);
    let object = format!("tls-creds-psk,id=t,endpoint=server,dir={}", disk.beside("server"));
    let arguments = ["-f", "raw", "--object", &object, "--tls-creds", "t", "-r", disk.path()];
    let qemu = Server::qemu_nbd(&qemu_nbd, "disk", &arguments);
    for server in [&theirs, &qemu] {
        let uri = server.uri().replacen("nbd+unix:///", "nbds+unix://alice@/", 1);
        nbd_cli(&["info", "--size", "--tls-psk", &client, &uri]).success();
    }
    // A new key ends the user's old one, and no other.
    let (old, before) =
        (fs::read(&client).expect("keys"), fs::read_to_string(&keys).expect("keys"));
    says(nbd_cli(&["tls", "psk", "alice", "--file", &keys]), &["'alice' already", "--force"]);
    assert_eq!(fs::read_to_string(&keys).expect("keys"), before);
    nbd_cli(&["tls", "psk", "alice", "--force", "--file", &keys, "--client-file", &client])
        .success();
    let after = fs::read_to_string(&keys).expect("keys");
    assert_eq!(after.lines().next(), before.lines().next(), "bob's");
    assert_ne!(fs::read(&client).expect("keys"), old);
    let same = nbd_cli(&["tls", "psk", "carol", "--file", &keys, "--client-file", &keys]);
    says(same, &["give the client one of its own"]);
    assert_eq!(fs::read_to_string(&keys).expect("keys"), after);
}

#[test]
fn tls_files_are_never_replaced_unasked_and_keys_are_for_their_owner() {
    let pki = Pki::new();
    let root = pki.root();
    assert_eq!(mode(&root), 0o700);
    for (key, certificate) in [
        ("pki/ca-key.pem", "pki/ca-cert.pem"),
        ("pki/localhost/server-key.pem", "pki/localhost/server-cert.pem"),
        ("pki/laptop-1/client-key.pem", "pki/laptop-1/client-cert.pem"),
    ] {
        assert_eq!((mode(pki.path(key)), mode(pki.path(certificate))), (0o600, 0o644), "{key}");
    }
    let before = tree(pki.directory.path());
    says(nbd_cli(&["tls", "init", &root]), &["ca-key.pem' exists", "--force"]);
    says(nbd_cli(&["tls", "server", "-a", &root, "localhost"]), &["server-key.pem' exists"]);
    fs::remove_file(pki.path("pki/laptop-1/client-key.pem")).expect("it was made");
    says(nbd_cli(&["tls", "client", "-a", &root, "laptop-1"]), &["client-cert.pem' exists"]);
    let rest: Vec<_> =
        before.iter().filter(|(path, _)| !path.ends_with("client-key.pem")).cloned().collect();
    assert_eq!(tree(pki.directory.path()), rest);

    // Another authority's certificates do not get into the directory of a server unasked either.
    let other = pki.path("other");
    nbd_cli(&["tls", "init", &other]).success();
    let into = ["tls", "client", "-a", &other, "-o", &pki.server(), "x"];
    says(nbd_cli(&into), &["another authority", "--force"]);
    // A replaced key keeps the group that may read it, and gives no others permission.
    let key = pki.path("pki/localhost/server-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("our file");
    assert!(pki.shown("server-cert.pem")["problems"].to_string().contains("chmod 600"));
    nbd_cli(&["tls", "server", "-a", &root, "--force", "localhost"]).success();
    assert_eq!(mode(&key), 0o640);
    assert_eq!(pki.shown("server-cert.pem")["problems"], serde_json::json!([]));
}

#[test]
fn tls_files_on_a_full_disk_are_whole_or_absent() {
    tools!(bash = "bash");
    let pki = Pki::new();
    let before = tree(pki.directory.path());
    let (root, new) = (pki.root(), pki.path("new"));
    for command in [
        format!("tls init {new}"),
        format!("tls init --force {root}"),
        format!("tls server --force -a {root} localhost"),
        format!("tls renew --all {root}"),
        format!("tls psk alice --file {new}/keys.psk"),
    ] {
        // No file may grow.
        let script = format!("ulimit -f 0; exec {PROGRAM} {command}");
        let outcome = run(Command::new(&bash).args(["-c", &script]));
        assert_eq!(outcome.code, Some(1), "{command}: {outcome:?}");
        assert!(outcome.stderr.contains("cannot write '"), "{outcome:?}");
        assert_eq!(tree(pki.directory.path()), before, "{command}");
    }
}

#[test]
fn tls_renewal_keeps_names_and_keys_and_reaches_a_running_server() {
    tools!(certtool = "certtool", nbdinfo = "nbdinfo");
    let pki = Pki::new();
    let root = pki.root();
    let server_cert = format!("{}/server-cert.pem", pki.server());
    assert_eq!(nbd_cli(&["tls", "renew", &root]).success(), "", "nothing ends soon");
    nbd_cli(&["tls", "server", "-a", &root, "--days", "20", "--force", "localhost", "::1"])
        .success();
    let soon = pki.shown("server-cert.pem");
    assert_eq!((&soon["status"], &soon["days-left"]), (&"ends-soon".into(), &20.into()));
    let said = nbd_cli(&["tls", "show", &root]).success();
    assert!(said.contains("it ends in 20 days"), "{said}");

    let server = TlsServer::start(&["--tls-certificates", &pki.server()]);
    let key = fs::read(format!("{}/server-key.pem", pki.server())).expect("a key");
    let said = nbd_cli(&["tls", "renew", "--days", "400", &root]).success();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with(&server_cert), "{said}");
    assert_eq!(fs::read(format!("{}/server-key.pem", pki.server())).expect("a key"), key);
    let renewed = pki.shown("server-cert.pem");
    assert_eq!(renewed["names"], serde_json::json!(["localhost", "::1"]));
    assert_eq!((&renewed["status"], &renewed["subject"]), (&"valid".into(), &soon["subject"]));
    assert_ne!(renewed["sha256"], soon["sha256"]);
    server.reload("reloaded");
    peer(&nbdinfo, &["--size", &server.uri_with(Path::new(&pki.client()))]);

    // The authority gets a new term too: its copies follow, and those that were handed out before
    // are still good for the certificates that it issues.
    let old = pki.path("old-ca.pem");
    fs::copy(pki.path("pki/ca-cert.pem"), &old).expect("a copy");
    let said = nbd_cli(&["tls", "renew", "--all", &root]).success();
    assert_eq!(said.lines().count(), 5, "{said}");
    let new = fs::read(pki.path("pki/ca-cert.pem")).expect("a certificate");
    for copy in [pki.server(), pki.client()] {
        assert_eq!(fs::read(format!("{copy}/ca-cert.pem")).expect("a copy"), new);
    }
    for authority in [&old, &pki.path("pki/ca-cert.pem")] {
        let arguments = ["--verify", "--load-ca-certificate", authority, "--infile", &server_cert];
        peer(&certtool, &arguments);
    }
    assert!(tree(pki.directory.path()).iter().all(|(path, _)| !path.ends_with(".partial")));
}

#[test]
fn tls_mistakes_are_explained() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("a plain name").to_owned();
    let empty = path("empty");
    fs::create_dir(&empty).expect("a directory");
    says(nbd_cli(&["tls", "server", "-a", &empty, "vmhost"]), &["no authority in", "tls init"]);
    says(nbd_cli(&["tls", "show", &empty]), &["no certificates and no keys"]);
    says(nbd_cli(&["tls", "show", &path("none")]), &["does not exist"]);
    says(nbd_cli(&["tls", "renew", &path("none")]), &["does not exist"]);
    let root = path("pki");
    nbd_cli(&["tls", "init", "--days", "3", &root]).success();
    let wildcard = ["tls", "server", "-a", &root, "*.example.com"];
    says(nbd_cli(&wildcard), &["cannot be the name of a directory", "--output"]);
    for name in ["nbd://vmhost/", "vmhost:10809", "10.0.0.300", "a b"] {
        let refused = nbd_cli(&["tls", "server", "-a", &root, name]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.stderr.contains("is not the name of a host"), "{refused:?}");
    }
    // No certificate outlives its authority.
    let said = nbd_cli(&["tls", "client", "-a", &root, "x"]).success();
    let end = said.lines().last().expect("a date").to_owned();
    let shown = nbd_cli(&["tls", "show", "--json", &root]).success();
    let shown: Vec<serde_json::Value> = serde_json::from_str(&shown).expect("JSON");
    let date = end.strip_prefix("valid until ").expect("a date");
    for entry in &shown {
        assert!(entry["not-after"].as_str().is_some_and(|end| end.starts_with(date)), "{entry}");
    }
    let other = path("other");
    nbd_cli(&["tls", "init", &other]).success();
    fs::copy(format!("{other}/ca-key.pem"), format!("{root}/ca-key.pem")).expect("a copy");
    says(nbd_cli(&["tls", "client", "-a", &root, "y"]), &["does not belong to"]);
    fs::write(format!("{root}/ca-key.pem"), "nonsense").expect("room");
    says(nbd_cli(&["tls", "client", "-a", &root, "y"]), &["is not a private key"]);
    fs::write(path("keys.psk"), "nonsense\n").expect("room");
    let broken = nbd_cli(&["tls", "psk", "alice", "--file", &path("keys.psk")]);
    says(broken, &["is not a file of keys: line 1 has no colon"]);
    assert_eq!(fs::read(path("keys.psk")).expect("it stays"), b"nonsense\n");
}
