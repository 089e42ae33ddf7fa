//! The progress of `copy`.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

use crate::support::{Disk, PROGRAM, nbd_cli, peer, run};
use crate::tools;

#[test]
fn a_bar_is_drawn_on_a_terminal() {
    tools!(script = "script");
    let disk = Disk::sparse();
    let copy = format!("{PROGRAM} copy {} null:", disk.path());
    let drawn = peer(&script, &["-qec", &copy, "/dev/null"]);
    assert!(drawn.contains(" % ") && drawn.contains("left"), "{drawn:?}");
    let copy = format!("{PROGRAM} copy --quiet {} null:", disk.path());
    assert_eq!(peer(&script, &["-qec", &copy, "/dev/null"]), "");
}

/// What `copy` draws on a terminal of so many columns, line by line.
fn drawn(script: &std::path::Path, columns: usize, locale: &str, arguments: &str) -> Vec<String> {
    let inside = format!("stty rows 24 cols {columns}; exec {PROGRAM} {arguments}");
    let mut command = Command::new(script);
    command.args(["-qec", &inside, "/dev/null"]).env("LC_ALL", locale).env("TERM", "xterm");
    let text = run(&mut command).success();
    let pieces = text.split(['\r', '\n']).map(|piece| {
        // Only what moves the cursor is not shown.
        let mut shown = String::new();
        let mut rest = piece;
        while let Some((before, after)) = rest.split_once('\x1b') {
            shown.push_str(before);
            let end = after.find(|byte: char| byte.is_ascii_alphabetic()).map_or(0, |at| at + 1);
            rest = &after[end..];
        }
        shown.push_str(rest);
        shown
    });
    pieces.filter(|line| !line.trim().is_empty()).collect()
}

#[test]
fn the_bar_fits_the_terminal_and_ends_with_a_summary() {
    tools!(script = "script", _stty = "stty");
    let disk = Disk::sparse();
    let converted = disk.beside("converted.qcow2");
    let commands = [
        format!("copy {} null:", disk.path()),
        format!("image convert -O qcow2 {} {converted}", disk.path()),
    ];
    for (command, columns) in commands.iter().flat_map(|command| [(command, 80), (command, 200)]) {
        let _ = std::fs::remove_file(&converted);
        let lines = drawn(&script, columns, "C.UTF-8", command);
        let bars: Vec<_> = lines.iter().filter(|line| line.contains(" % ")).collect();
        let widths = bars.iter().map(|line| line.chars().count());
        assert!(widths.clone().all(|width| width <= columns), "{columns}: {lines:#?}");
        assert!(widths.clone().any(|width| width + 2 >= columns), "{columns}: {lines:#?}");
        let last = bars.last().expect("a bar");
        assert!(last.contains("100 %") && last.contains("8.00 MiB of 8.00 MiB"), "{last}");
        let summary = lines.last().expect("a summary");
        for part in ["8.0 MiB in ", " s, ", "/s: ", " data, ", " holes"] {
            assert!(summary.contains(part), "{part} is missing: {summary}");
        }
    }
}

#[test]
fn the_bar_is_one_line_on_narrow_terminals() {
    tools!(script = "script", _stty = "stty");
    let disk = Disk::sparse();
    let copy = format!("copy {} null:", disk.path());
    for columns in [20, 45, 60, 72] {
        let lines = drawn(&script, columns, "C.UTF-8", &copy);
        let bars: Vec<_> = lines.iter().filter(|line| line.contains(" %")).collect();
        assert!(bars.last().is_some_and(|bar| bar.contains("100 %")), "{columns}: {lines:#?}");
        let is_one_line = |bar: &&String| bar.chars().count() <= columns;
        assert!(bars.iter().all(is_one_line), "{columns}: {lines:#?}");
    }
}

#[test]
fn the_bar_is_plain_where_the_locale_is() {
    tools!(script = "script", _stty = "stty");
    let disk = Disk::sparse();
    let copy = format!("copy {} null:", disk.path());
    let lines = drawn(&script, 80, "C", &copy);
    assert!(lines.iter().all(|line| line.is_ascii()), "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains("###")), "{lines:#?}");
}

#[test]
fn a_program_reads_percents_from_a_descriptor_as_those_of_nbdcopy() {
    tools!(sh = "sh");
    let disk = Disk::sparse();
    let numbers = disk.beside("numbers");
    let copy = format!("{PROGRAM} copy --progress=5 {} null:", disk.path());
    for line in [format!("{copy} 5>{numbers}"), format!("{copy} 5>&1 | cat >{numbers}")] {
        let outcome = run(Command::new(&sh).args(["-c", &line]));
        assert_eq!((outcome.code, &*outcome.stderr), (Some(0), ""), "{outcome:?}");
        let text = std::fs::read_to_string(&numbers).expect("the numbers");
        let percents: Vec<u32> = text
            .lines()
            .map(|line| {
                line.strip_suffix("/100").expect("a part of 100").parse().expect("a number")
            })
            .collect();
        assert_eq!((percents.first(), percents.last()), (Some(&0), Some(&100)), "{text}");
        assert!(percents.is_sorted_by(|one, next| one < next), "{text}");
    }
    // Nothing is opened under the number later, so that no other file is written to.
    for wrong in ["5", "x", "-1", ""] {
        let outcome = nbd_cli(&["copy", &format!("--progress={wrong}"), disk.path(), "null:"]);
        assert_eq!(outcome.code, Some(1), "{wrong}: {outcome:?}");
        assert!(outcome.stderr.contains("file descriptor"), "{wrong}: {outcome:?}");
    }
    // A reader that has gone is neither waited for nor an error.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = Command::new(&sh);
    let ended = command.args(["-c", &format!("{copy} 5>&1 2>{numbers}")]).stdout(writer).status();
    assert_eq!(ended.expect("a shell").code(), Some(0));
    // The short form takes no number, and can be joined with others.
    let outcome = nbd_cli(&["copy", "-pU", disk.path(), "null:"]);
    assert!(outcome.code == Some(0) && outcome.stderr.contains("100 %"), "{outcome:?}");
}

#[test]
fn percents_are_written_to_sockets_and_to_readers_that_have_gone() {
    tools!(sh = "sh", mkfifo = "mkfifo");
    let disk = Disk::sparse();
    let copied = disk.beside("copied");
    let copy = |redirected: &str, output: OwnedFd| {
        let line =
            format!("exec {PROGRAM} copy --progress=5 {} {copied} {redirected}", disk.path());
        let mut command = Command::new(&sh);
        let output = command.args(["-c", &line]).stdout(output).output().expect("a shell");
        assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]), "{output:?}");
        disk.assert_equals(&copied);
        std::fs::remove_file(&copied).expect("the copy");
    };
    let (mut reader, writer) = UnixStream::pair().expect("sockets");
    copy("5>&1 >/dev/null", writer.into());
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("the numbers");
    assert!(text.starts_with("0/100\n") && text.ends_with("\n100/100\n"), "{text}");
    let (reader, writer) = UnixStream::pair().expect("sockets");
    drop(reader);
    copy("5>&1 >/dev/null", writer.into());
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    copy("5>&1 >/dev/null", writer.into());
    // The shell opens it to read, too.
    let fifo = disk.beside("fifo");
    peer(&mkfifo, &[&fifo]);
    let (_reader, writer) = std::io::pipe().expect("a pipe");
    copy(&format!("6<>{fifo} 5>{fifo} 6>&-"), writer.into());
}

#[test]
fn lines_are_written_elsewhere_if_asked_for() {
    let disk = Disk::sparse();
    let outcome = nbd_cli(&["copy", "--progress", disk.path(), "null:"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let (_, end) = outcome.stderr.split_once("100 %  8.0 MiB of 8.0 MiB\n").expect("the end");
    assert!(end.contains(" data, ") && end.ends_with(" holes\n"), "{outcome:?}");
    assert_eq!(end.lines().count(), 1, "{outcome:?}");
    let outcome = nbd_cli(&["copy", disk.path(), "null:"]);
    assert_eq!(outcome.stderr, "", "{outcome:?}");
}
