//! Backups of a repository as a chain of qcow2 files.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::Value;

use crate::support::image::{are_equal, info, is_clean, json as qemu_json, write};
use crate::support::{Disk, json, nbd_cli, says};
use crate::tools;

/// A disk of which backups are made, and the states that they have.
struct Lab {
    disk: Disk,
    repository: String,
    /// The identity and a copy of each backup.
    states: Vec<(String, String)>,
}

impl Lab {
    fn new() -> Self {
        let disk = Disk::sparse();
        let repository = disk.beside("repository");
        nbd_cli(&["repo", "init", &repository]).success();
        Self { disk, repository, states: Vec::new() }
    }

    /// Changes the disk, and backs it up.
    fn back_up(&mut self, change: impl FnOnce(&File)) {
        let path = self.disk.path();
        change(&File::options().write(true).open(path).expect("the disk"));
        let made = json(&["backup", "--json", "--name", "vm 1:a", path, &self.repository]);
        let copy = self.disk.beside(&format!("{}.state", self.states.len()));
        std::fs::copy(path, &copy).expect("room");
        self.states.push((made["id"].as_str().expect("text").to_owned(), copy));
    }

    fn export(&self, name: &str, folder: &str) -> Vec<Value> {
        let exported = json(&["repo", "export", "--json", &self.repository, name, folder]);
        exported.as_array().expect("a list").clone()
    }

    /// Checks that QEMU finds each of these files sound, and in it the disk of its backup.
    #[track_caller]
    fn judge(&self, qemu_img: &Path, files: &[Value]) {
        for file in files {
            let path = file["file"].as_str().expect("a path");
            let (_, state) =
                self.states.iter().find(|(id, _)| file["id"] == **id).expect("a backup of ours");
            is_clean(qemu_img, path);
            are_equal(qemu_img, state, path);
        }
    }
}

#[test]
fn exported_chain_has_each_backup_for_qemu() {
    tools!(qemu_img = "qemu-img");
    let mut lab = Lab::new();
    lab.back_up(|_| {});
    lab.back_up(|disk| disk.write_all_at(&[7; 70_000], (2 << 20) + 5).expect("room"));
    lab.back_up(|disk| disk.write_all_at(&[0; 512 << 10], 256 << 10).expect("room"));
    // Grown, beyond a map page and to a size that no image can have; and cut off.
    lab.back_up(|disk| {
        disk.set_len((40 << 20) + 777).expect("room");
        disk.write_all_at(&[9; 1000], (40 << 20) - 300).expect("room");
    });
    lab.back_up(|disk| disk.write_all_at(&[5; 1000], 1 << 20).expect("room"));
    lab.back_up(|disk| disk.set_len((4 << 20) + 1024).expect("room"));
    lab.back_up(|disk| disk.set_len((2 << 20) + 100).expect("room"));
    let folder = lab.disk.beside("chain");
    let files = lab.export("vm 1:a", &folder);
    assert_eq!(files.len(), 7);
    lab.judge(&qemu_img, &files);
    let path = |index: usize| files[index]["file"].as_str().expect("a path");
    assert!(path(0).contains("/vm_1_a-20"), "{}", path(0));
    // What did not change is in no other file; what became zero is written down as that.
    for (index, copied) in [(1, 192 << 10), (2, 0), (4, 64 << 10)] {
        assert!(files[index]["copied"].as_u64() <= Some(copied), "{:?}", files[index]);
        let info = info(&qemu_img, path(index));
        assert_eq!(info["full-backing-filename"], path(index - 1));
        let name = Path::new(path(index - 1)).file_name().expect("a name").to_str();
        assert_eq!(info["backing-filename"].as_str(), name, "it can be moved");
        assert!(info["actual-size"].as_u64() < Some(1 << 20), "{info}");
    }
    let map = qemu_json(&qemu_img, &["map", "--output=json", path(2)]);
    let zeroes = map.as_array().expect("a list").iter();
    let zeroes = zeroes.filter(|it| it["depth"] == 0 && it["zero"] == true);
    assert_eq!(zeroes.map(|it| it["length"].as_u64().unwrap_or(0)).sum::<u64>(), 512 << 10);
    // The end of a smaller disk would show what is behind it in the larger one.
    assert_eq!(files[6]["base"], Value::Null);
    // The folder moves as a whole; each file has the sum of what it holds.
    let moved = lab.disk.beside("moved");
    std::fs::rename(&folder, &moved).expect("it is moved");
    let newest = path(5).replace(&folder, &moved);
    let restored = lab.disk.beside("restored");
    let said = nbd_cli(&["restore", &newest, &restored]).success();
    assert!(said.contains("6 of 6 files as recorded"), "{said}");
    assert!(std::fs::read(restored).ok() == std::fs::read(&lab.states[5].1).ok());
}

#[test]
fn export_goes_on_where_an_earlier_one_ended() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let mut lab = Lab::new();
    lab.back_up(|_| {});
    lab.back_up(|disk| disk.write_all_at(&[1; 1000], 0).expect("room"));
    let folder = lab.disk.beside("chain");
    let first = lab.export("vm 1:a", &folder);
    // The oldest is gone, a new one is there, and a killed export has left a part of it.
    nbd_cli(&["repo", "forget", &lab.repository, &lab.states[0].0]).success();
    lab.back_up(|disk| disk.write_all_at(&[2; 1000], 5 << 20).expect("room"));
    let again = lab.export("vm 1:a", &lab.disk.beside("other"));
    let name = Path::new(again[1]["file"].as_str().expect("a path")).file_name().expect("a name");
    let partial = Path::new(&folder).join(name).with_extension("qcow2.partial");
    std::fs::write(&partial, "a part").expect("room");
    let second = lab.export("vm 1:a", &folder);
    assert!(!partial.exists());
    assert_eq!(second.len(), 2, "{second:?}");
    assert_eq!((&second[0]["new"], &second[1]["new"]), (&false.into(), &true.into()));
    assert_eq!(second[1]["base"], first[1]["file"]);
    lab.judge(&qemu_img, &[first.clone(), second.clone()].concat());
    // One by itself needs no other.
    let alone = lab.export(&format!("vm 1:a@{}", lab.states[1].0), &lab.disk.beside("alone"));
    assert_eq!((alone.len(), &alone[0]["base"]), (1, &Value::Null));
    lab.judge(&qemu_img, &alone);
    // A file that was changed, and one that is not there, are nothing to build on.
    let export = || nbd_cli(&["repo", "export", &lab.repository, "vm 1:a", &folder]);
    let below = first[0]["file"].as_str().expect("a path");
    let aside = lab.disk.beside("aside");
    std::fs::rename(below, &aside).expect("it is moved");
    let newest = second[1]["file"].as_str().expect("a path");
    let kept = std::fs::read(newest).expect("a file");
    says(export(), &[below]);
    std::fs::rename(&aside, below).expect("it is moved back");
    write(&qemu_io, newest, "write -P 3 0 64k");
    says(export(), &["was changed since", "move it away"]);
    std::fs::remove_file(newest).expect("it is removed");
    export().success();
    assert_eq!(std::fs::read(newest).expect("a file").len(), kept.len());
    says(nbd_cli(&["repo", "export", &lab.repository, "nobody", &folder]), &["no backup of"]);
}

#[test]
fn export_of_an_encrypted_repository_is_asked_for() {
    let disk = Disk::sparse();
    let (repository, passphrase) = (disk.beside("repository"), disk.beside("passphrase"));
    std::fs::write(&passphrase, "correct horse").expect("room");
    let with = ["--passphrase-file", &*passphrase];
    nbd_cli(&[&["repo", "init", "--encrypt", &repository], &with[..]].concat()).success();
    nbd_cli(&[&["backup", "--name", "vm", disk.path(), &repository], &with[..]].concat()).success();
    let folder = disk.beside("chain");
    let export = ["repo", "export", &repository, "vm", &folder];
    says(nbd_cli(&[&export[..], &with].concat()), &["is encrypted", "--decrypt"]);
    assert!(!Path::new(&folder).exists());
    nbd_cli(&[&export[..], &with, &["--decrypt"]].concat()).success();
    let files = std::fs::read_dir(folder).expect("a folder");
    let files: Vec<_> = files.map(|file| file.expect("an entry").path()).collect();
    let file = files[0].to_str().expect("a plain name");
    nbd_cli(&["image", "compare", "-f", "raw", disk.path(), file]).success();
}
