//! Programs of others that judge this server.

use std::process::Command;

/// Notes that a test could not run; where everything has to be there (`CI` is set) that is a
/// failure.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    println!("skipped: {why}");
}

/// Runs a program to its end and gives its standard output; `None` if it is not installed.
pub fn run_peer(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).arg("--version").output() {
        Ok(_) => Some(output_of(program, arguments)),
        Err(error) => {
            skip(&format!("{program}: {error}"));
            None
        }
    }
}

/// Runs a program that has to succeed.
pub fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}: {errors}", output.status);
    text(&output.stdout)
}
