//! Manual pages made from the definitions of the command line.

use std::process::Command;

use crate::support::run;
use crate::tools;

#[allow(dead_code, reason = "its main function is not called")]
#[path = "../../examples/man.rs"]
mod man;

/// Every page, as names of files in a directory.
fn pages() -> (tempfile::TempDir, Vec<std::path::PathBuf>) {
    let directory = tempfile::tempdir().expect("a directory");
    let pages = directory.path().join("man1");
    man::write_pages(&pages).expect("pages");
    let mut files: Vec<_> =
        pages.read_dir().expect("pages").flatten().map(|it| it.path()).collect();
    files.sort();
    (directory, files)
}

#[test]
fn every_command_has_a_manual_page_that_names_its_options() {
    let (_directory, files) = pages();
    let names: Vec<_> =
        files.iter().filter_map(|file| file.file_name()?.to_str().map(ToOwned::to_owned)).collect();
    for name in ["nbd-cli.1", "nbd-cli-serve.1", "nbd-cli-image-info.1", "nbd-cli-tls-init.1"] {
        assert!(names.iter().any(|found| found == name), "{name} is missing in {names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("-help")), "{names:?}");
    let page = files.iter().find(|file| file.ends_with("nbd-cli-copy.1")).expect("a page");
    let text = std::fs::read_to_string(page).expect("a page");
    for part in [".SH EXAMPLES", ".SH OPTIONS", "\\-\\-connections", ".SH \"SEE ALSO\""] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}

#[test]
fn manual_pages_are_free_of_errors_for_mandoc() {
    tools!(mandoc = "mandoc");
    let (_directory, files) = pages();
    // Warnings, such as those about the date, are about style.
    let outcome = run(Command::new(&mandoc).args(["-T", "lint", "-W", "error"]).args(&files));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

#[test]
fn manual_pages_are_shown_by_man() {
    tools!(man = "man");
    let (_directory, files) = pages();
    for file in &files {
        let mut command = Command::new(&man);
        command.args(["--warnings", "-P", "cat", "-l"]).arg(file);
        command.env("MANWIDTH", "100").env("LC_ALL", "C.UTF-8");
        let shown = run(&mut command);
        assert_eq!(shown.code, Some(0), "{shown:?}");
        assert!(shown.stdout.contains("SYNOPSIS"), "{shown:?}");
    }
}
