//! Names of files and exports in QEMU's notation, on command lines and in images.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Command;

use crate::support::image::are_equal;
use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer, run, says};
use crate::tools;

#[test]
fn names_of_qemu_are_understood_on_the_command_line() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--format", "raw", "--read-only", "--socket", &socket]);
    command.arg(format!("vm=file:{}", disk.path()));
    let server = Server::start(&mut command, (&socket).into());
    let new = disk.beside("new");
    for source in [
        format!("file:{}", disk.path()),
        format!("nbd:unix:{socket}:exportname=vm"),
        format!(r#"json:{{"driver":"nbd","path":"{socket}","export":"vm"}}"#),
    ] {
        for copy in [&["image", "convert", "-O", "raw"][..], &["copy"]] {
            nbd_cli(&[copy, &[&source, &format!("file:{new}")]].concat()).success();
            disk.assert_equals(&new);
            std::fs::remove_file(&new).expect("the copy");
        }
        nbd_cli(&["image", "compare", &source, disk.path()]).success();
        nbd_cli(&["image", "info", "--json", &source]).success();
    }
    server.end();
    peer(&qemu_img, &["convert", "-O", "qcow2", &format!("file:{}", disk.path()), &new]);
    nbd_cli(&["serve", "--run", "true", &format!("file:{new}")]).success();
}

/// Runs `nbd-cli` in a directory.
fn in_directory(directory: &Path, arguments: &[&str]) -> crate::support::Outcome {
    run(Command::new(PROGRAM).args(arguments).current_dir(directory))
}

#[test]
fn backing_files_that_an_image_names_as_qemu_does_are_opened_where_the_policy_allows_it() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let directory = Path::new(disk.path()).parent().expect("a directory");
    let base = disk.path();
    let elsewhere = tempfile::tempdir().expect("a directory");
    for name in [
        format!("file:{base}"),
        format!(r#"json:{{"driver":"file","filename":"{base}"}}"#),
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{base}"}}}}"#),
        // As in QEMU these start at the working directory.
        "file:disk.img".to_owned(),
        r#"json:{"driver":"raw","file":{"driver":"file","filename":"disk.img"}}"#.to_owned(),
    ] {
        let overlay = disk.beside("overlay.qcow2");
        let create =
            ["create", "-q", "-f", "qcow2", "-u", "-b", &name, "-F", "raw", &overlay, "8M"];
        peer(&qemu_img, &create);
        in_directory(directory, &["image", "compare", "overlay.qcow2", "disk.img"]).success();
        in_directory(directory, &["serve", "--run", "true", "overlay.qcow2"]).success();
        in_directory(directory, &["serve", "--temporary", "--run", "true", "overlay.qcow2"])
            .success();
        let info = ["image", "info", "--backing-chain", "--json", "overlay.qcow2"];
        let said = in_directory(directory, &info).success();
        assert_eq!(said.matches("\"virtual-size\"").count(), 2, "{said}");
        // The same image elsewhere may not name that file.
        let copy = elsewhere.path().join("copy.qcow2");
        let copy = copy.to_str().expect("a plain name");
        std::fs::copy(&overlay, copy).expect("room");
        says(
            in_directory(directory, &["image", "map", copy]),
            &["; add --trust-image if you trust its maker"],
        );
        in_directory(directory, &["image", "map", "--trust-image", copy]).success();
        in_directory(directory, &["image", "commit", "--keep", "overlay.qcow2"]).success();
        std::fs::remove_file(&overlay).expect("the overlay");
    }
    let overlay = disk.beside("overlay.qcow2");
    let base = format!("file:{base}");
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", &base, "-F", "raw", &overlay]).success();
    are_equal(&qemu_img, &overlay, disk.path());
}

#[test]
fn every_command_takes_names_with_file_before_them() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, top, new) = (disk.beside("a.qcow2"), disk.beside("b.qcow2"), disk.beside("c.raw"));
    let named = |path: &str| format!("file:{path}");
    let (a, b, c) = (&named(&image), &named(&top), &named(&new));
    let raw = &named(disk.path());
    for words in [
        &["image", "create", "-f", "qcow2", a, "8M"][..],
        &["image", "create", "-f", "qcow2", "-b", a, "-F", "qcow2", b],
        &["image", "check", a],
        &["image", "check", "--json", a],
        &["image", "resize", a, "+1M"],
        &["image", "info", a],
        &["image", "map", a],
        &["image", "measure", "-O", "qcow2", a],
        &["image", "amend", "--lazy-refcounts", "on", a],
        &["image", "snapshot", "create", a, "one"],
        &["image", "snapshot", "list", a],
        &["image", "snapshot", "apply", a, "one"],
        &["image", "snapshot", "delete", a, "one"],
        &["bitmap", "add", a, "daily"],
        &["bitmap", "list", a],
        &["bitmap", "add", a, "weekly"],
        &["bitmap", "merge", a, "weekly", "daily"],
        &["bitmap", "remove", a, "weekly"],
        &["image", "commit", b],
        &["image", "rebase", "-b", a, "-F", "qcow2", b],
        &["image", "compare", a, b],
        &["image", "convert", "-O", "raw", a, c],
        &["image", "compare", "-f", "raw", raw, raw],
        &["serve", "--run", "true", a],
        &["copy", raw, "null:"],
    ] {
        nbd_cli(words).success();
    }
    let server = Server::ours(&["--read-only", &image]);
    let (full, restored) = (disk.beside("full.qcow2"), disk.beside("restored"));
    nbd_cli(&["backup", "-q", server.uri(), &named(&full)]).success();
    nbd_cli(&["restore", "-q", &named(&full), &named(&restored)]).success();
    are_equal(&qemu_img, &image, &restored);
}

#[test]
fn names_with_options_of_drivers_say_the_format_too() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("a.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    let file = format!(r#""file":{{"driver":"file","filename":"{image}"}}"#);
    let qcow2 = format!(r#"json:{{"driver":"qcow2",{file}}}"#);
    let raw = format!(r#"json:{{"driver":"raw",{file}}}"#);
    let unsaid = format!("json:{{{file}}}");
    let bytes = format!(r#"json:{{"driver":"file","filename":"{image}"}}"#);
    let plain = std::fs::metadata(&image).expect("the image").len();
    for (name, size) in [(&qcow2, 8 << 20), (&unsaid, 8 << 20), (&raw, plain), (&bytes, plain)] {
        let about = crate::support::image::ours(&["info", "--json", name]);
        assert_eq!(about["virtual-size"], size, "{name}: {about}");
        let copied = disk.beside("copied");
        nbd_cli(&["image", "convert", "-O", "raw", name, &copied]).success();
        assert_eq!(std::fs::metadata(&copied).expect("a copy").len(), size, "{name}");
        nbd_cli(&["image", "map", name]).success();
        nbd_cli(&["image", "measure", name]).success();
        std::fs::remove_file(&copied).expect("it is there");
    }
    nbd_cli(&["image", "compare", &qcow2, disk.path()]).success();
    nbd_cli(&["image", "check", &qcow2]).success();
    nbd_cli(&["image", "snapshot", "list", &qcow2]).success();
    nbd_cli(&["bitmap", "list", &qcow2]).success();
    says(nbd_cli(&["image", "info", "-f", "raw", &qcow2]), &["says", "leave one"]);
    let server = Server::ours(&["--format", "raw", "--read-only", &image]);
    let socket = server.socket().display();
    let remote =
        format!(r#"json:{{"driver":"qcow2","file":{{"driver":"nbd","path":"{socket}"}}}}"#);
    nbd_cli(&["image", "compare", &remote, disk.path()]).success();
    let copied = disk.beside("bytes");
    nbd_cli(&["copy", &bytes, &copied]).success();
    assert_eq!(std::fs::metadata(&copied).expect("a copy").len(), plain);
    assert!(nbd_cli(&["copy", &qcow2, &copied]).stderr.contains("image convert"));
    assert!(nbd_cli(&["image", "resize", &qcow2, "9M"]).stderr.contains("by its name"));
}

#[test]
fn every_reader_of_names_accepts_the_same_options_of_drivers() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, overlay) = (disk.beside("a.qcow2"), disk.beside("b.qcow2"));
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    let readers = |name: &str| {
        let create = ["create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "qcow2"];
        peer(&qemu_img, &[&create[..], &[&overlay, "8M"]].concat());
        [
            nbd_cli(&["image", "info", name]),
            nbd_cli(&["image", "compare", name, disk.path()]),
            nbd_cli(&["image", "compare", "--trust-image", &overlay, disk.path()]),
        ]
    };
    let named = |format: &str, file: &str| {
        let file = format!(r#"{{"driver":"file","filename":"{image}"{file}}}"#);
        format!(r#"json:{{"driver":"qcow2"{format},"file":{file}}}"#)
    };
    for option in [
        r#","node-name":"a""#,
        r#","auto-read-only":true"#,
        r#","cache":{"direct":false,"no-flush":false}"#,
        r#","read-only":true"#,
        r#","read-only":true,"force-share":true"#,
        r#","force-share":true"#,
        r#","discard":"unmap","detect-zeroes":"off""#,
    ] {
        for name in [named(option, ""), named("", option)] {
            for outcome in readers(&name) {
                assert_eq!(outcome.code, Some(0), "{name}: {outcome:?}");
            }
        }
    }
    for name in [
        named(r#","lazy-refcounts":true,"overlap-check":"all","l2-cache-size":262144"#, ""),
        named(r#","pass-discard-request":true,"cache-clean-interval":0"#, ""),
        named("", r#","locking":"auto","aio":"threads""#),
        named("", r#","locking":"off","drop-cache":true"#),
        named("", r#","locking":"on","aio":"io_uring""#),
        format!(
            r#"json:{{"driver":"qcow2","file":{{"driver":"raw","file":{{"driver":"file","filename":"{image}"}}}}}}"#
        ),
    ] {
        for outcome in readers(&name) {
            assert_eq!(outcome.code, Some(0), "{name}: {outcome:?}");
        }
    }
    for (name, part) in [
        (named(r#","discard":"maybe""#, ""), "maybe"),
        (named("", r#","locking":"maybe""#), "maybe"),
        (named(r#","encrypt":{"key-secret":"s"}"#, ""), "encrypt"),
        (named(r#","more":1"#, ""), "more"),
    ] {
        for outcome in readers(&name) {
            assert_ne!(outcome.code, Some(0), "{name}");
            assert!(outcome.stderr.contains(part), "{name}: {}", outcome.stderr);
        }
    }
    // The settings count.
    for (option, part) in
        [("read-only", "read-only=on"), ("force-share", "force-share=on, which is for images")]
    {
        let name = named(&format!(r#","{option}":true"#), "");
        let refused = nbd_cli(&["image", "check", "-r", "all", &name]);
        assert!(refused.stderr.contains(part), "{refused:?}");
    }
    let native = r#","aio":"native""#;
    let direct = r#","cache":{"direct":true}"#;
    for (name, is_right) in [
        (named("", native), false),
        (named(direct, native), true),
        (named("", &format!("{native}{direct}")), true),
        (named(direct, &format!(r#"{native},"cache":{{"direct":false}}"#)), false),
    ] {
        for peer in [
            run(Command::new(&qemu_img).args(["info", &name])),
            nbd_cli(&["qemu-img", "info", &name]),
            nbd_cli(&["image", "info", &name]),
            nbd_cli(&["image", "compare", &name, disk.path()]),
            nbd_cli(&["serve", "--read-only", "--run", "true", &name]),
        ] {
            assert_eq!(peer.code == Some(0), is_right, "{name}: {peer:?}");
            assert_eq!(peer.stderr.contains("cache.direct=on"), !is_right, "{name}: {peer:?}");
        }
    }
}

#[test]
fn a_copy_uses_a_file_as_its_name_says() {
    let disk = Disk::sparse();
    let (socket, new) = (disk.beside("socket"), disk.beside("new"));
    let named = |path: &str, more: &str| {
        let file = format!(r#"{{"driver":"file","filename":"{path}"{more}}}"#);
        format!(r#"json:{{"driver":"raw","file":{file}}}"#)
    };
    let copied = |source: &str, more: &[&str]| {
        let outcome = nbd_cli(&[&["copy"], more, &[source, &new]].concat());
        if outcome.code == Some(0) {
            disk.assert_equals(&new);
            std::fs::remove_file(&new).expect("the copy");
        }
        outcome
    };
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--format", "raw", "--socket", &socket, disk.path()]);
    let server = Server::start(&mut command, (&socket).into());
    // Somebody writes to it.
    for more in ["", r#","locking":"auto""#, r#","locking":"on""#, r#","read-only":true"#] {
        says(copied(&named(disk.path(), more), &[]), &["--force-share"]);
    }
    for more in [r#","locking":"off""#, r#","force-share":true"#] {
        copied(&named(disk.path(), more), &[]).success();
    }
    copied(&named(disk.path(), r#","locking":"on""#), &["-U"]).success();
    let remote = |more: &str| format!(r#"json:{{"driver":"nbd","path":"{socket}"{more}}}"#);
    copied(&remote(r#","read-only":true,"force-share":true"#), &[]).success();
    assert!(copied(&remote(r#","locking":"off""#), &[]).stderr.contains("the option 'locking'"));
    says(copied(&named(disk.path(), r#","aio":"native""#), &["-U"]), &["cache.direct=on"]);

    // The name of the target forbids to write to it, before anything is written.
    let before = std::fs::read(disk.path()).expect("the disk");
    let read_only = remote(r#","read-only":true"#);
    says(nbd_cli(&["copy", "null:", &read_only]), &["read-only=on", "cannot write to"]);
    for (more, part) in
        [(r#","read-only":true"#, "read-only=on"), (r#","force-share":true"#, "force-share=on")]
    {
        let target = named(&new, more);
        says(nbd_cli(&["copy", &remote(""), &target]), &[part, "cannot write to"]);
        says(nbd_cli(&["restore", &socket, &target]), &[part, "cannot write to"]);
        assert!(!Path::new(&new).exists());
    }
    assert!(std::fs::read(disk.path()).expect("the disk") == before);
    nbd_cli(&["copy", &remote(""), &named(&new, r#","locking":"off""#)]).success();
    disk.assert_equals(&new);
    server.end();
}

#[test]
fn names_in_images_need_not_be_text() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let directory = Path::new(disk.path()).parent().expect("a directory");
    let name = |bytes: &'static [u8]| OsStr::from_bytes(bytes);
    let (odd, data) = (name(b"odd\xff.img"), name(b"data\xfe.raw"));
    std::fs::copy(disk.path(), directory.join(odd)).expect("room");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new);
    for (program, option, overlay) in [
        (Some(&qemu_img), None, "theirs.qcow2"),
        (None, None, "ours.qcow2"),
        (None, Some("file:"), "prefixed.qcow2"),
    ] {
        let mut command = match program {
            Some(tool) => Command::new(tool),
            None => Command::new(PROGRAM),
        };
        match program {
            Some(_) => command.args(create),
            None => command.args(["image", "create", "-f", "qcow2", "-F", "raw", "-b"]),
        };
        let mut base = OsString::from(option.unwrap_or_default());
        base.push(odd);
        run(command.args([&base, OsStr::new(overlay)]).current_dir(directory)).success();
        for words in [
            &["image", "compare", overlay, "disk.img"][..],
            &["image", "check", overlay],
            &["image", "info", "--backing-chain", overlay],
            &["serve", "--run", "true", overlay],
            &["serve", "--temporary", "--run", "true", overlay],
            &["image", "rebase", "-b", "disk.img", "-F", "raw", overlay],
        ] {
            in_directory(directory, words).success();
        }
        let mut rebase = Command::new(PROGRAM);
        rebase.args(["image", "rebase", "-F", "raw", "-b"]).arg(&base).arg(overlay);
        run(rebase.current_dir(directory)).success();
        in_directory(directory, &["image", "amend", "--lazy-refcounts", "on", overlay]).success();
        run(Command::new(&qemu_img).args(["compare", overlay, "disk.img"]).current_dir(directory))
            .success();
        let said =
            in_directory(directory, &["image", "info", "--json", "--backing-chain", overlay]);
        assert_eq!(said.success().matches("odd\u{fffd}.img").count(), 3);
        in_directory(directory, &["image", "commit", overlay]).success();
    }
    // A data file.
    let mut create = Command::new(PROGRAM);
    create.args(["image", "create", "-f", "qcow2", "--data-file"]).arg(data);
    run(create.args(["split.qcow2", "1M"]).current_dir(directory)).success();
    assert!(directory.join(data).is_file());
    in_directory(directory, &["image", "info", "--json", "split.qcow2"]).success();
    run(Command::new(&qemu_img).args(["check", "-q", "split.qcow2"]).current_dir(directory))
        .success();
    // The policy holds for such names too.
    let elsewhere = tempfile::tempdir().expect("a directory");
    let copy = elsewhere.path().join("copy.qcow2");
    let mut create = Command::new(PROGRAM);
    create.args(["image", "create", "-f", "qcow2", "-F", "raw", "-b"]).arg(directory.join(odd));
    run(create.arg(&copy)).success();
    says(nbd_cli(&[OsStr::new("image"), OsStr::new("map"), copy.as_os_str()]), &["--trust-image"]);
}

#[test]
fn names_of_what_is_served_need_not_be_text() {
    let disk = Disk::sparse();
    let directory = Path::new(disk.path()).parent().expect("a directory");
    let (odd, image) = (OsStr::from_bytes(b"odd\xff.img"), OsStr::from_bytes(b"image\xfe.qcow2"));
    std::fs::copy(disk.path(), directory.join(odd)).expect("room");
    let words = |words: &[&str], last: &OsStr, prefix: &str| {
        let mut name = OsString::from(prefix);
        name.push(last);
        run(Command::new(PROGRAM).args(words).arg(name).current_dir(directory)).success();
    };
    let mut convert = Command::new(PROGRAM);
    convert.args(["image", "convert", "-O", "qcow2"]).args([odd, image]).current_dir(directory);
    run(&mut convert).success();
    for serve in [
        &["serve", "--run", "true"][..],
        &["serve", "--read-only", "--run", "true"],
        &["serve", "--temporary", "--run", "true"],
    ] {
        for prefix in ["", "vm=", "file:", "vm=file:"] {
            words(&[serve, &["--format", "raw"]].concat(), odd, prefix);
            words(serve, image, prefix);
        }
    }
}

#[test]
fn names_of_files_need_not_be_text() {
    let disk = Disk::sparse();
    let directory = Path::new(disk.path()).parent().expect("a directory");
    let path = |name: &[u8]| -> OsString { directory.join(OsStr::from_bytes(name)).into() };
    let (odd, copy, image) = (path(b"odd\xff.img"), path(b"copy\xfe"), path(b"image\xfe.qcow2"));
    std::fs::copy(disk.path(), &odd).expect("room");
    let word = |text: &str| OsString::from(text);
    for command in [
        vec![word("copy"), odd.clone(), copy.clone()],
        vec![word("image"), word("convert"), word("-O"), word("qcow2"), odd.clone(), image.clone()],
        vec![word("image"), word("info"), odd.clone()],
        vec![word("image"), word("info"), word("--json"), image.clone()],
        vec![word("image"), word("check"), image.clone()],
        vec![word("image"), word("map"), image.clone()],
        vec![word("image"), word("compare"), image.clone(), odd.clone()],
        vec![word("bitmap"), word("add"), image.clone(), word("daily")],
        vec![word("image"), word("resize"), image.clone(), word("+1M")],
        vec![word("restore"), image.clone(), path(b"restored\xff")],
    ] {
        let outcome = nbd_cli(&command);
        assert_eq!(outcome.code, Some(0), "{command:?}: {outcome:?}");
    }
    disk.assert_equals(&copy);
}
