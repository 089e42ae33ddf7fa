//! The progress of `copy`.

use crate::support::{Disk, PROGRAM, nbd_cli, peer};
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

#[test]
fn lines_are_written_elsewhere_if_asked_for() {
    let disk = Disk::sparse();
    let outcome = nbd_cli(&["copy", "--progress", disk.path(), "null:"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.ends_with("100 %  8.0 MiB of 8.0 MiB\n"), "{outcome:?}");
    let outcome = nbd_cli(&["copy", disk.path(), "null:"]);
    assert_eq!(outcome.stderr, "", "{outcome:?}");
}
