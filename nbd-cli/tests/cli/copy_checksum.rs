//! `copy --checksum`: the checksum of what was copied, computed on the way.

use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::support::{Disk, PROGRAM, Server, nbd_cli, says};
use crate::tools;

fn checksum(algorithm: &str, source: &str) -> String {
    let line = nbd_cli(&["checksum", "-q", "-f", "raw", "-a", algorithm, source]).success();
    line.split(' ').next().expect("a digest").to_owned()
}

#[test]
fn a_copy_prints_the_checksum_of_the_disk() {
    let disk = Disk::sparse();
    let server = Server::ours(&["--read-only", disk.path()]);
    let target = disk.beside("copy.img");
    for algorithm in ["sha256", "sha512", "blkhash"] {
        let expected = checksum(algorithm, disk.path());
        let option = format!("--checksum={algorithm}");
        for source in [server.uri(), disk.path()] {
            for more in [&["--request-size", "4K"][..], &["--no-extents", "-S", "0"], &["-C", "4"]]
            {
                let arguments = [&["copy", &option, source, &target][..], more].concat();
                let said = nbd_cli(&arguments).success();
                assert_eq!(said, format!("{expected}  {source}\n"), "{more:?}");
                assert_eq!(checksum(algorithm, &target), expected, "{source}, {more:?}");
            }
        }
    }
    let said = nbd_cli(&["copy", "--checksum", disk.path(), "null:"]).success();
    assert_eq!(said, format!("{}  {}\n", checksum("sha256", disk.path()), disk.path()));
}

#[test]
fn standard_input_has_a_checksum_as_well() {
    let disk = Disk::sparse();
    let target = disk.beside("copy.img");
    let mut child = Command::new(PROGRAM)
        .args(["copy", "--checksum=blkhash", "--request-size", "64K", "-", &target])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nbd-cli");
    child.stdin.take().expect("its input").write_all(&disk.content()[..3_000_001]).expect("room");
    let output = child.wait_with_output().expect("its end");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).expect("text");
    assert_eq!(said, format!("{}  -\n", checksum("blkhash", &target)));
}

#[test]
fn a_copy_with_another_checksum_than_expected_leaves_nothing() {
    let disk = Disk::sparse();
    let target = disk.beside("copy.img");
    let expected = checksum("sha256", disk.path());
    let copy = |expected: &str, target: &str| {
        nbd_cli(&["copy", "--checksum", "--expect", expected, disk.path(), target])
    };
    copy(&expected.to_uppercase(), &target).success();
    disk.assert_equals(&target);
    std::fs::remove_file(&target).expect("it is there");
    let wrong = "0".repeat(64);
    says(copy(&wrong, &target), &["another sha256 than expected", &expected, "copy.img"]);
    for left in [target.clone(), format!("{target}.partial")] {
        assert!(!std::path::Path::new(&left).exists(), "{left}");
    }
    says(copy("abc", &target), &["is not a sha256", "64 hexadecimal digits"]);
    says(nbd_cli(&["copy", "--checksum", disk.path(), "-"]), &["--checksum", "standard output"]);
}

/// A hole does not have to be written to be part of the checksum.
#[test]
fn a_disk_that_is_mostly_a_hole_has_its_checksum_soon() {
    tools!(truncate = "truncate");
    let disk = Disk::sparse();
    let huge = disk.beside("huge.img");
    crate::support::peer(&truncate, &["-s", "64G", &huge]);
    let said = nbd_cli(&["copy", "--checksum=blkhash", &huge, "null:"]).success();
    assert_eq!(said, format!("{}  {huge}\n", checksum("blkhash", &huge)));
}
