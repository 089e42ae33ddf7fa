//! The qemu-nbd form beside QEMU's own qemu-nbd, option by option, with the same command lines.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_nbd::{Foreground, ours, qemu_nbd};
use crate::support::{Disk, Outcome, image, peer, run};
use crate::tools;

/// Command lines that both refuse, and what both say about them.
const REFUSED: &[(&[&str], &str)] = &[
    (&[], "Invalid number of arguments"),
    (&["a", "b"], "Invalid number of arguments"),
    (&["-z"], "invalid option -- 'z'"),
    (&["--bogus"], "unrecognized option '--bogus'"),
    (&["-e"], "option requires an argument -- 'e'"),
    (&["--port"], "option '--port' requires an argument"),
    (&["--fork=yes"], "option '--fork' doesn't allow an argument"),
    (&["--s"], "possibilities: '--socket' '--snapshot' '--shared' '--selinux-label'"),
    (&["-e", "-1", "DISK"], "Invalid shared device number '-1'"),
    (&["DISK", "--shar=x"], "Invalid shared device number 'x'"),
    (&["-o", "x", "DISK"], "Invalid offset 'x'"),
    (&["-o1M", "DISK"], "Invalid offset '1M'"),
    (&["-fraw", "-o", "9000000", "DISK"], "offset"),
    (&["--handshake-limit=-1", "DISK"], "Invalid handshake limit '-1'"),
    (&["--cache=x", "DISK"], "Invalid cache mode"),
    (&["-n", "--cache=none", "DISK"], "-n and --cache can only be specified once"),
    (&["--aio=x", "DISK"], "Invalid aio mode 'x'"),
    (&["--aio=threads", "--aio=threads", "DISK"], "--aio can only be specified once"),
    (&["--aio=native", "-fraw", "DISK"], "aio=native"),
    (&["--image-opts", "driver=raw,file.aio=native,file.filename=DISK"], "aio=native"),
    (&["--image-opts", "--aio=native", "driver=raw,file.filename=DISK"], "cache.direct=on"),
    (
        &[
            "--cache=none",
            "--image-opts",
            "driver=raw,cache.direct=off,file.aio=native,file.filename=DISK",
        ],
        "cache.direct=on",
    ),
    (&["--image-opts", "-n", "driver=raw,file.aio=maybe,file.filename=DISK"], "maybe"),
    (&["--image-opts", "driver=raw,force-share=on,file.filename=DISK"], "force-share=on"),
    (&["--image-opts", "driver=raw,read-only=on,file.filename=DISK"], "read-only"),
    (&["--discard=x", "DISK"], "Invalid discard mode"),
    (&["--discard=on", "--discard=on", "DISK"], "--discard can only be specified once"),
    (&["--detect-zeroes=x", "DISK"], "x"),
    (&["--detect-zeroes=unmap", "DISK"], "unmap"),
    (&["--detect-zeroes=unmap", "--discard=unmap", "DISK"], "unmap"),
    (&["-f", "nosuch", "DISK"], "Unknown driver 'nosuch'"),
    (&["nosuch.img"], "nosuch.img"),
    (&["-f", "raw", "nosuch:pool/disk"], "Unknown protocol 'nosuch'"),
    (&["disk.qcow2:a"], "Unknown protocol 'disk.qcow2'"),
    (&["--image-opts", "file.filename=DISK,bogus=1"], "the option 'bogus'"),
    (&["-k", "relative", "DISK"], "socket path must be absolute"),
    (&["-k", "/nonexistent/directory/socket", "DISK"], "/nonexistent/directory/socket"),
    (&["-b", "nosuch.invalid", "DISK"], "nosuch.invalid"),
    (&["-p", "x", "DISK"], "x"),
    (&["-x", LONG, "DISK"], "too long"),
    (&["-D", LONG, "DISK"], "too long"),
    (&["--selinux-label=x", "DISK"], "--selinux-label is not permitted without --socket"),
    (&["-l", "nosuch", "QCOW2"], "Failed to load snapshot"),
    (&["-l", "snapshot.id=9", "QCOW2"], "Failed to load snapshot"),
    (&["-l", "snapshot.id=1,snapshot.name=nosuch", "QCOW2"], "Failed to load snapshot"),
    (&["-l", "snapshot.x=9", "QCOW2"], "Invalid parameter 'snapshot.x'"),
    (&["-l", "1", "-fraw", "DISK"], "Failed to load snapshot"),
    (&["-B", "nosuch", "QCOW2"], "nosuch"),
    (&["-B", "b0", "-fraw", "DISK"], "b0"),
    (&["--image-opts", "-f", "raw", "DISK"], "--image-opts and -f are mutually exclusive"),
    (&["--image-opts", "driver=nosuch,x=y"], "Unknown driver 'nosuch'"),
    (&["--image-opts", "driver=raw,filename=DISK"], "A block device must be specified"),
    (&["--image-opts", "driver=raw,size=1000,file.filename=DISK"], "512"),
    (&["--image-opts", "driver=raw,size=1G,file.filename=DISK"], "1073741824"),
    (&["--image-opts", "driver=qcow2,file.filename=QCOW2,bogus=1"], "bogus"),
    (&["--image-opts", "driver=file,filename=DISK,bogus=1"], "bogus"),
    (&["-L", "DISK"], "List mode is incompatible with a file name"),
    (&["-L", "-x", "x"], "List mode is incompatible with per-device settings"),
    (&["-L", "-o", "512"], "List mode is incompatible with per-device settings"),
    (&["-L", "--cache=none"], "List mode is incompatible with per-device settings"),
    (&["-L", "--fork"], "List mode is incompatible with forking"),
    (&["-L", "-k", "/nonexistent/socket"], "/nonexistent/socket"),
    (&["-L", "-b", "127.0.0.1", "-p", "1"], "Connection refused"),
    (&["--tls-creds=x", "DISK"], "No TLS credentials with id 'x'"),
    (&["--tls-authz=x", "DISK"], "--tls-authz is not permitted without --tls-creds"),
    (&["--tls-hostname=x", "DISK"], "--tls-hostname is not permitted without --tls-creds"),
    (&["--object", "x,id=a", "DISK"], "'qom-type'"),
    (&["--object", "secret,data=x", "DISK"], "Parameter 'id' is missing"),
    (&["--object", "secret,id=a", "DISK"], "Either 'file' or 'data' must be provided"),
    (&["--object", "secret,id=a,data=x,file=y", "DISK"], "mutually exclusive"),
    (&["--object", "secret,id=a,data=x", "--tls-creds=a", "DISK"], "is not TLS credentials"),
    (&["--object", "tls-creds-psk,id=a,endpoint=x", "DISK"], "'endpoint'"),
    (&["--object", "tls-creds-psk,id=a,endpoint=server", "DISK"], "'dir'"),
    (&["--object", "authz-simple,id=a", "DISK"], "Parameter 'identity' is missing"),
    (&["--object", "authz-list,id=a,policy=x", "DISK"], "'policy'"),
    (&["--object", "{bad", "DISK"], "JSON"),
    (&["--pid-file=/nonexistent/pid", "-k", "SOCKET", "-fraw", "DISK"], "/nonexistent/pid"),
];

const LONG: &str = match std::str::from_utf8(&[b'x'; 4097]) {
    Ok(text) => text,
    Err(_) => unreachable!(),
};

fn fill_in(arguments: &[&str], disk: &Disk) -> Vec<String> {
    let fill = |word: &&str| {
        word.replace("DISK", disk.path())
            .replace("QCOW2", &disk.beside("disk.qcow2"))
            .replace("SOCKET", &disk.beside("socket"))
            .replace("ODD", &disk.beside("odd.raw"))
            .replace("ARCHIVE", &disk.beside("archive"))
            .replace("TOP", &disk.beside("top.qcow2"))
            .replace("SIZE", &size_in_archive(disk).to_string())
    };
    arguments.iter().map(fill).collect()
}

/// Size of the image in the middle of the archive.
fn size_in_archive(disk: &Disk) -> u64 {
    std::fs::metadata(disk.beside("archive")).expect("the archive").len() - 512 - 1024
}

/// A disk and, beside it: the same as `disk.qcow2` with the snapshot 1 "first", bitmaps, and
/// changes on top; an overlay of that; that in the middle of a file; a disk that ends within a
/// sector.
fn disk_and_qcow2(qemu_img: &Path, qemu_io: &Path) -> Disk {
    let disk = Disk::sparse();
    let qcow2 = disk.beside("disk.qcow2");
    peer(qemu_img, &["convert", "-f", "raw", "-O", "qcow2", disk.path(), &qcow2]);
    peer(qemu_img, &["snapshot", "-c", "first", &qcow2]);
    peer(qemu_img, &["bitmap", "--add", &qcow2, "b0"]);
    peer(qemu_img, &["bitmap", "--add", "--disable", &qcow2, "b1"]);
    image::write(qemu_io, &qcow2, "write -P 99 0 64k");
    let top = disk.beside("top.qcow2");
    peer(qemu_img, &["create", "-f", "qcow2", "-b", &qcow2, "-F", "qcow2", &top]);
    image::write(qemu_io, &top, "write -P 98 1M 64k");
    let mut archive = vec![b'x'; 512];
    archive.extend(std::fs::read(&qcow2).expect("the image"));
    archive.resize(archive.len().next_multiple_of(512) + 1024, b'x');
    std::fs::write(disk.beside("archive"), archive).expect("the archive");
    std::fs::write(disk.beside("odd.raw"), [7; 1000]).expect("the odd disk");
    disk
}

#[test]
fn both_refuse_the_same_command_lines_for_the_same_reasons() {
    tools!(theirs = "qemu-nbd", qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = disk_and_qcow2(&qemu_img, &qemu_io);
    for (arguments, reason) in REFUSED {
        let arguments = fill_in(arguments, &disk);
        for outcome in [run(Command::new(&theirs).args(&arguments)), run(ours().args(&arguments))] {
            let Outcome { code, stdout, stderr } = outcome;
            assert_eq!(code, Some(1), "{arguments:?}: {stderr}");
            assert!(stdout.is_empty(), "{arguments:?}: {stdout}");
            // The last line is the error: a warning about a guessed format may be before it.
            assert!(stderr.contains("qemu-nbd: "), "{arguments:?}: {stderr}");
            let (said, wanted) = (stderr.to_lowercase(), reason.to_lowercase());
            assert!(said.contains(&wanted), "{arguments:?}: '{reason}' is missing in: {stderr}");
        }
    }
}

/// An image in the middle of a file, as tools name a disk in a tar archive.
const IN_ARCHIVE: &str = r#"json:{"driver":"qcow2","file":{"driver":"raw","offset":512,"size":SIZE,"file":{"driver":"file","filename":"ARCHIVE"}}}"#;

/// What is served, and the name of the export.
const SERVED: &[(&[&str], &str)] = &[
    (&["-f", "raw", "DISK"], ""),
    (&["-t", "-e", "3", "-f", "raw", "DISK"], ""),
    (&["-t", "-e0", "--format=raw", "-r", "DISK"], ""),
    (&["-f", "raw", "-r", "DISK", "-A"], ""),
    (&["-f", "raw", "-x", "vm disk", "-D", "of a guest", "DISK"], "vm%20disk"),
    (&["DISK"], ""),
    (&["-r", "DISK"], ""),
    (&["-s", "DISK"], ""),
    (&["-o", "512", "DISK"], ""),
    (&["-f", "raw", "-o", "1048576", "DISK"], ""),
    (&["-f", "raw", "--offset=0x1000", "DISK"], ""),
    (&["QCOW2"], ""),
    (&["--read-only", "--allocation-depth", "QCOW2"], ""),
    (&["-r", "-A", "-B", "b0", "QCOW2"], ""),
    (&["--bitmap=b0", "--bitmap", "b1", "-f", "qcow2", "QCOW2"], ""),
    (&["-l", "first", "QCOW2"], ""),
    (&["-l", "snapshot.id=1", "-f", "qcow2", "QCOW2"], ""),
    (&["-l", "snapshot.name=first", "-f", "qcow2", "QCOW2"], ""),
    (&["-s", "QCOW2"], ""),
    (&["--snapshot", "-r", "QCOW2"], ""),
    (&["-f", "raw", "--cache=writethrough", "DISK"], ""),
    (&["-f", "raw", "--cache", "unsafe", "--aio=threads", "DISK"], ""),
    (&["-f", "raw", "--discard=unmap", "--detect-zeroes=unmap", "DISK"], ""),
    (&["--image-opts", "driver=raw,offset=1M,size=2M,file.driver=file,file.filename=DISK"], ""),
    (&["--image-opts", "driver=qcow2,file.filename=QCOW2,file.locking=off,read-only=on", "-r"], ""),
    (&["--image-opts", "driver=qcow2,file.force-share=on,file.filename=QCOW2", "-r"], ""),
    (&["-s", "--image-opts", "driver=qcow2,force-share=on,file.filename=QCOW2"], ""),
    (&["--aio=native", "--image-opts", "driver=raw,cache.direct=on,file.filename=DISK"], ""),
    (&["--aio=native", "--image-opts", "driver=raw,file.aio=threads,file.filename=DISK"], ""),
    (&["json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"QCOW2\"}}"], ""),
    (&["--handshake-limit=0", "-f", "raw", "DISK"], ""),
    (&["--handshake-limit= 0x5", "-e\n2", "-t", "-o 01000", "-f", "raw", "DISK"], ""),
    (&["-e+2", "-t", "-o", "-0", "-f", "raw", "DISK"], ""),
    (&["-f", "raw", "ODD"], ""),
    (&["-f", "raw", "-o", "512", "ODD"], ""),
    (&["-f", "raw", "-s", "ODD"], ""),
    (&["--image-opts", "driver=raw,offset= 1.5k,file.filename=DISK"], ""),
    (&[r#"json:{"driver":"raw","size":1024,"file":{"driver":"file","filename":"ODD"}}"#], ""),
    (&["-r", IN_ARCHIVE], ""),
    (&["-rA", "-B", "b0", IN_ARCHIVE], ""),
    (&["-r", "-o", "65536", IN_ARCHIVE], ""),
    (
        &[
            r#"json:{"driver":"raw","offset":65536,"size":131072,"file.driver":"qcow2","file.file":{"driver":"file","filename":"QCOW2"}}"#,
        ],
        "",
    ),
    (&["-A", "TOP"], ""),
    (
        &[
            "-A",
            "-r",
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"TOP"},"backing":null}"#,
        ],
        "",
    ),
    (&["-s", "--image-opts", "driver=qcow2,file.filename=TOP,backing="], ""),
    (&[r#"json:{"driver":"null-co","size":1000000,"read-zeroes":true}"#], ""),
    (&["--image-opts", "driver=raw,file.driver=null-aio,file.size=4M,file.read-zeroes=on"], ""),
];

/// What a program lists.
#[track_caller]
fn listed(mut program: Command, server: &Foreground) -> String {
    run(program.args(["-L", "-k", server.socket()])).success()
}

#[test]
fn both_serve_the_same_disk_for_the_same_options_and_list_it_in_the_same_words() {
    tools!(theirs = "qemu-nbd", qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = disk_and_qcow2(&qemu_img, &qemu_io);
    for (arguments, name) in SERVED {
        let arguments = fill_in(arguments, &disk);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let copy = disk.beside("copy.img");
        let mut seen = Vec::new();
        for program in [Command::new(&theirs), ours()] {
            let mut server = Foreground::start(program, &arguments);
            let (by_them, by_us) =
                (listed(Command::new(&theirs), &server), listed(ours(), &server));
            assert_eq!(by_us, by_them, "the list of one server: {arguments:?}");
            let uri = server.uri(name);
            peer(&qemu_img, &["convert", "-f", "raw", "-O", "raw", &uri, &copy]);
            if !arguments.contains(&"-t") {
                assert_eq!(server.exit_code(), Some(0), "{arguments:?}");
            }
            seen.push((by_them, std::fs::read(&copy).expect("the copy")));
        }
        assert_eq!(seen[0].0, seen[1].0, "{arguments:?}");
        assert!(seen[0].1 == seen[1].1, "different bytes: {arguments:?}");
    }
}

#[test]
fn every_option_of_theirs_is_offered_or_refused_by_name() {
    tools!(theirs = "qemu-nbd");
    let (our_help, their_help) = (qemu_nbd(&["--help"]).success(), peer(&theirs, &["--help"]));
    assert!(our_help.starts_with("Usage: qemu-nbd [OPTIONS] FILE\n"), "{our_help}");
    let mut count = 0;
    for line in their_help.lines().filter(|line| line.trim_start().starts_with('-')) {
        let (_, long) = line.split_once("--").expect("a long name");
        let long = long.split(['=', ' ', ',']).next().expect("a word");
        count += 1;
        assert!(our_help.contains(&format!("--{long}")), "--{long} is missing");
    }
    assert!(count > 30, "the options were not found in: {their_help}");
    // Theirs begins with its path as it was called.
    let versions = [qemu_nbd(&["-V"]).success(), peer(&theirs, &["--version"])];
    for version in &versions {
        let mut words = version.split(' ');
        assert!(words.next().expect("a name").ends_with("qemu-nbd"), "{version}");
        let number = words.next().expect("a number").split('.');
        assert_eq!(number.filter(|part| part.parse::<u32>().is_ok()).count(), 3, "{version}");
        assert!(words.next().expect("who made it").starts_with('('), "{version}");
    }
    assert!(versions[0].contains("nbd-cli"), "it says who it is: {}", versions[0]);
}

#[test]
fn a_snapshot_of_an_image_on_a_server_is_served() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = disk_and_qcow2(&qemu_img, &qemu_io);
    let qcow2 = disk.beside("disk.qcow2");
    let ours = disk.beside("qemu-nbd");
    std::os::unix::fs::symlink(crate::support::PROGRAM, &ours).expect("a link");
    let below = crate::support::Server::ours(&["--read-only", "--format", "raw", &qcow2]);
    let options = ["-r", "-f", "qcow2", "-l", "first", below.uri()];
    let server = crate::support::Server::qemu_nbd(Path::new(&ours), "", &options);
    let state = disk.beside("first.img");
    peer(&qemu_img, &["convert", "-l", "first", "-O", "raw", &qcow2, &state]);
    crate::support::nbd_cli(&["image", "compare", server.uri(), &state]).success();
}
