//! Images on object stores, wherever an image is read.

use std::process::Command;

use nbd_objects::testing::{Fault, TestStore};

use crate::support::{Disk, Outcome, PROGRAM, Server, nbd_cli, run, says};

const SECRET: &str = "wJalrXUtnFEMIsecret";
const URL: &str = "s3://bucket/images/disk.qcow2";

struct Stored {
    store: TestStore,
    disk: Disk,
}

impl Stored {
    /// A disk, and a qcow2 image of it in a store.
    fn new() -> Self {
        let (store, disk) = (TestStore::start().expect("a port"), Disk::sparse());
        let image = disk.beside("disk.qcow2");
        nbd_cli(&["image", "convert", "-q", "-f", "raw", "-O", "qcow2", disk.path(), &image])
            .success();
        store.put("/bucket/images/disk.qcow2", std::fs::read(image).expect("an image"));
        Self { store, disk }
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        run(self.command().args(arguments))
    }

    /// The program with the credentials and the address of the store.
    fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.env("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEKEY").env("AWS_SECRET_ACCESS_KEY", SECRET);
        command.env("AWS_ENDPOINT_URL", self.store.endpoint()).env_remove("AWS_PROFILE");
        command.env("CACHE_DIRECTORY", self.disk.beside("cache"));
        command
    }
}

#[test]
fn image_by_url_is_read_by_every_command_that_reads_images() {
    let stored = Stored::new();
    let raw = stored.disk.path();
    let info = stored.run(&["image", "info", URL]).success();
    assert!(info.contains("qcow2") && info.contains(URL), "{info}");
    assert!(stored.run(&["image", "map", URL]).success().contains("data"));
    stored.run(&["image", "check", URL]).success();
    stored.run(&["image", "measure", "-O", "qcow2", URL]).success();
    stored.run(&["image", "compare", raw, URL]).success();
    let sum = |source| {
        let line = stored.run(&["checksum", "-q", source]).success();
        line.split(' ').next().expect("a digest").to_owned()
    };
    assert_eq!(sum(URL), sum(raw));
    let converted = stored.disk.beside("converted.raw");
    stored.run(&["image", "convert", "-q", "-O", "raw", URL, &converted]).success();
    assert_eq!(sum(&converted), sum(raw));
    let copied = stored.disk.beside("copied.qcow2");
    stored.run(&["copy", "-q", URL, &copied]).success();
    let image = std::fs::read(stored.disk.beside("disk.qcow2")).expect("an image");
    assert!(std::fs::read(&copied).expect("a copy") == image, "the bytes of the object");
    let repository = stored.disk.beside("repository");
    stored.run(&["repo", "init", &repository]).success();
    stored.run(&["backup", "-q", "--name", "vm", URL, &repository]).success();
    assert_eq!(sum(&format!("backup:{repository}/vm")), sum(raw));
    let seen = stored.store.take_seen();
    assert!(seen.iter().all(|seen| seen.is_signed && seen.method == "GET"), "{seen:?}");
}

#[test]
fn overlay_of_an_object_is_local_and_needs_trust() {
    let stored = Stored::new();
    let overlay = stored.disk.beside("overlay.qcow2");
    let create = ["image", "create", "-f", "qcow2", "-b", URL, "-F", "qcow2", &overlay];
    stored.run(&create).success();
    says(stored.run(&["checksum", "-q", &overlay]), &["s3", "--trust-image"]);
    stored.run(&["image", "compare", "--trust-image", stored.disk.path(), &overlay]).success();
}

#[test]
fn object_is_served_read_only_or_under_a_temporary_overlay() {
    let stored = Stored::new();
    let endpoint = stored.store.endpoint();
    let cache = stored.disk.beside("cache");
    let store = ["--endpoint", &endpoint, "--anonymous", "--cache-dir", &cache];
    for how in ["--read-only", "--temporary"] {
        let server = Server::ours(&[&store[..], &[how, URL]].concat());
        nbd_cli(&["image", "compare", "-f", "raw", stored.disk.path(), server.uri()]).success();
    }
    assert!(stored.store.take_seen().iter().all(|seen| !seen.is_signed));
    let arguments = [&["serve", "--listen", "127.0.0.1:0"], &store[..], &[URL]].concat();
    says(nbd_cli(&arguments), &["read-only", "--temporary"]);
}

#[test]
fn log_shows_each_request_without_secrets() {
    let stored = Stored::new();
    let https =
        format!("{}/bucket/images/disk.qcow2?X-Amz-Signature=f00dcafe", stored.store.endpoint());
    for (source, key) in
        [(URL, "/bucket/images/disk.qcow2"), (&*https, "/bucket/images/disk.qcow2")]
    {
        stored.store.fail(|seen| match seen.number {
            0 => Fault::Status(503),
            _ => Fault::None,
        });
        let outcome = stored.run(&["-vvv", "image", "info", source]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let log = format!("{}{}", outcome.stdout, outcome.stderr);
        for part in ["store request", key, "bytes=0-262143", "status=503", "status=206", "GET"] {
            assert!(log.contains(part), "'{part}' is missing in: {log}");
        }
        for secret in [SECRET, "AKIAEXAMPLEKEY", "f00dcafe", "Signature=", "Credential="] {
            assert!(!log.contains(secret), "'{secret}' is in: {log}");
        }
        stored.store.take_seen();
    }
}

#[test]
fn failures_are_one_sentence_that_names_the_object() {
    let stored = Stored::new();
    says(stored.run(&["image", "info", "s3://bucket/none"]), &["s3://bucket/none", "not exist"]);
    says(stored.run(&["image", "info", "s3://bucket"]), &["s3://bucket/key"]);
    stored.store.fail(|_| Fault::Status(403));
    let outcome = stored.run(&["image", "info", URL]);
    says(outcome, &[URL, "403", "check the credentials"]);
    stored.store.fail(|_| Fault::WholeObject);
    says(stored.run(&["checksum", "-q", URL]), &[URL, "ignores ranges"]);
    stored.store.fail(|_| Fault::Hang);
    let arguments = ["image", "info", "--store-timeout", "500ms", URL];
    says(stored.run(&arguments), &[URL, "cannot open"]);
    let arguments = ["copy", "-q", stored.disk.path(), URL];
    says(stored.run(&arguments), &["image push"]);
    let mut command = stored.command();
    command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    command.env("HOME", stored.disk.beside("home")).env("AWS_EC2_METADATA_DISABLED", "true");
    says(run(command.args(["image", "info", URL])), &["no credentials", "AWS_ACCESS_KEY_ID"]);
}

#[test]
fn pushed_image_is_the_file_and_replaces_nothing_unasked() {
    let stored = Stored::new();
    let (image, url) = (stored.disk.beside("disk.qcow2"), "s3://bucket/new.qcow2");
    let pushed = stored.run(&["image", "push", "-q", "--verify", &image, url]).success();
    assert!(pushed.starts_with("s3://bucket/new.qcow2: "), "{pushed}");
    let file = std::fs::read(&image).expect("an image");
    assert!(stored.store.object("/bucket/new.qcow2").is_some_and(|object| object == file));
    says(stored.run(&["image", "push", "-q", &image, url]), &[url, "--replace"]);
    stored.run(&["image", "push", "-q", "--replace", &image, url]).success();
    says(
        stored.run(&["image", "push", "-q", &image, "https://host/x"]),
        &["https://host/x", "s3://"],
    );
}
