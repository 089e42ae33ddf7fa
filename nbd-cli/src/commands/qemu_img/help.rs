//! The output of `--help`.

use nbd_jobs::getopt::{Known, Takes};

use super::known::Opt;

/// The help of the program.
pub(super) fn program(commands: &[(&str, &str)]) -> String {
    let mut text = "\
Usage: qemu-img [OPTIONS] COMMAND [--help | COMMAND OPTIONS]
Create, inspect, convert and change disk images (nbd-cli in place of qemu-img)

  -h, --help             print this help
  -V, --version          print the version
  -T, --trace=PATTERN    accepted, and without an effect

Commands:
"
    .to_owned();
    for (name, meaning) in commands {
        text.push_str(&format!("  {name:<10} {meaning}\n"));
    }
    text.push_str(
        "\nSupported image formats:\n\n  \
         file host_device https luks nbd parallels qcow qcow2 qed raw vdi vhdx vmdk vpc\n\n\
         As in QEMU, the names in images are followed, and formats that are not given are detected:\n\
         use 'nbd-cli image' for images from untrusted sources.\n",
    );
    text
}

/// The help of a command: its options without their meanings, which are those of qemu-img.
pub(super) fn command(name: &str, meaning: &str, operands: &str, options: &[Known<Opt>]) -> String {
    let mut text =
        format!("{meaning}.  Usage:\n  qemu-img {name} [OPTIONS] {operands}\n\nOptions:\n");
    for option in options {
        let short = option.short.map_or("    ".to_owned(), |short| format!("-{}, ", short as char));
        let value = if option.takes == Takes::Value { " VALUE" } else { "" };
        text.push_str(&format!("  {short}--{}{value}\n", option.long));
    }
    text
}
