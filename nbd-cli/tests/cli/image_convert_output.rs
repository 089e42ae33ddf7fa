//! `image convert` to standard output.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{PROGRAM, nbd_cli, tool};

/// Not a multiple of any unit but sectors.
const SIZE: u64 = (9 << 20) + 3 * 512;

/// The formats that are written in order, and what such an image is called by itself.
const KINDS: &[(&str, &[&str])] = &[
    ("raw", &[]),
    ("vpc", &["-o", "subformat=fixed,force_size=on"]),
    ("vmdk", &["-o", "subformat=streamOptimized"]),
];

/// A qcow2 image with data at its start, in the middle and at its end, and zeroes among it.
fn source(directory: &Path) -> String {
    let (raw, qcow2) = (directory.join("disk.img"), directory.join("disk.qcow2"));
    let file = File::create(&raw).expect("a file");
    file.set_len(SIZE).expect("room");
    for (start, length, value) in
        [(0, 700_000, 1), (1 << 20, 1 << 20, 0), (5 << 20, 1 << 20, 2), (SIZE - 512, 512, 3)]
    {
        file.write_all_at(&vec![value; length], start).expect("room");
    }
    let [raw, qcow2] = [raw, qcow2].map(|path| path.to_str().expect("text").to_owned());
    nbd_cli(&["image", "convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2]).success();
    qcow2
}

fn convert(arguments: &[&str], output: impl Into<Stdio>) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(["image", "convert"]).args(arguments).stdin(Stdio::null());
    command.stdout(output).stderr(Stdio::piped()).spawn().expect("nbd-cli")
}

fn output_of(child: Child) -> (Output, String) {
    let output = child.wait_with_output().expect("its end");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

#[test]
fn each_format_that_is_written_in_order_goes_through_a_pipe() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    for (format, options) in KINDS {
        let arguments = [&["-O", format], *options, &[&*from, "-"]].concat();
        let (output, said) = output_of(convert(&arguments, Stdio::piped()));
        assert!(output.status.success() && said.is_empty(), "{format}: {said}");
        let to = directory.path().join(format);
        fs::write(&to, &output.stdout).expect("room");
        let to = to.to_str().expect("text");
        nbd_cli(&["image", "compare", "-f", "qcow2", "-F", format, &from, to]).success();
        if *format == "raw" {
            assert_eq!(output.stdout.len() as u64, SIZE);
        }
        // QEMU knows it by its end, and reads the same.
        if let Some(qemu_img) = tool("qemu-img") {
            let same = Command::new(qemu_img)
                .args(["compare", "-q", "-f", "qcow2", "-F", format, &from, to])
                .status();
            assert!(same.expect("qemu-img").success(), "{format}");
        }
    }
}

#[test]
fn formats_and_options_that_need_a_file_are_refused_before_anything_is_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let fixed = "subformat=fixed";
    for (arguments, what) in [
        (&["-O", "qcow2"][..], "make a raw image"),
        (&["-O", "vdi"], "make a raw image"),
        (&["-O", "vhdx", "-o", fixed], "make a raw image"),
        (&["-O", "vpc"], fixed),
        (&["-O", "vmdk"], "subformat=streamOptimized"),
        (&["-O", "raw", "-o", "preallocation=falloc"], "in files only"),
        (&["--no-create", "-O", "raw"], "--no-create"),
        (&["--flush"], "--flush"),
        (&["--json"], "--json"),
        (&["--bitmaps"], "--bitmaps"),
        (&["-t", "none"], "--cache"),
    ] {
        let (output, said) =
            output_of(convert(&[arguments, &[&*from, "-"]].concat(), Stdio::piped()));
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty() && said.contains(what), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_reader_that_leaves_ends_the_conversion_as_it_ends_cat() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    for (format, options) in KINDS {
        let mut child =
            convert(&[&["-O", format], *options, &[&*from, "-"]].concat(), Stdio::piped());
        drop(child.stdout.take());
        let (output, said) = output_of(child);
        assert_eq!(output.status.code(), Some(141), "128 + SIGPIPE: {format}");
        assert_eq!(said, "", "{format}");
    }
}

#[test]
fn a_full_disk_at_standard_output_is_reported_in_one_sentence() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    for (format, options) in KINDS {
        let full = File::options().write(true).open("/dev/full").expect("/dev/full");
        let arguments = [&["-O", format], *options, &[&*from, "-"]].concat();
        let (output, said) = output_of(convert(&arguments, full));
        assert_eq!(output.status.code(), Some(1), "{format}");
        assert!(said.contains("cannot write to standard output: No space"), "{format}: {said}");
        assert!(said.lines().count() == 1 && !said.contains("os error"), "{format}: {said}");
    }
}

/// The reader has a part and reads no more, so that the program waits for it.
#[test]
fn an_interrupted_conversion_ends_although_nobody_reads_and_what_it_wrote_is_no_image() {
    let directory = tempfile::tempdir().expect("a directory");
    let raw = directory.path().join("noise.img");
    let noise: Vec<u8> = (0..9 << 20)
        .scan(1_u32, |state, _: u32| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some((*state >> 24) as u8)
        })
        .collect();
    fs::write(&raw, noise).expect("room");
    let raw = raw.to_str().expect("text");
    for (format, options) in KINDS {
        let mut child = convert(
            &[&["-f", "raw", "-O", format], *options, &[raw, "-"]].concat(),
            Stdio::piped(),
        );
        let mut stdout = child.stdout.take().expect("its output");
        let mut written = vec![0; 100_000];
        stdout.read_exact(&mut written).expect("a part");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("a signal");
        let (output, said) = output_of(child);
        assert_eq!(output.status.code(), Some(143), "{format}: {said}");
        assert!(said.contains("interrupted by SIGTERM"), "{format}: {said}");
        stdout.read_to_end(&mut written).expect("the rest");
        let part = directory.path().join("part");
        fs::write(&part, &written).expect("room");
        if *format == "vmdk" {
            let part = part.to_str().expect("text");
            let opened = nbd_cli(&["image", "map", "-f", format, part]);
            assert_eq!(opened.code, Some(1), "{opened:?}");
            assert!(opened.stderr.contains("cut off"), "{opened:?}");
        }
        assert!((written.len() as u64) < 9 << 20, "{format}: {}", written.len());
        assert_ne!(&written[written.len() - 512..][..8], b"conectix", "{format}");
    }
}

#[test]
fn a_terminal_gets_no_disk() {
    let Some(script) = tool("script") else {
        println!("skipped: there is no 'script'");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    for command in ["image convert", "copy"] {
        let line = format!("'{PROGRAM}' {command} '{from}' -");
        let mut terminal = Command::new(&script);
        terminal.args(["-q", "-e", "-c", &line, "/dev/null"]).stdin(Stdio::null());
        let output = terminal.output().expect("script");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{command}: {said}");
        assert!(said.contains("is a terminal") && said.len() < 1000, "{command}: {said}");
    }
}
