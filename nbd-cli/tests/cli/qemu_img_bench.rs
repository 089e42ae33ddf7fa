//! `qemu-img bench` beside QEMU's own.

use std::process::Command;

use crate::support::qemu_img::{ours, words};
use crate::support::run;
use crate::tools;

const CASES: &str = "
    bench -c 10 disk.qcow2
    bench -c 10 -d 1 -f raw disk.qcow2
    bench -w -c 10 disk.qcow2
    bench -q -c 0x10 -s 8k -S 64k -o 1M -d 4 disk.qcow2
    bench -w --pattern=7 -c 5 disk.qcow2
    bench -w --pattern 0x41 -c 7 -s 1000 -S 3000 -o 100 -d 3 disk.qcow2
    bench -w -c 20 -d 2 --flush-interval=5 disk.qcow2
    bench -w -c 20 -d 2 --flush-interval=5 --no-drain disk.qcow2
    bench -w --flush-interval=100 -d 64 -c 3 disk.qcow2
    bench --no-drain -c 3 disk.qcow2
    bench -c 3 -i threads disk.qcow2
    bench -c 3 -U disk.qcow2
    bench -c 3 -S 0 disk.qcow2
    bench -w -c 3000 -s 64k -d 8 disk.qcow2
    bench -c 5 --image-opts driver=qcow2,file.filename=disk.qcow2
    bench -c 4 -d 1 -s 3M -o 6M disk.qcow2
    bench -c 5 -o 9M disk.qcow2
    bench -c 1 -s 9M disk.qcow2
    bench -c 0 disk.qcow2
    bench -c x disk.qcow2
    bench -d 0 disk.qcow2
    bench -d -1 disk.qcow2
    bench -s 0 disk.qcow2
    bench -s 3G disk.qcow2
    bench -S 3G disk.qcow2
    bench -o x disk.qcow2
    bench -w --pattern 256 disk.qcow2
    bench -w --pattern x disk.qcow2
    bench --flush-interval=5 disk.qcow2
    bench -w -c 3 -d 7 --flush-interval=5 disk.qcow2
    bench -i nosuch disk.qcow2
    bench -i native -c 3 disk.qcow2
    bench -n -c 3 disk.qcow2
    bench -t nosuch disk.qcow2
    bench -w -U -c 3 disk.qcow2
    bench -c 5 nosuch.img
    bench
    bench a b
";

#[test]
fn images_are_measured_alike_and_hold_the_same_afterwards() {
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let theirs = |line: &str| run(Command::new("qemu-img").args(words(line)).current_dir(here));
    // All but the time.
    let comparable = |text: &str| match text.split_once("Run completed in ") {
        None => text.to_owned(),
        Some((before, time)) => {
            let number = time.strip_suffix(" seconds.\n").unwrap();
            assert!(number.parse::<f64>().is_ok() && number.split('.').nth(1).unwrap().len() == 3);
            before.to_owned() + "Run completed"
        }
    };
    for line in CASES.lines().map(str::trim).filter(|line| !line.is_empty()) {
        for name in ["disk.qcow2", "copy.qcow2"] {
            theirs(&format!("create -q -f qcow2 {name} 8M")).success();
        }
        let expected = theirs(&line.replace("disk.qcow2", "copy.qcow2"));
        let found = ours(here, &words(line));
        assert_eq!(found.code, expected.code, "{line}: {found:?} {expected:?}");
        assert_eq!(comparable(&found.stdout), comparable(&expected.stdout), "{line}: {found:?}");
        assert_eq!(found.stderr.is_empty(), expected.stderr.is_empty(), "{line}: {found:?}");
        theirs("compare disk.qcow2 copy.qcow2").success();
        theirs("check disk.qcow2").success();
    }
}
