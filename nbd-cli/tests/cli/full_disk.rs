//! Commands that find no space, for each amount of it: what they change is as before or as after,
//! and the same command succeeds when there is space.

use std::path::Path;
use std::process::Command;

use crate::support::{Disk, Outcome, PROGRAM, nbd_cli, peer, run};
use crate::tools;

const CLUSTER: u64 = 4096;

/// What a command that fails may have changed.
#[derive(Clone, Copy, PartialEq)]
enum Leaves {
    /// Nothing, or all.
    Whole,
    /// The same disk, perhaps with more dirty bits.
    SameDisk,
    /// A part of the disk.
    Part,
    /// A disk that is marked as incomplete.
    Marked,
}

/// A command, the image that it makes larger, and the one that is judged.
type Case = (&'static [&'static str], &'static str, &'static str, Leaves);

const CASES: [Case; 18] = [
    (&["bitmap", "add", "DISK", "new"], "disk", "disk", Leaves::Whole),
    (&["bitmap", "enable", "DISK", "off"], "disk", "disk", Leaves::Whole),
    (&["bitmap", "disable", "DISK", "backup"], "disk", "disk", Leaves::Whole),
    (&["bitmap", "clear", "DISK", "backup"], "disk", "disk", Leaves::Whole),
    (&["bitmap", "merge", "DISK", "off", "backup"], "disk", "disk", Leaves::Whole),
    (&["image", "amend", "--refcount-bits", "64", "DISK"], "disk", "disk", Leaves::Whole),
    (&["image", "amend", "--size", "60M", "DISK"], "disk", "disk", Leaves::Whole),
    (&["image", "resize", "--shrink", "DISK", "3M"], "disk", "disk", Leaves::Whole),
    (&["image", "resize", "DISK", "9M"], "disk", "disk", Leaves::Whole),
    (&["image", "snapshot", "create", "DISK", "new"], "disk", "disk", Leaves::Whole),
    (&["image", "snapshot", "apply", "DISK", "before"], "disk", "disk", Leaves::Whole),
    (&["image", "check", "--repair", "all", "BROKEN"], "broken", "broken", Leaves::Whole),
    (&["image", "convert", "-n", "-O", "qcow2", "SOURCE", "DISK"], "disk", "disk", Leaves::Marked),
    (&["image", "commit", "OVER"], "base", "over", Leaves::Whole),
    (&["image", "commit", "--keep", "OVER"], "base", "base", Leaves::Part),
    (&["image", "rebase", "--no-backing", "OVER"], "over", "over", Leaves::SameDisk),
    (&["image", "stream", "OVER"], "over", "over", Leaves::SameDisk),
    (
        &["qemu-img", "resize", "--preallocation=falloc", "DISK", "9M"],
        "disk",
        "disk",
        Leaves::Whole,
    ),
];

/// Images with bitmaps and without a free cluster, and copies of them.
struct Images<'a> {
    disk: Disk,
    qemu: [&'a Path; 3],
    /// The file with the passphrase, if they are encrypted.
    key: Option<String>,
}

impl<'a> Images<'a> {
    fn new(qemu: [&'a Path; 3], is_encrypted: bool) -> Self {
        let disk = Disk::sparse();
        let key = is_encrypted.then(|| disk.beside("key"));
        let all = Self { disk, qemu, key };
        all.key.iter().for_each(|key| std::fs::write(key, "secret").expect("room"));
        for name in ["disk", "base"] {
            all.create(name, &["8M"]);
            all.write(name, "write -P 5 1M 100k");
        }
        all.run(&["image", "snapshot", "create", "DISK", "before"]).success();
        all.create("over", &["--backing", "base.qcow2", "--backing-format", "qcow2"]);
        for name in ["DISK", "BASE", "OVER"] {
            all.run(&["bitmap", "add", "--granularity", "4096", name, "backup"]).success();
        }
        all.run(&["bitmap", "add", "--disabled", "DISK", "off"]).success();
        all.write("disk", "write -P 7 1M 100k");
        all.write("over", "write -P 8 3M 40k");
        for name in ["disk", "base", "over"] {
            all.write(name, "write -P 9 6M 4k");
            all.take_free_clusters(name);
            std::fs::copy(all.path(name), all.start(name)).expect("room");
        }
        let mut broken = std::fs::read(all.path("disk")).expect("an image");
        let counts = refcounts(&broken);
        broken[counts + 2 * 20..counts + 2 * 40].fill(0);
        std::fs::write(all.start("broken"), broken).expect("room");
        all
    }

    fn path(&self, name: &str) -> String {
        self.disk.beside(&format!("{name}.qcow2"))
    }

    fn start(&self, name: &str) -> String {
        self.disk.beside(&format!("{name}.start"))
    }

    fn create(&self, name: &str, more: &[&str]) {
        let path = self.path(name);
        let mut words = vec!["image", "create", "--format", "qcow2", "--cluster-size", "4096"];
        if self.key.is_some() {
            words.extend(["--encrypt", "--iter-time", "1ms"]);
        }
        let backing = more.len() > 1;
        let (size, more) = if backing { (&[][..], more) } else { (more, &[][..]) };
        words.extend(more);
        words.push(&path);
        words.extend(size);
        self.run(&words).success();
    }

    /// What QEMU's tools need to open an image.
    fn options(&self, name: &str) -> Vec<String> {
        let path = self.path(name);
        let Some(key) = &self.key else { return vec!["-f".into(), "qcow2".into(), path] };
        let mut driver = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
        if peer(self.qemu[0], &["info", &path]).contains("backing file:") {
            driver += ",backing.encrypt.key-secret=s";
        }
        let secret = format!("secret,id=s,file={key}");
        vec!["--object".into(), secret, "--image-opts".into(), driver]
    }

    fn write(&self, name: &str, command: &str) {
        let options = self.options(name);
        let words = ["-c", command].into_iter().chain(options.iter().map(String::as_str));
        peer(self.qemu[1], &words.collect::<Vec<_>>());
    }

    /// Refers to each free cluster from the last entries of the table for 6 MiB to 8 MiB, as a
    /// cluster that is zero.
    fn take_free_clusters(&self, name: &str) {
        let mut image = std::fs::read(self.path(name)).expect("an image");
        image.resize(image.len().next_multiple_of(CLUSTER as usize), 0);
        let counts = refcounts(&image);
        let table = (word(&image, word(&image, 40) as usize + 3 * 8) & !(1 << 63)) as usize;
        let mut entry = table + CLUSTER as usize;
        for cluster in 0..image.len() / CLUSTER as usize {
            let count = counts + 2 * cluster;
            if image[count..count + 2] == [0, 0] {
                entry -= 8;
                image[count + 1] = 1;
                let content = (1 << 63) | (cluster as u64 * CLUSTER) | 1;
                image[entry..entry + 8].copy_from_slice(&content.to_be_bytes());
            }
        }
        std::fs::write(self.path(name), image).expect("room");
        assert_eq!(self.check(name), Some(0), "{name} is not clean");
    }

    fn check(&self, name: &str) -> Option<i32> {
        let mut command = Command::new(self.qemu[0]);
        run(command.args(["check", "-q"]).args(self.options(name))).code
    }

    /// The command with the names of the files, and the key.
    fn command(&self, words: &[&str]) -> Vec<String> {
        let named = |word: &&str| match *word {
            "SOURCE" => self.disk.path().to_owned(),
            "DISK" | "BASE" | "OVER" | "BROKEN" => self.path(&word.to_lowercase()),
            word => word.to_owned(),
        };
        let mut words: Vec<String> = words.iter().map(named).collect();
        if let (Some(key), true) = (&self.key, takes_a_key(&words)) {
            words.extend(["--key-file".to_owned(), key.clone()]);
        }
        words
    }

    fn run(&self, words: &[&str]) -> Outcome {
        nbd_cli(&self.command(words))
    }

    /// Runs a command while an image can grow by `room` bytes; returns whether it succeeds.
    fn run_with_room(&self, words: &[&str], grows: &str, room: u64) -> bool {
        let length = std::fs::metadata(self.path(grows)).expect("an image").len();
        let mut limited = Command::new(self.qemu[2]);
        limited.arg(format!("--fsize={}:", length + room)).arg(PROGRAM);
        let outcome = run(limited.args(self.command(words)));
        let is_one_line = outcome.code == Some(0) || outcome.stderr.lines().count() == 1;
        assert!(matches!(outcome.code, Some(0..=2)) && is_one_line, "{words:?}: {outcome:?}");
        outcome.code == Some(0)
    }

    /// Size, content, snapshots and bitmaps of an image.
    fn state(&self, name: &str, leaves: Leaves) -> String {
        let named = name.to_uppercase();
        let info = self.run(&["image", "info", &named]).success();
        let kept = |line: &&str| {
            let facts = ["virtual size", "backing file:", "snapshot", "refcount"];
            facts.iter().any(|fact| line.trim().starts_with(fact))
        };
        let facts: Vec<&str> = info.lines().filter(kept).collect();
        let copy = self.disk.beside("content");
        let words = self.command(&["image", "convert", "-O", "raw", &named, &copy]);
        nbd_cli(&words).success();
        let content = nbd_cli(&["checksum", &copy]).success();
        std::fs::remove_file(copy).expect("the copy");
        let bitmaps = self.run(&["bitmap", "list", &named]).success();
        assert!(!bitmaps.contains("inconsistent"), "{bitmaps}");
        let bitmaps = if leaves == Leaves::Whole { bitmaps } else { String::new() };
        format!("{facts:?}\n{content}{bitmaps}")
    }

    fn put_back(&self) {
        for name in ["disk", "base", "over", "broken"] {
            std::fs::copy(self.start(name), self.path(name)).expect("room");
        }
    }

    /// Runs a command for each amount of room, until it succeeds.
    fn try_case(&self, (words, grows, judged, leaves): Case) {
        self.put_back();
        let before = self.state(judged, leaves);
        self.run(words).success();
        let after = self.state(judged, leaves);
        let rooms = [0, 1, 2, 3, 4, 6, 8, 32, 128, 512].into_iter();
        for room in rooms.map(|clusters| clusters * CLUSTER) {
            let what = format!("{words:?} with room for {room} bytes, key {:?}", self.key);
            self.put_back();
            let is_done = self.run_with_room(words, grows, room);
            if !is_done && leaves != Leaves::Marked {
                let found = self.state(judged, leaves);
                let is_whole = leaves == Leaves::Part || found == before || found == after;
                assert!(is_whole, "{what}: {found}, not {before}");
                let is_sound = judged == "broken" || self.check(judged) == Some(0);
                assert!(is_sound && self.check(grows) != Some(1), "{what}: it is damaged");
            }
            if !is_done {
                self.run(words).success();
            }
            assert_eq!(self.state(judged, leaves), after, "{what}");
            assert_eq!((self.check(judged), self.check(grows)), (Some(0), Some(0)), "{what}");
            if is_done {
                return;
            }
        }
        panic!("{words:?} always fails");
    }
}

/// Commands in the form of qemu-img get it in another way, and a check needs none.
fn takes_a_key(words: &[String]) -> bool {
    words[0] != "qemu-img" && words[1] != "check"
}

fn word(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes"))
}

/// The only refcount block.
fn refcounts(image: &[u8]) -> usize {
    word(image, word(image, 48) as usize) as usize
}

fn try_all(is_encrypted: bool) {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", prlimit = "prlimit");
    let images = Images::new([&qemu_img, &qemu_io, &prlimit], is_encrypted);
    let cases = CASES.into_iter();
    cases.filter(|case| !is_encrypted || case.0[0] != "qemu-img").for_each(|case| {
        images.try_case(case);
    });
}

#[test]
fn a_command_that_fails_on_a_full_disk_keeps_the_image_and_can_be_repeated() {
    try_all(false);
}

#[test]
fn so_does_one_that_changes_an_encrypted_image() {
    try_all(true);
}
