//! Existing encrypted images that are overwritten: the data arrives at its place, nothing of it is
//! in the file in clear, and what is refused changes no byte.

use std::path::Path;

use crate::support::qemu_img::{ours, words};
use crate::support::{Disk, Outcome, Server, nbd_cli, peer};
use crate::tools;

const SIZE: usize = 1 << 20;
/// What no file may contain. Sixteen bytes, so that it fills sectors.
const MARKER: &[u8] = b"clear text found";
/// Where the volume begins in a file that has it in a part.
const START: usize = 1 << 20;

/// An encrypted image, alone or in a part of a file.
struct Subject<'a> {
    qemu_img: &'a Path,
    directory: &'a Disk,
    /// Its name in the directory.
    file: &'static str,
    /// Of QEMU, for the image.
    options: String,
    /// The bytes around it, at the start and at the end.
    around: usize,
}

impl<'a> Subject<'a> {
    fn make(qemu_img: &'a Path, directory: &'a Disk, format: &str, is_part: bool) -> Self {
        let file = if is_part { "part.img" } else { "whole.img" };
        let path = directory.beside(file);
        let _ = std::fs::remove_file(&path);
        let key = directory.beside("key");
        let create = ["image", "create", "-f", format, "--encrypt", "--key-file", &key];
        nbd_cli(&[&create[..], &["--iter-time", "10ms", &path, "1M"]].concat()).success();
        let around = if is_part { START } else { 0 };
        let mut options = match format {
            "luks" => "driver=luks,key-secret=s".to_owned(),
            _ => "driver=qcow2,encrypt.key-secret=s".to_owned(),
        };
        if is_part {
            let mut image = std::fs::read(&path).expect("an image");
            // A qcow2 image grows.
            image.resize(5 * SIZE, 0);
            let whole = [&vec![0xaa; START][..], &image, &vec![0xaa; START]].concat();
            std::fs::write(&path, whole).expect("room");
            let length = image.len();
            options += &format!(",file.driver=raw,file.offset={START},file.size={length}");
            options += ",file.file.filename=part.img";
        } else {
            options += ",file.filename=whole.img";
        }
        Self { qemu_img, directory, file, options, around }
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.directory.beside(self.file)).expect("a file")
    }

    /// Overwrites it with a disk.
    fn overwrite(&self, source: &str, key: &str) -> Outcome {
        let here = Path::new(self.directory.path()).parent().expect("a directory");
        let line = format!(
            "convert -n --object secret,id=s,file={key} -f raw {source} --target-image-opts {}",
            self.options
        );
        ours(here, &words(&line))
    }

    /// As [`overwrite`](Self::overwrite), by `image convert`, which knows no parts.
    fn overwrite_whole(&self, format: &str, source: &str, key: &str) -> Outcome {
        let [image, source, key] = [self.file, source, key].map(|name| self.directory.beside(name));
        let convert = ["image", "convert", "-n", "-f", "raw", "-O", format, "--key-file", &key];
        nbd_cli(&[&convert[..], &[&source, &image]].concat())
    }

    #[track_caller]
    fn assert_holds(&self, disk: &[u8], what: &str) {
        let copy = self.directory.beside("decrypted");
        let secret = format!("secret,id=s,file={}", self.directory.beside("key"));
        let options = self.options.replace("filename=", &format!("filename={}", self.folder()));
        let convert = ["convert", "--object", &secret, "--image-opts", &options, "-O", "raw"];
        peer(self.qemu_img, &[&convert[..], &[&copy]].concat());
        let found = std::fs::read(copy).expect("the copy");
        // A part may be longer than the disk that was written.
        assert!(found.starts_with(disk), "{what}: {}", self.options);
        let bytes = self.bytes();
        // Everything is placed in whole sectors.
        let is_clear = bytes.chunks_exact(MARKER.len()).any(|part| part == MARKER);
        assert!(!is_clear, "{what}: clear text in {}", self.options);
        let (start, end) = (&bytes[..self.around], &bytes[bytes.len() - self.around..]);
        assert!(start.iter().chain(end).all(|byte| *byte == 0xaa), "{what}: {}", self.options);
    }

    fn folder(&self) -> String {
        self.directory.beside("")
    }
}

#[test]
fn an_encrypted_image_is_overwritten_at_its_place_and_never_in_clear() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    for (name, text) in [("key", "the right one"), ("wrong", "another one")] {
        std::fs::write(directory.beside(name), text).expect("room");
    }
    let mut disk = MARKER.repeat(SIZE / MARKER.len());
    disk[SIZE / 2..SIZE / 2 + 100_000].fill(0);
    std::fs::write(directory.beside("full.img"), &disk).expect("room");
    std::fs::write(directory.beside("large.img"), MARKER.repeat(SIZE)).expect("room");
    std::fs::write(directory.beside("zero.img"), vec![0; SIZE]).expect("room");
    for (format, is_part) in [("luks", false), ("qcow2", false), ("luks", true), ("qcow2", true)] {
        let subject = Subject::make(&qemu_img, &directory, format, is_part);
        let before = subject.bytes();
        for (source, key) in [("full.img", "wrong"), ("large.img", "key")] {
            let mut outcomes = vec![subject.overwrite(source, key)];
            if !is_part {
                outcomes.push(subject.overwrite_whole(format, source, key));
            }
            for refused in outcomes {
                assert_eq!(refused.code, Some(1), "{format}: {refused:?}");
                assert!(subject.bytes() == before, "{format}: {key}: {refused:?}");
            }
        }
        let zeroes = vec![0; SIZE];
        for (source, content) in [("full.img", &disk), ("zero.img", &zeroes), ("full.img", &disk)] {
            let done = subject.overwrite(source, "key");
            assert_eq!(done.code, Some(0), "{format}: {done:?}");
            subject.assert_holds(content, source);
        }
        if !is_part {
            assert_eq!(subject.overwrite("zero.img", "key").code, Some(0));
            subject.overwrite_whole(format, "full.img", "key").success();
            subject.assert_holds(&disk, "image convert");
        }
    }
}

#[test]
fn what_a_client_copies_into_an_encrypted_image_is_never_in_the_file_in_clear() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let key = directory.beside("key");
    std::fs::write(&key, "the right one").expect("room");
    let disk = MARKER.repeat(SIZE / MARKER.len());
    let source = directory.beside("full.img");
    std::fs::write(&source, &disk).expect("room");
    for format in ["luks", "qcow2"] {
        let subject = Subject::make(&qemu_img, &directory, format, false);
        let image = directory.beside(subject.file);
        let server = Server::ours(&["--format", format, "--key-file", &key, &image]);
        nbd_cli(&["copy", &source, server.uri()]).success();
        server.end();
        subject.assert_holds(&disk, "copy");
    }
}
