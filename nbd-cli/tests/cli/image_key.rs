//! `image key` and `qemu-img amend` with keys, judged by `cryptsetup` and QEMU.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_img::{compare_all, ours, words};
use crate::support::{Disk, PROGRAM, nbd_cli, peer, run, says};
use crate::tools;

/// Key files whose contents must never be shown.
fn keys(disk: &Disk) -> [String; 3] {
    ["first", "second", "third"].map(|name| {
        let file = disk.beside(name);
        std::fs::write(&file, format!("never-in-any-log {name}")).expect("room");
        file
    })
}

fn image(disk: &Disk, format: &str, key: &str) -> String {
    let image = disk.beside(&format!("disk.{format}"));
    let create = ["image", "create", "--format", format, "--encrypt", &image, "2M"];
    nbd_cli(&[&create[..], &["--key-file", key, "--iter-time", "10ms"]].concat()).success();
    image
}

fn is_opened(qemu_io: &Path, format: &str, image: &str, key: &str) -> bool {
    let name = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
    let mut command = Command::new(qemu_io);
    command.args(["-r", "--object", &format!("secret,id=s,file={key}"), "--image-opts"]);
    command.arg(format!("driver={format},{name}=s,file.filename={image}"));
    let outcome = run(command.args(["-c", "read 0 4k"]));
    if format == "luks" {
        let test = ["open", "--test-passphrase", "--key-file", key, image];
        let tested = run(Command::new("cryptsetup").args(test));
        assert_eq!(tested.code == Some(0), outcome.code == Some(0), "{tested:?} {outcome:?}");
    }
    outcome.code == Some(0)
}

#[test]
fn passphrases_are_listed_added_changed_and_removed() {
    tools!(qemu_io = "qemu-io", _cryptsetup = "cryptsetup");
    for format in ["luks", "qcow2"] {
        let disk = Disk::sparse();
        let [first, second, third] = keys(&disk);
        let image = image(&disk, format, &first);
        let key = |arguments: &[&str]| {
            let outcome = nbd_cli(&[&["-vv", "image", "key"], arguments, &[&image]].concat());
            assert!(!format!("{outcome:?}").contains("never-in-any-log"), "{outcome:?}");
            outcome.success()
        };
        let quick = ["--iter-time", "10ms"];
        let add = ["add", "--key-file", &first, "--slot", "5", "--new-key-file", &second];
        assert_eq!(key(&[&add[..], &quick].concat()), "added: key slot 5\n");
        let listed = key(&["list"]);
        let line = |number: usize| listed.lines().nth(number).unwrap_or_default().to_owned();
        assert!(line(0).starts_with("key slot 0: in use, 1"), "{listed}");
        assert_eq!((line(1), line(7)), ("key slot 1: free".into(), "key slot 7: free".into()));
        assert!(line(5).starts_with("key slot 5: in use"), "{listed}");
        let json: serde_json::Value =
            serde_json::from_str(&key(&["list", "--json"])).expect("JSON");
        let active = [0, 1, 5].map(|slot: usize| json[slot]["active"] == true);
        assert_eq!(active, [true, false, true]);
        let change = ["change", "--key-file", &first, "--new-key-file", &third];
        let changed = key(&[&change[..], &quick].concat());
        assert_eq!(changed, "added: key slot 1\nremoved: key slot 0\n");
        let opened = [&first, &second, &third].map(|key| is_opened(&qemu_io, format, &image, key));
        assert_eq!(opened, [false, true, true], "{format}");
        let remove = ["remove", "--key-file", &third, "--old-key-file", &second];
        assert_eq!(key(&remove), "removed: key slot 5\n");
        assert!(!is_opened(&qemu_io, format, &image, &second));
        // By descriptors, as from a password manager.
        let script = format!(
            "'{PROGRAM}' image key add --key-file /dev/fd/3 --new-key-file - --iter-time 10ms \
             '{image}' 3< '{third}' < '{second}'"
        );
        let outcome = run(Command::new("sh").args(["-c", &script]));
        assert_eq!(outcome.stdout, "added: key slot 0\n", "{outcome:?}");
        assert_eq!(key(&["remove", "--key-file", &second, "--slot", "1"]), "removed: key slot 1\n");
        assert!(is_opened(&qemu_io, format, &image, &second));
    }
}

#[test]
fn a_change_of_keys_that_would_lose_the_disk_or_is_not_possible_is_refused() {
    let disk = Disk::sparse();
    let [first, second, _] = keys(&disk);
    let image = image(&disk, "luks", &first);
    let before = std::fs::read(&image).expect("the image");
    let key = |arguments: &[&str]| nbd_cli(&[&["image", "key"], arguments].concat());
    let remove = ["remove", &image, "--key-file", &first];
    says(key(&[&remove[..], &["--slot", "0"]].concat()), &["last key slots in use"]);
    says(key(&[&remove[..], &["--slot", "1"]].concat()), &["not in use"]);
    let both = [&remove[..], &["--slot", "0", "--old-key-file", &first]].concat();
    assert!(key(&remove).code == Some(1) && key(&both).code == Some(1));
    let add = ["add", &image, "--new-key-file", &second];
    says(key(&add), &["no passphrase was given"]);
    says(key(&[&add[..], &["--key-file", &second]].concat()), &["opens none of its key slots"]);
    let empty = ["add", &image, "--key-file", &first, "--new-key-file", "/dev/null"];
    says(key(&empty), &["is empty"]);
    says(key(&["list", disk.path()]), &["not encrypted with LUKS"]);
    says(
        nbd_cli(&["image", "amend", "-o", "encrypt.state=active", disk.path()]),
        &["nbd-cli image key"],
    );
    assert!(std::fs::read(&image).expect("the image") == before);
}

#[test]
fn amend_changes_keys_with_the_options_of_qemu() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", _cryptsetup = "cryptsetup");
    for (format, prefix) in [("luks", ""), ("qcow2", "encrypt.")] {
        let disk = Disk::sparse();
        let [first, second, third] = keys(&disk);
        let image = image(&disk, format, &first);
        let driver = format!("driver={format},{prefix}key-secret=a,file.filename={image}");
        let here = Path::new(&image).parent().expect("a directory");
        let line = |options: &str| {
            let mut line = "amend".to_owned();
            for (id, file) in [("a", &first), ("b", &second), ("c", &third)] {
                line += &format!(" --object secret,id={id},file={file}");
            }
            let options: Vec<_> =
                options.split(',').map(|option| format!("{prefix}{option}")).collect();
            words(&format!("{line} -o {} --image-opts {driver}", options.join(",")))
        };
        for options in
            ["state=active,new-secret=b,iter-time=10", "state=active,new-secret=c,keyslot=6"]
        {
            let outcome = ours(here, &line(options));
            assert_eq!(outcome.code, Some(0), "{outcome:?}");
            assert!(!format!("{outcome:?}").contains("never-in-any-log"), "{outcome:?}");
        }
        assert!([&second, &third].iter().all(|key| is_opened(&qemu_io, format, &image, key)));
        // QEMU erases the one, and we the other.
        let theirs = line("state=inactive,keyslot=6");
        peer(&qemu_img, &theirs.iter().map(String::as_str).collect::<Vec<_>>());
        let outcome = ours(here, &line("state=inactive,old-secret=b"));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let opened = [&first, &second, &third].map(|key| is_opened(&qemu_io, format, &image, key));
        assert_eq!(opened, [true, false, false], "{format}");
    }
}

#[test]
fn amend_refuses_keys_as_qemu_does() {
    let luks = "--image-opts driver=luks,key-secret=s,file.filename=a.luks";
    let qcow2 = "--image-opts driver=qcow2,encrypt.key-secret=s,file.filename=locked.qcow2";
    let objects = "--object secret,id=s,data=x --object secret,id=n,data=y";
    let mut cases = String::new();
    for (prefix, image) in [("", luks), ("encrypt.", qcow2)] {
        for options in [
            "state=active",
            "state=nosuch",
            "state=active,new-secret=nosuch",
            "state=active,new-secret=n,old-secret=s",
            "state=active,new-secret=n,keyslot=8",
            "state=active,new-secret=n,keyslot=0",
            "state=active,new-secret=n,iter-time=x",
            "new-secret=n",
            "state=inactive",
            "state=inactive,keyslot=0",
            "state=inactive,keyslot=3",
            "state=inactive,keyslot=8",
            "state=inactive,old-secret=s",
            "state=inactive,old-secret=n",
            "state=inactive,old-secret=s,new-secret=n",
            "state=inactive,keyslot=1,iter-time=10",
        ] {
            let options: Vec<_> =
                options.split(',').map(|option| format!("{prefix}{option}")).collect();
            cases += &format!("amend {objects} -o {} {image}\n", options.join(","));
        }
    }
    compare_all(&cases);
}
