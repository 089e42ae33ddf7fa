//! Reading images that other programs write, and images on file systems without locks.

use std::path::Path;
use std::process::Command;

use crate::support::{Disk, Outcome, PROGRAM, Server, nbd_cli, peer, run, tool};
use crate::tools;

/// Commands that only read `image`, without and with the option that shares it.
fn readers<'a>(image: &'a str, new: &'a str, other: &'a str) -> Vec<Vec<&'a str>> {
    vec![
        vec!["image", "info", image],
        vec!["image", "info", "--json", "--backing-chain", image],
        vec!["image", "check", image],
        vec!["image", "map", image],
        vec!["image", "compare", image, other],
        vec!["image", "compare", other, image],
        vec!["image", "convert", image, new],
        vec!["image", "measure", image],
        vec!["image", "snapshot", "list", image],
        vec!["bitmap", "list", image],
        vec!["restore", image, new],
        vec!["copy", image, new],
    ]
}

/// Checks every command on an image that another program writes.
fn everything_can_look(disk: &Disk, image: &str) {
    let new = disk.beside("new");
    for command in readers(image, &new, disk.path()) {
        let outcome = nbd_cli(&command);
        assert_ne!(outcome.code, Some(0), "{command:?}: {outcome:?}");
        let advised = outcome.stderr.contains("add -U") && outcome.stderr.contains(image);
        assert!(advised, "{command:?}: {outcome:?}");
        for option in ["-U", "--force-share"] {
            let outcome = nbd_cli(&[&command[..], &[option]].concat());
            assert_eq!(outcome.code, Some(0), "{command:?} {option}: {outcome:?}");
            if Path::new(&new).exists() {
                std::fs::remove_file(&new).expect("the copy");
            }
        }
    }
    let serve = ["serve", "--run", "true", "--read-only", image];
    let outcome = nbd_cli(&serve);
    assert!(outcome.stderr.contains("add --force-share"), "{outcome:?}");
    nbd_cli(&[&serve[..], &["--force-share"]].concat()).success();
}

#[test]
fn everything_that_only_reads_can_look_at_an_image_that_we_serve() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    nbd_cli(&["bitmap", "add", &image, "daily"]).success();
    let server = Server::ours(&["--format", "qcow2", &image]);
    everything_can_look(&disk, &image);
    server.end();
}

#[test]
fn everything_that_only_reads_can_look_at_an_image_that_qemu_serves() {
    tools!(qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    let server = Server::qemu_nbd(&qemu_nbd, "", &["-f", "qcow2", &image]);
    everything_can_look(&disk, &image);
    server.end();
}

#[test]
fn what_changes_an_image_cannot_share_it() {
    let disk = Disk::sparse();
    let image = disk.path();
    for command in [
        &["image", "check", "--repair", "all", "-U", image][..],
        &["image", "resize", "-U", image, "+1M"],
        &["bitmap", "add", "-U", image, "name"],
        &["serve", "--force-share", "--run", "true", image],
    ] {
        let outcome = nbd_cli(command);
        assert_eq!(outcome.code, Some(1), "{command:?}: {outcome:?}");
    }
}

/// Makes a library that takes locks away from programs, as some network file systems do.
fn without_locks(disk: &Disk) -> Option<String> {
    let (source, library) = (disk.beside("no-locks.c"), disk.beside("no-locks.so"));
    let compiler = tool("gcc")?;
    let text = "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <errno.h>\n#include <fcntl.h>\n\
        #include <stdarg.h>\n\
        static int is_lock(int c) { return c == F_OFD_SETLK || c == F_OFD_GETLK; }\n\
        #define WITHOUT(name) int name(int fd, int c, ...) { va_list a; va_start(a, c); \\\n\
          void *p = va_arg(a, void *); va_end(a); if (is_lock(c)) { errno = ENOLCK; return -1; } \\\n\
          return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(fd, c, p); }\n\
        WITHOUT(fcntl) WITHOUT(fcntl64)\n";
    std::fs::write(&source, text).expect("room");
    peer(&compiler, &["-shared", "-fPIC", "-o", &library, &source, "-ldl"]);
    Some(library)
}

#[test]
fn a_file_system_without_locks_is_warned_of_and_used() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let Some(library) = without_locks(&disk) else { return };
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    let unlocked = |arguments: &[&str]| -> Outcome {
        run(Command::new(PROGRAM).args(arguments).env("LD_PRELOAD", &library))
    };
    let new = disk.beside("new");
    let changes: &[&[&str]] = &[
        &["bitmap", "add", &image, "NAME"],
        &["image", "resize", &image, "+1M"],
        &["image", "snapshot", "create", &image, "NAME"],
        &["image", "check", "--repair", "all", &image],
        &["serve", "--run", "true", &image],
        &["serve", "--temporary", "--run", "true", &image],
    ];
    let readers = readers(&image, &new, disk.path());
    let all = readers.iter().map(Vec::as_slice).chain(changes.iter().copied());
    for command in all {
        let one_option = |option: &'static str| {
            let words = command.iter().map(|word| if *word == "NAME" { option } else { word });
            let outcome = unlocked(&words.chain(["--locking", option]).collect::<Vec<_>>());
            if Path::new(&new).exists() {
                std::fs::remove_file(&new).expect("the copy");
            }
            outcome
        };
        let is_compare = command[1] == "compare";
        let good = |outcome: &Outcome| outcome.code == Some(0) || is_compare;
        let auto = one_option("auto");
        assert!(good(&auto), "{command:?}: {auto:?}");
        let of_image = format!("'{image}' has no locks");
        let warnings = auto.stderr.matches(&of_image).count();
        assert_eq!(warnings, 1, "{command:?}: {auto:?}");
        assert!(auto.stderr.contains("add --locking off"), "{command:?}: {auto:?}");
        let off = one_option("off");
        assert!(good(&off) && !off.stderr.contains("locks"), "{command:?}: {off:?}");
        let on = one_option("on");
        assert_ne!(on.code, Some(0), "{command:?}: {on:?}");
        assert!(on.stderr.contains("no locks") && on.stderr.contains("off"), "{command:?}: {on:?}");
    }
    // What makes new files.
    let raw = ["image", "convert", "--force-share", "-O", "raw", &image, &new];
    for command in [
        &["image", "create", "-f", "qcow2", "-b", &image, "-F", "qcow2", &new][..],
        &["image", "create", "-f", "qcow2", "--preallocation", "metadata", &new, "1M"],
        &["copy", "--force-share", &image, &new],
        &raw,
    ] {
        for (option, code) in [("auto", 0), ("off", 0), ("on", 1)] {
            let outcome = unlocked(&[command, &["--locking", option]].concat());
            assert_eq!(outcome.code, Some(code), "{command:?} {option}: {outcome:?}");
            match code {
                0 => std::fs::remove_file(&new).expect("the new file"),
                _ => assert!(outcome.stderr.contains("no locks"), "{command:?}: {outcome:?}"),
            }
        }
    }
}
