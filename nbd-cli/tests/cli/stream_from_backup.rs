//! Overlays on backups of a repository: they are used at once, streamed while clients use them, and
//! stand alone when the repository is gone. Judged by qemu-img.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nbd_client::blocking::Client;
use nbd_client::{Bytes, Durability, Error, MetaContextName, Speed, ZeroMode};
use rustix::process::Signal;

use super::control_stream::{connect, say, wait_for};
use crate::support::image::{are_equal, info, is_clean, json};
use crate::support::machine::Machine;
use crate::support::qemu_nbd::wait_until;
use crate::support::random::Random;
use crate::support::{Disk, Server, nbd_cli, peer, run};
use crate::tools;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;

/// A disk of which the first half and the last 4 MiB are data, its backup, and an overlay on that.
struct OnBackup {
    directory: Disk,
    content: Vec<u8>,
    repository: String,
    overlay: String,
}

impl OnBackup {
    fn new() -> Self {
        let directory = Disk::sparse();
        let mut content: Vec<u8> = (0..SIZE).map(|at| (at >> 12) as u8 | 1).collect();
        content[12 << 20..20 << 20].fill(0);
        let disk = directory.beside("vm.img");
        std::fs::write(&disk, &content).expect("a disk");
        Self { content, ..Self::of(directory, &disk) }
    }

    /// Makes a backup of a disk, which is removed then.
    fn of(directory: Disk, disk: &str) -> Self {
        let repository = directory.beside("repository");
        nbd_cli(&["repo", "init", &repository]).success();
        nbd_cli(&["backup", "-q", "--name", "vm", disk, &repository]).success();
        std::fs::remove_file(disk).expect("the disk is lost");
        let overlay = directory.beside("restored.qcow2");
        let backup = format!("backup:{repository}/vm@latest");
        let create = ["image", "create", "-f", "qcow2", "-b", &backup, "-F", "raw", &overlay];
        nbd_cli(&create).success();
        Self { directory, content: Vec::new(), repository, overlay }
    }

    fn control(&self) -> String {
        self.directory.beside("control")
    }

    fn serve(&self) -> Server {
        let control = self.control();
        let _ = std::fs::remove_file(&control);
        let more = ["--control", &control, "--trust-image", "--allocation-depth"];
        Server::ours(&[&more[..], &[&self.overlay]].concat())
    }

    /// Checks that the overlay needs nothing else, and holds this.
    #[track_caller]
    fn stands_alone(&self, qemu_img: &Path, content: &[u8]) {
        std::fs::remove_dir_all(&self.repository).expect("it is not needed");
        let flat = self.directory.beside("flat.img");
        std::fs::write(&flat, content).expect("room");
        assert!(info(qemu_img, &self.overlay).get("backing-filename").is_none());
        is_clean(qemu_img, &self.overlay);
        are_equal(qemu_img, &self.overlay, &flat);
        let map = json(qemu_img, &["map", "--output=json", &self.overlay]);
        let extents = map.as_array().expect("extents");
        assert!(extents.iter().all(|extent| extent["depth"] == 0), "{map}");
        nbd_cli(&["image", "compare", &self.overlay, &flat]).success();
    }

    /// Lets qemu-img look at the overlay alone, with its backup out of sight: a crash leaves leaks
    /// at worst.
    #[track_caller]
    fn is_sound(&self, qemu_img: &Path) {
        let name = format!(
            r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{}"}}}}"#,
            self.overlay
        );
        let check = run(Command::new(qemu_img).args(["check", &name]));
        assert!(matches!(check.code, Some(0 | 3)), "{check:?}");
    }
}

fn read(client: &Client) -> Vec<u8> {
    client.read(0..SIZE).expect("the disk").to_vec()
}

/// The bytes of each depth: absent, in the overlay, in the backup.
fn depths(client: &Client) -> [u64; 3] {
    let mut found = [0; 3];
    for extent in client.extents(&MetaContextName::qemu_allocation_depth(), 0..SIZE) {
        let extent = extent.expect("the depth");
        found[extent.flags as usize] += extent.length;
    }
    found
}

#[test]
fn disk_on_a_backup_is_used_streamed_and_needs_no_repository() {
    tools!(qemu_img = "qemu-img");
    let made = OnBackup::new();
    let (server, control) = (made.serve(), made.control());
    let (client, mut expected) = (connect(&server), made.content.clone());
    assert!(read(&client) == expected, "the disk is there at once");
    assert_eq!(depths(&client), [0, 0, SIZE]);
    let write = |expected: &mut Vec<u8>, at: u64, byte: u8, length: u64| {
        let data = Bytes::from(vec![byte; length as usize]);
        client.write(at, data, Durability::Cached).expect("it is written");
        expected[at as usize..(at + length) as usize].fill(byte);
    };
    write(&mut expected, 5 * MIB + 100, 7, 1000);
    assert_eq!(depths(&client), [0, 64 << 10, SIZE - (64 << 10)]);
    say(&control, &["stream", "", "--rate", "2M"]).success();
    wait_for(&control, "under way", |state| state["done"].as_u64() >= Some(2 * MIB));
    // Writes where the stream has been, and where it will be; the depth is that of this moment.
    write(&mut expected, MIB + 4096, 8, 100_000);
    write(&mut expected, 22 * MIB, 9, 4096);
    let before = depths(&client);
    assert!(before[1] > 2 * MIB && before[2] > 0 && before[0] == 0, "{before:?}");
    assert!(read(&client) == expected);
    let after = depths(&client);
    assert!(after[1] >= before[1] && after.iter().sum::<u64>() == SIZE, "{before:?}, {after:?}");
    say(&control, &["stream", "", "--cancel"]).success();
    let cancelled = depths(&client);
    say(&control, &["stream", ""]).success();
    wait_for(&control, "complete", |state| state["phase"] == "complete");
    let streamed = depths(&client);
    assert!(cancelled[1] >= after[1] && streamed == [0, SIZE, 0], "{cancelled:?}, {streamed:?}");
    assert!(read(&client) == expected);
    // No pin is left in the repository either.
    let stats = nbd_cli(&["repo", "list", "--json", &made.repository]).success();
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
    assert_eq!(stats["readers"].as_array().map(Vec::len), Some(0), "{stats}");
    std::fs::rename(&made.repository, made.directory.beside("gone")).expect("it is renamed");
    assert!(read(&client) == expected);
    write(&mut expected, 13 * MIB, 3, MIB);
    std::fs::rename(made.directory.beside("gone"), &made.repository).expect("it is renamed");
    client.disconnect().expect("an end");
    server.end();
    made.stands_alone(&qemu_img, &expected);
}

/// The bytes of data that the file of an image gives its disk, whatever a server has in memory.
fn on_disk(qemu_img: &Path, overlay: &str) -> u64 {
    let name = format!(
        r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{overlay}"}}}}"#
    );
    let map = json(qemu_img, &["map", "-U", "--output=json", &name]);
    let extents = map.as_array().expect("extents").iter();
    let data = extents.filter(|extent| extent["data"] == true);
    data.map(|extent| extent["length"].as_u64().expect("a length")).sum()
}

#[test]
fn stream_that_is_killed_keeps_what_it_flushed_on_its_way_and_tells_it() {
    tools!(qemu_img = "qemu-img");
    let made = OnBackup::new();
    let (mut server, control) = (made.serve(), made.control());
    // It would take a minute, and no client flushes.
    say(&control, &["stream", "", "--rate", "300K"]).success();
    wait_until("something is flushed", || on_disk(&qemu_img, &made.overlay) >= MIB);
    wait_for(&control, "running", |state| state["phase"] == "running");
    server.signal(Signal::KILL);
    server.wait();
    made.is_sound(&qemu_img);
    let kept = on_disk(&qemu_img, &made.overlay);
    let server = made.serve();
    let client = connect(&server);
    let found = depths(&client);
    assert!(kept >= MIB && found == [0, kept, SIZE - kept], "{kept}: {found:?}");
    say(&control, &["stream", "", "--rate", "1"]).success();
    wait_for(&control, "where it was", |state| state["done"].as_u64() >= Some(kept));
    assert!(read(&client) == made.content);
    say(&control, &["stream", "", "--cancel"]).success();
    client.disconnect().expect("an end");
    server.end();
}

#[test]
fn machine_runs_on_a_backup_while_it_is_streamed_from() {
    let Some(machine) = Machine::find() else { return };
    tools!(qemu_img = "qemu-img", mke2fs = "mke2fs", e2fsck = "e2fsck");
    let directory = Disk::sparse();
    let (tree, disk) = (directory.beside("tree"), directory.beside("vm.img"));
    std::fs::create_dir(&tree).expect("a directory");
    let mut random = Random::new(1);
    for file in 0..24 {
        let bytes: Vec<u8> = (0..256 << 10).map(|_| random.below(256) as u8).collect();
        std::fs::write(format!("{tree}/{file}"), bytes).expect("room");
    }
    let sums = run(Command::new("sh").args(["-c", "cd \"$0\" && sha256sum *", &tree])).success();
    std::fs::write(format!("{tree}/sums"), sums).expect("room");
    peer(&mke2fs, &["-q", "-t", "ext4", "-d", &tree, &disk, "48M"]);
    let made = OnBackup::of(directory, &disk);
    let (server, control) = (made.serve(), made.control());
    say(&control, &["stream", "", "--rate", "200K"]).success();
    let script = "mount -t ext4 /dev/vda /mnt
cd /mnt
sha256sum -c sums
rm 3
dd if=/dev/urandom of=new bs=64k count=16
sha256sum new > sum
cd /
umount /mnt
mount -t ext4 /dev/vda /mnt
cd /mnt
sha256sum -c sum
cd /
umount /mnt
";
    machine.run(script, &[Path::new(server.uri())]);
    say(&control, &["stream", "", "--cancel"]).success();
    say(&control, &["stream", ""]).success();
    wait_for(&control, "complete", |state| state["phase"] == "complete");
    server.end();
    std::fs::remove_dir_all(&made.repository).expect("it is not needed");
    is_clean(&qemu_img, &made.overlay);
    peer(&qemu_img, &["convert", "-O", "raw", &made.overlay, &disk]);
    peer(&e2fsck, &["-fn", &disk]);
}

/// A change that a client asks for.
struct Change {
    at: u64,
    length: u64,
    byte: u8,
}

impl Change {
    fn random(random: &mut Random) -> Self {
        let at = random.below(SIZE / 512) * 512;
        let length = ((random.below(400) + 1) * 512).min(SIZE - at);
        // A sixth are zeroes.
        let byte = if random.below(6) == 0 { 0 } else { random.below(255) as u8 + 1 };
        Self { at, length, byte }
    }

    fn request(&self, client: &Client) -> Result<(), Error> {
        let Self { at, length, byte } = *self;
        if byte == 0 {
            let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
            return client.write_zeroes(at..at + length, mode, speed, Durability::Cached);
        }
        client.write(at, Bytes::from(vec![byte; length as usize]), Durability::Cached)
    }

    fn apply(&self, content: &mut [u8]) {
        content[self.at as usize..(self.at + self.length) as usize].fill(self.byte);
    }
}

/// Writes until the server is killed, which another thread does after some time, and flushes now
/// and then. Puts what was flushed into `content`, and returns the changes since then.
fn write_until_killed(
    server: &Server,
    client: &Client,
    content: &mut [u8],
    random: &mut Random,
) -> Vec<Change> {
    let time = Duration::from_micros(random.below(300_000));
    let mut unsure: Vec<Change> = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(time);
            server.signal(Signal::KILL);
        });
        loop {
            let change = Change::random(random);
            let made = change.request(client);
            unsure.push(change);
            if made.is_err() {
                return;
            }
            if random.below(8) == 0 {
                if client.flush().is_err() {
                    return;
                }
                unsure.drain(..).for_each(|change| change.apply(content));
            }
        }
    });
    unsure
}

/// Checks that a disk has what was flushed, or in each sector one of the later changes.
#[track_caller]
fn has_flushed(found: &[u8], flushed: &[u8], unsure: &[Change]) {
    for (index, (found, flushed)) in found.chunks(512).zip(flushed.chunks(512)).enumerate() {
        let at = index as u64 * 512;
        let covers = |change: &&Change| (change.at..change.at + change.length).contains(&at);
        let is_changed = |change: &Change| found.iter().all(|byte| *byte == change.byte);
        let changed = unsure.iter().filter(covers).any(is_changed);
        assert!(found == flushed || changed, "at {at}: {} for {}", found[0], flushed[0]);
    }
}

#[test]
fn server_killed_at_any_moment_of_a_stream_from_a_backup_loses_nothing() {
    tools!(qemu_img = "qemu-img");
    let mut random = Random::of_this_run(std::process::id().into());
    let made = OnBackup::new();
    let (control, mut content) = (made.control(), made.content.clone());
    for round in 0..6 {
        let mut server = made.serve();
        let client = connect(&server);
        // Without a limit, it is killed near the end of the stream.
        let rate: &[&str] = if round % 2 == 0 { &["--rate", "12M"] } else { &[] };
        say(&control, &[&["stream", ""], rate].concat()).success();
        let unsure = write_until_killed(&server, &client, &mut content, &mut random);
        server.wait();
        made.is_sound(&qemu_img);
        let server = made.serve();
        let client = connect(&server);
        has_flushed(&read(&client), &content, &unsure);
        for change in unsure {
            change.request(&client).expect("it is written");
            change.apply(&mut content);
        }
        assert!(read(&client) == content, "round {round}");
        client.disconnect().expect("an end");
        server.end();
        made.is_sound(&qemu_img);
    }
    let server = made.serve();
    say(&control, &["stream", ""]).success();
    wait_for(&control, "complete", |state| state["phase"] == "complete");
    let client = connect(&server);
    assert!(read(&client) == content);
    client.disconnect().expect("an end");
    server.end();
    // Kills leave leaks.
    nbd_cli(&["image", "check", "-r", "leaks", &made.overlay]).success();
    made.stands_alone(&qemu_img, &content);
}
