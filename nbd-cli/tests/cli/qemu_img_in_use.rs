//! The qemu-img form where QEMU's own tests found differences: images that others use or that are
//! cut off, sizes, passphrases, titles. Both programs work in one directory, one after the other.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_img::{compare_all, ours, theirs, words};
use crate::support::{Server, run};
use crate::tools;

/// Runs a line with both programs and compares exit codes and outputs.
#[track_caller]
fn compare(directory: &Path, line: &str, code: i32) {
    let expected = theirs(directory, &format!("qemu-img {line}"));
    let actual = ours(directory, &words(line));
    assert_eq!((expected.code, actual.code), (Some(code), Some(code)), "{line}: {actual:?}");
    if code == 0 {
        assert_eq!(actual.stdout, expected.stdout, "{line}");
    }
}

#[test]
fn an_overlay_is_made_above_the_disk_of_a_running_machine_and_its_bitmaps_are_changed() {
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    theirs(here, "qemu-img create -q -f qcow2 low.qcow2 1M").success();
    theirs(here, "qemu-img create -q -f qcow2 -b low.qcow2 -F qcow2 top.qcow2").success();
    // It may write to the image, as a machine does, and has locked it.
    let low = here.join("low.qcow2");
    let arguments = ["-f", "qcow2", low.to_str().expect("a plain name")];
    let server = Server::qemu_nbd(&qemu_nbd, "low", &arguments);
    let described = || {
        let info = theirs(here, "qemu-img info top.qcow2").success();
        let is_left = |line: &&str| !line.contains("disk size") && !line.contains("file length");
        info.lines().filter(is_left).map(str::to_owned).collect::<Vec<_>>()
    };
    for (line, code) in [
        ("create -f qcow2 -b low.qcow2 -F qcow2 new.qcow2", 0),
        ("create -f qcow2 -b low.qcow2 -F qcow2 new.qcow2 2M", 0),
        ("create -f qcow2 -o backing_file=top.qcow2,backing_fmt=qcow2 new.qcow2", 0),
        ("create -f qcow2 -b low.qcow2 -F raw new.qcow2", 0),
        ("rebase -u -b low.qcow2 -F qcow2 new.qcow2", 0),
        ("info new.qcow2", 0),
        ("bitmap --add --disable top.qcow2 b", 0),
        ("bitmap --enable top.qcow2 b", 0),
        ("bitmap --clear --image-opts driver=qcow2,file.filename=top.qcow2 b", 0),
        ("bitmap --remove top.qcow2 b", 0),
        ("bitmap --add low.qcow2 b", 1),
        ("map top.qcow2", 1),
        ("convert -O raw top.qcow2 copy.img", 1),
        ("create -f qcow2 -b low.qcow2 -F vmdk new.qcow2", 1),
        ("create -f qcow2 low.qcow2 1M", 1),
    ] {
        if line.starts_with("bitmap") && code == 0 {
            // Each program has an image of its own.
            std::fs::copy(here.join("top.qcow2"), here.join("before")).unwrap();
            let expected = theirs(here, &format!("qemu-img {line}"));
            assert_eq!(expected.code, Some(0), "{expected:?}");
            let after = described();
            std::fs::rename(here.join("before"), here.join("top.qcow2")).unwrap();
            ours(here, &words(line)).success();
            assert_eq!(described(), after, "{line}");
        } else {
            compare(here, line, code);
        }
    }
    drop(server);
    theirs(here, "qemu-io -c read_-P_0_0_64k new.qcow2").success();
}

#[test]
fn a_reading_command_names_the_option_that_opens_an_image_in_use() {
    tools!(_qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    for name in ["used.qcow2", "other.qcow2"] {
        theirs(here, &format!("qemu-img create -q -f qcow2 {name} 1M")).success();
    }
    let used = here.join("used.qcow2");
    let arguments = ["-f", "qcow2", used.to_str().expect("a plain name")];
    let server = Server::qemu_nbd(&qemu_nbd, "used", &arguments);
    for (line, can_share) in [
        ("info used.qcow2", true),
        ("info --backing-chain used.qcow2", true),
        ("check used.qcow2", true),
        ("map used.qcow2", true),
        ("measure -O raw used.qcow2", true),
        ("compare used.qcow2 other.qcow2", true),
        ("compare other.qcow2 used.qcow2", true),
        ("convert -O raw used.qcow2 new.img", true),
        ("dd if=used.qcow2 of=new.img", true),
        ("snapshot -l used.qcow2", true),
        ("resize used.qcow2 2M", false),
        ("snapshot -c a used.qcow2", false),
        ("check -r all used.qcow2", false),
        ("commit used.qcow2", false),
        ("rebase -b other.qcow2 -F qcow2 used.qcow2", false),
        ("bitmap --add --merge x -b used.qcow2 -F qcow2 other.qcow2 a", false),
    ] {
        let refused = ours(here, &words(line));
        assert!(![None, Some(0)].contains(&refused.code), "{line}: {refused:?}");
        assert!(refused.stderr.contains("open for writing"), "{line}: {refused:?}");
        let times = refused.stderr.matches("-U (--force-share)").count();
        assert_eq!(times, usize::from(can_share), "{line}: {refused:?}");
    }
    server.end();
}

#[test]
fn bitmaps_are_changed_without_the_backing_file() {
    compare_all(
        "
        bitmap --add orphan.qcow2 b ; bitmap --add --disable orphan.qcow2 c ; info orphan.qcow2 =>
        bitmap --add orphan.qcow2 b ; bitmap --add --merge b orphan.qcow2 c ; bitmap --remove orphan.qcow2 b ; info --output=json orphan.qcow2 =>
        bitmap --add --image-opts driver=qcow2,file.filename=orphan.qcow2 b ; info orphan.qcow2 =>
        bitmap --add json:{'driver':'qcow2','file.filename':'orphan.qcow2'} b ; info orphan.qcow2 =>
        bitmap --add --merge b1 -b bitmaps.qcow2 -F qcow2 orphan.qcow2 c ; info orphan.qcow2 =>
        ",
    );
}

#[test]
fn a_map_goes_on_past_the_end_of_a_file_that_was_cut_off() {
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    theirs(here, "qemu-img create -q -f qcow2 whole.qcow2 1M").success();
    let write = "-c write_-P_7_0_128k -c write_-z_256k_64k -c write_-P_5_512k_3k";
    theirs(here, &format!("qemu-io {write} whole.qcow2")).success();
    for length in [6 << 16, (6 << 16) - 3000, 5 << 16] {
        std::fs::copy(here.join("whole.qcow2"), here.join("disk.qcow2")).unwrap();
        compare(here, &format!("resize -q -f raw --shrink disk.qcow2 {length}"), 0);
        for line in ["map disk.qcow2", "map --output=json disk.qcow2"] {
            compare(here, line, 0);
        }
    }
}

#[test]
fn the_extents_of_a_vmdk_are_described_and_a_missing_one_is_an_error() {
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    std::fs::create_dir(here.join("sub")).unwrap();
    for line in [
        "create -q -f vmdk -o subformat=twoGbMaxExtentSparse sub/split.vmdk 5G",
        "create -q -f vmdk -o subformat=twoGbMaxExtentFlat flat.vmdk 3G",
        "create -q -f vmdk single.vmdk 100G",
        "create -q -f vmdk -o subformat=streamOptimized packed.vmdk 1M",
        "create -q -f qcow2 -b sub/split.vmdk -F vmdk top.qcow2",
    ] {
        theirs(here, &format!("qemu-img {line}")).success();
    }
    for image in ["sub/split.vmdk", "flat.vmdk", "single.vmdk", "packed.vmdk", "top.qcow2"] {
        compare(here, &format!("info {image}"), 0);
        compare(here, &format!("info --output=json {image}"), 0);
        compare(here, &format!("info --backing-chain {image}"), 0);
    }
    compare(here, "info --output=json --backing-chain top.qcow2", 0);
    let file = |name: &str| std::fs::File::options().write(true).open(here.join(name)).unwrap();
    file("single.vmdk").set_len(10 << 20).unwrap();
    file("sub/split-s003.vmdk").set_len(60_000).unwrap();
    std::fs::remove_file(here.join("flat-f002.vmdk")).unwrap();
    for image in ["sub/split.vmdk", "flat.vmdk", "single.vmdk"] {
        for command in ["info", "check", "map", "measure -O raw"] {
            compare(here, &format!("{command} {image}"), 1);
        }
    }
    compare(here, "info top.qcow2", 0);
    compare(here, "info --backing-chain top.qcow2", 1);
}

#[test]
fn a_map_of_direct_reads_has_whole_sectors() {
    tools!(_qemu_img = "qemu-img");
    // Direct I/O is not possible in all directories for temporary files.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let here = directory.path();
    std::fs::write(here.join("odd.img"), [7; 1000]).unwrap();
    for options in ["", ",cache.direct=on", ",cache.direct=off"] {
        let image = format!("--image-opts driver=raw,file.filename=odd.img{options}");
        compare(here, &format!("map --output=json {image}"), 0);
        compare(here, &format!("map {image}"), 0);
    }
}

#[test]
fn a_passphrase_that_qemu_cannot_use_makes_no_image_and_no_key() {
    const SECRETS: &str = "--object secret,id=s,data=x --object secret,id=b,file=binary";
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    std::fs::write(here.join("binary"), [0x3a, 0x3c, 0xff]).unwrap();
    let made = format!("create -q {SECRETS} -f luks -o key-secret=s,iter-time=10 good.luks 1M");
    theirs(here, &format!("qemu-img {made}")).success();
    let image = "--image-opts driver=luks,key-secret=s,file.filename=good.luks";
    for line in [
        "create -f luks -o key-secret=b,iter-time=10 a.luks 1M",
        "create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=b a.qcow2 1M",
        &format!("amend -o state=active,new-secret=b,iter-time=10 {image}"),
    ] {
        let (command, rest) = line.split_once(' ').expect("a command");
        let line = words(&format!("{command} {SECRETS} {rest}"));
        let theirs = run(Command::new("qemu-img").args(&line).current_dir(here));
        // That removes the image.
        std::fs::write(here.join("a.luks"), "before").unwrap();
        let _ = std::fs::remove_file(here.join("a.qcow2"));
        let ours = ours(here, &line);
        assert_eq!((ours.code, theirs.code), (Some(1), Some(1)), "{line:?}: {ours:?}");
        assert!(ours.stderr.contains("'b'"), "{ours:?}");
    }
    // What was there stays.
    assert_eq!(std::fs::read(here.join("a.luks")).unwrap(), b"before");
    assert!(!here.join("a.qcow2").exists());
    compare(here, &format!("map --output=json {SECRETS} {image}"), 0);
    let made = format!("create {SECRETS} -f luks -o key-secret=s,iter-time=0 usual.luks 1M");
    compare(here, &made, 0);
}

#[test]
fn the_title_of_the_help_of_options_names_the_format_without_a_target() {
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    for line in [
        "create -f qcow2 -o help",
        "create -f qcow2 -o help new.qcow2 1M",
        "create -f vdi -o help",
        "create -f vdi -o help new.vdi",
        "convert -O raw -o help",
        "convert -O raw -o help a.img",
        "convert -O luks -o help a.img b.luks",
    ] {
        let title = |text: String| text.lines().next().map(str::to_owned);
        let theirs = theirs(directory.path(), &format!("qemu-img {line}")).success();
        let ours = ours(directory.path(), &words(line)).success();
        assert_eq!(title(ours), title(theirs), "{line}");
    }
}

#[test]
fn sizes_may_have_a_point_without_a_fraction() {
    compare_all(
        "
        create -f raw new.img 1024.0 => new.img
        create -f qcow2 new.qcow2 65536.0b => new.qcow2
        create -f qcow2 -o size=.5M new.qcow2 => new.qcow2
        create -f raw new.img 1024.5
        create -f raw new.img .k
        resize -f raw raw.img +512. => raw.img
        ",
    );
}
