//! What scripts see of the qemu-img form, found with QEMU's own tests: lines, the order of JSON,
//! maps of exports, and the space that raw disks take.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_img::{compare_all, ours, theirs, words};
use crate::support::qemu_nbd::wait_until;
use crate::support::{Server, run};
use crate::tools;

#[test]
fn a_format_without_checks_is_reported_with_the_line_that_scripts_look_for() {
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.img"), [7; 4096]).unwrap();
    let words = words("check -f raw disk.img");
    let theirs = run(Command::new("qemu-img").args(&words).current_dir(&directory));
    let ours = ours(directory.path(), &words);
    assert_eq!((ours.code, ours.stderr), (theirs.code, theirs.stderr));
}

#[test]
fn the_members_of_json_are_in_the_order_and_the_lines_of_qemu() {
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let theirs = |line: &str| theirs(directory.path(), line).success();
    for line in [
        "qemu-img create -q -f raw base.img 1M",
        "qemu-img create -q -f qcow2 -b base.img -F raw disk.qcow2",
        "qemu-img bitmap --add disk.qcow2 b",
        "qemu-io -c write_0_64k -c write_-c_64k_64k disk.qcow2",
        "qemu-img snapshot -c first disk.qcow2",
        "qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 1M",
        "qemu-img create -q -f vmdk disk.vmdk 1M",
        "qemu-img create -q --object secret,id=s,data=x -f qcow2 \
         -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 locked.qcow2 1M",
    ] {
        theirs(line);
    }
    for line in [
        "info --output=json --backing-chain disk.qcow2",
        "info --output=json data.qcow2",
        "info --output=json disk.vmdk",
        "info --output=json locked.qcow2",
        "check --output=json disk.qcow2",
        "measure --output=json -O qcow2 disk.qcow2",
    ] {
        let expected = theirs(&format!("qemu-img {line}"));
        assert_eq!(ours(directory.path(), &words(line)).success(), expected, "{line}");
    }
}

#[test]
fn a_context_of_an_export_is_mapped_in_the_place_of_its_allocation() {
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    for line in [
        "qemu-img create -q -f qcow2 disk.qcow2 1M",
        "qemu-img bitmap --add -g 64k disk.qcow2 b",
        "qemu-io -c write_128k_64k -c write_512k_200k disk.qcow2",
    ] {
        let words = words(line);
        run(Command::new(&words[0]).args(&words[1..]).current_dir(&directory)).success();
    }
    let image = directory.path().join("disk.qcow2").display().to_string();
    let contexts = ["--bitmap", "b", "--allocation-depth"];
    let serve = |more: &[&str]| {
        let format = ["--read-only", "--format", "qcow2"];
        Server::ours(&[&format, more, &contexts[..], &[&image]].concat())
    };
    let server = serve(&[]);
    let options = format!("driver=nbd,server.type=unix,server.path={}", server.socket().display());
    let mut maps = Vec::new();
    for context in ["qemu:dirty-bitmap:b", "base:allocation", "qemu:allocation-depth"] {
        let options = format!("{options},x-dirty-bitmap={context}");
        let line = ["map", "--output=json", "--image-opts", &options].map(str::to_owned);
        let theirs = run(Command::new("qemu-img").args(&line)).success();
        assert_eq!(ours(directory.path(), &line).success(), theirs, "{context}");
        maps.push(theirs);
    }
    assert_ne!(maps[0], maps[1]);
    let socket = server.socket().display();
    let context = "qemu:dirty-bitmap:b";
    for line in [
        format!(
            "--image-opts driver=raw,file.driver=nbd,file.path={socket},file.x-dirty-bitmap={context}"
        ),
        format!("json:{{'driver':'nbd','path':'{socket}','x-dirty-bitmap':'{context}'}}"),
        format!(
            "json:{{'driver':'raw','file':{{'driver':'nbd','path':'{socket}','x-dirty-bitmap':'{context}'}}}}"
        ),
    ] {
        let line = words(&format!("map --output=json {line}"));
        let theirs = run(Command::new("qemu-img").args(&line)).success();
        assert_eq!(theirs, maps[0], "{line:?}");
        assert_eq!(ours(directory.path(), &line).success(), theirs, "{line:?}");
    }
    // The format is looked for over the same connection.
    let once = serve(&["--max-connections", "1"]);
    let line = |server: &Server| {
        let socket = server.socket().display();
        let options = format!("file.driver=nbd,file.path={socket},file.x-dirty-bitmap={context}");
        ["map", "--output=json", "--image-opts", &options].map(str::to_owned)
    };
    let theirs = run(Command::new("qemu-img").args(line(&server))).success();
    assert_eq!(ours(directory.path(), &line(&once)).success(), theirs);
    assert_eq!(theirs, maps[0]);
    let line = ["map", "--output=json", "-f", "raw", server.uri()].map(str::to_owned);
    let theirs = run(Command::new("qemu-img").args(&line)).success();
    assert_eq!(ours(directory.path(), &line).success(), theirs);
    let raw = format!("driver=raw,file.driver=nbd,file.path={socket}");
    for wrong in [
        format!("{options},x-dirty-bitmap=qemu:dirty-bitmap:nosuch"),
        format!("{options},x-dirty-bitmap=b"),
        format!("{raw},x-dirty-bitmap={context}"),
        format!("{options},file.x-dirty-bitmap={context}"),
    ] {
        let line = ["map", "--image-opts", &wrong].map(str::to_owned);
        let theirs = run(Command::new("qemu-img").args(&line));
        let ours = ours(directory.path(), &line);
        assert_eq!((ours.code, theirs.code), (Some(1), Some(1)), "{wrong}: {ours:?}");
    }
}

#[test]
fn a_name_with_a_colon_is_shown_so_that_it_can_be_opened() {
    compare_all(
        "
        create -f qcow2 -b raw.img -F raw file:image:top.qcow2 ; info file:image:top.qcow2 =>
        create -f qcow2 -b raw.img -F raw ./image:top.qcow2 ; info --output=json file:image:top.qcow2 =>
        create -f qcow2 -b raw.img -F raw ./image:top.qcow2 ; info --output=json ./image:top.qcow2 =>
        create -f qcow2 ./image:low.qcow2 1M ; map file:image:low.qcow2 ; check file:image:low.qcow2 =>
        create -f qcow2 ./image:low.qcow2 1M ; info --backing-chain file:image:low.qcow2 =>
        info image:low.qcow2
        ",
    );
}

#[test]
fn a_name_that_begins_with_an_unknown_protocol_is_no_file() {
    compare_all(
        "
        create -f raw ./nosuch:x 1M ; info nosuch:x ; create -f raw nosuch:x 2M =>
        create -q -f raw zeroinit:new.img 1M ; info file:zeroinit:new.img
        create -q -f qcow2 ./a:b.qcow2 1M ; resize a:b.qcow2 2M ; snapshot -c a a:b.qcow2 =>
        create -q -f raw ./nosuch:x 1M ; convert -n -f raw -O raw raw.img nosuch:x => ./nosuch:x
        convert -O qcow2 raw.img nosuch:x ; info file:nosuch:x
        dd if=raw.img of=nosuch:x ; info file:nosuch:x
        compare raw.img nosuch:raw.img
        info nosuch://host/disk
        convert -O raw raw.img sub/a:b => sub/a:b
        ",
    );
    let refused = ours(Path::new("/"), &words("info rbd:pool/disk"));
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("Unknown protocol 'rbd'"), "{refused:?}");
    assert!(refused.stderr.contains("./rbd:pool/disk"), "{refused:?}");
}

#[test]
fn a_map_names_the_places_kept_for_zeroes_and_the_files_of_a_disk_in_several() {
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let theirs = |line: &str| theirs(directory.path(), line).success();
    for line in [
        "qemu-img create -q -f qcow2 low.qcow2 2M",
        "qemu-io -c write_0_1M -c write_-z_256k_128k -c write_-z_-u_512k_64k low.qcow2",
        "qemu-img create -q -f qcow2 -b low.qcow2 -F qcow2 top.qcow2 3M",
        "qemu-io -c write_64k_64k -c write_-z_64k_32k -c write_-z_1M_64k -c write_2M_128k \
         -c write_-z_2M_128k top.qcow2",
        "qemu-img create -q -f qcow2 -o extended_l2=on sub.qcow2 1M",
        "qemu-io -c write_0_64k -c write_-z_4k_8k -c write_-z_32k_2k sub.qcow2",
        "qemu-img create -q -f qcow2 -o data_file=data.raw data.qcow2 1M",
        "qemu-io -c write_0_128k -c write_-z_64k_64k data.qcow2",
        "qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 5G",
        "qemu-io -c write_0_64k -c write_2147418112_128k split.vmdk",
        "qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 1M",
        "qemu-io -c write_64k_64k flat.vmdk",
        "qemu-img create -q -f qcow2 -b split.vmdk -F vmdk over.qcow2",
        "qemu-io -c write_0_4k over.qcow2",
    ] {
        theirs(line);
    }
    for image in [
        "low.qcow2",
        "top.qcow2",
        "sub.qcow2",
        "data.qcow2",
        "split.vmdk",
        "flat.vmdk",
        "over.qcow2",
    ] {
        for output in ["human", "json"] {
            let line = format!("map --output={output} {image}");
            let expected = theirs(&format!("qemu-img {line}"));
            assert_eq!(ours(directory.path(), &words(&line)).success(), expected, "{line}");
        }
    }
    let here = directory.path().display();
    let line = format!("map {here}/split.vmdk");
    let expected = theirs(&format!("qemu-img {line}"));
    assert!(expected.contains("split-s002.vmdk"), "{expected}");
    assert_eq!(ours(directory.path(), &words(&line)).success(), expected);
}

#[test]
fn a_new_raw_disk_has_its_first_block_and_an_enlarged_one_the_space_asked_for() {
    use std::os::unix::fs::MetadataExt as _;
    let directory = tempfile::tempdir().unwrap();
    let taken = || std::fs::metadata(directory.path().join("disk.img")).unwrap().blocks() * 512;
    for (line, least, most) in [
        ("create disk.img 1M", 4096, 512 << 10),
        ("resize -f raw --preallocation=falloc disk.img 2M", 1 << 20, 3 << 20),
        ("resize -f raw --preallocation=full disk.img 3M", 2 << 20, 4 << 20),
    ] {
        ours(directory.path(), &words(line)).success();
        assert!((least..most).contains(&taken()), "{line}: {}", taken());
    }
    ours(directory.path(), &words("create disk.img 0")).success();
    assert_eq!(std::fs::metadata(directory.path().join("disk.img")).unwrap().len(), 0);
}

/// Whether a server listens on a socket, which exists a little before. Does not connect.
fn is_listening(socket: &Path) -> bool {
    const LISTENS: &str = " 00010000 ";
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("sockets");
    let name = socket.to_str().expect("a plain name");
    sockets.lines().any(|line| line.ends_with(name) && line.contains(LISTENS))
}

#[test]
fn a_server_that_ends_after_its_first_client_is_enough() {
    tools!(_qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    for line in [
        "create -q -f raw disk.img 1M",
        "create -q -f qcow2 disk.qcow2 1M",
        "create -q -f raw same.img 1M",
        "snapshot -c s disk.qcow2",
    ] {
        run(Command::new("qemu-img").args(words(line)).current_dir(here)).success();
    }
    let socket = here.join("socket");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    for line in [
        "info -f raw URI",
        "info --output=json -f raw URI",
        "info --image-opts driver=nbd,path=SOCKET",
        "info --output=json --image-opts driver=nbd,path=SOCKET",
        "info URI",
        "info --backing-chain URI",
        "map -f raw URI",
        "map --output=json -f raw URI",
        "map --output=json --image-opts driver=nbd,path=SOCKET",
        "check -f qcow2 URI",
        "measure -O qcow2 -f raw URI",
        "compare -f raw -F raw URI same.img",
        "convert -f raw -O qcow2 URI copy.qcow2",
        "convert -n -f raw -O raw same.img URI",
        "dd -f raw -O raw if=URI of=copy.img",
        "map URI",
        "map --output=json URI",
        "measure -O qcow2 URI",
        "compare URI same.img",
        "check QCOW2",
        "map --output=json QCOW2",
        "snapshot -l QCOW2",
        "convert -l snapshot.name=s QCOW2 copy.img",
        "dd skip=1 if=URI of=copy.img",
        "convert -O qcow2 same.img URI",
        "create -f qcow2 -q URI 64M",
    ] {
        let disk = if line.contains("qcow2 URI") || line.contains("QCOW2") {
            "disk.qcow2"
        } else {
            "disk.img"
        };
        let line = line
            .replace("QCOW2", "URI")
            .replace("URI", &uri)
            .replace("SOCKET", &socket.display().to_string());
        let words = words(&line);
        let mut outcomes = Vec::new();
        for is_ours in [false, true] {
            let mut server = Command::new(&qemu_nbd);
            server.args(["-f", "raw", "-k"]).arg(&socket).arg(disk).current_dir(here);
            let mut server = server.spawn().expect("it starts");
            wait_until("the server listens", || is_listening(&socket));
            let outcome = match is_ours {
                true => ours(here, &words),
                false => run(Command::new("qemu-img").args(&words).current_dir(here)),
            };
            // It has ended, unless nobody has come.
            server.kill().expect("a child");
            server.wait().expect("it ends");
            let _ = std::fs::remove_file(&socket);
            outcomes.push(outcome);
        }
        let [theirs, ours] = &outcomes[..] else { unreachable!("two") };
        assert_eq!(ours.code, Some(0), "{line}: {ours:?}");
        // QEMU connects several times for a new image.
        let is_new = ["create", "convert -O qcow2 same"].iter().any(|it| line.starts_with(it));
        assert_eq!(theirs.code, Some(if is_new { 1 } else { 0 }), "{line}: {theirs:?}");
        assert_eq!(ours.stdout, theirs.stdout, "{line}");
    }
}
