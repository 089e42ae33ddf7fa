//! Images of other programs' formats that the qemu-img form makes, beside QEMU's own.

use std::os::unix::fs::symlink;
use std::process::Command;

use crate::support::qemu_img::{compare_all, ours, words};
use crate::support::run;
use crate::tools;

#[test]
fn images_of_other_formats_are_created_and_converted_alike() {
    compare_all(
        "
        create -f vdi new.vdi 3M => new.vdi
        create -f vdi -o static=on new.vdi 3M => new.vdi
        create -f vdi -o static=off,size=1000 new.vdi => new.vdi
        create -f vpc new.vpc 3M => new.vpc
        create -f vpc -o subformat=fixed new.vpc 3M ; info -f vpc new.vpc
        create -f vpc -o subformat=fixed,force_size=on new.vpc 3M ; info -f vpc new.vpc
        create -f vpc -o force_size=off new.vpc 3M => new.vpc
        create -f vpc -o subformat=nosuch new.vpc 3M
        create -f vpc new.vpc 2041G
        create -f vhdx new.vhdx 3M => new.vhdx
        create -f vhdx -o subformat=fixed,log_size=2M,block_size=1M new.vhdx 3M => new.vhdx
        create -f vhdx -o block_state_zero=off new.vhdx 3M => new.vhdx
        create -f vhdx -o block_size=3M new.vhdx 3M
        create -f vhdx -o subformat=nosuch new.vhdx 3M
        create -f vhdx new.vhdx 65T
        create -f vmdk new.vmdk 3M => new.vmdk
        create -f vmdk -o adapter_type=lsilogic,hwversion=10 new.vmdk 3M => new.vmdk
        create -f vmdk -o compat6=on,toolsversion=7,zeroed_grain=on new.vmdk 3M => new.vmdk
        create -f vmdk -o compat6=on,hwversion=10 new.vmdk 3M
        create -f vmdk -o adapter_type=nosuch new.vmdk 3M
        create -f vmdk -o nosuch=1 new.vmdk 3M
        create -f vdi raw.img 3M => raw.img
        convert -O vdi disk.qcow2 new.vdi => new.vdi
        convert -O vdi -o static=on raw.img new.vdi => new.vdi
        convert -O vpc disk.qcow2 new.vpc => new.vpc
        convert -O vpc -o subformat=fixed,force_size=on odd.img new.vpc ; compare -F vpc odd.img new.vpc
        convert -O vhdx top.qcow2 new.vhdx => new.vhdx
        convert -O vhdx -o subformat=fixed longer.qcow2 new.vhdx ; compare longer.qcow2 new.vhdx
        convert -O vmdk disk.qcow2 new.vmdk => new.vmdk
        convert -p -m 4 -W -O vmdk raw.img new.vmdk => new.vmdk
        convert -O vmdk disk.qcow2 new.vmdk ; convert -O vdi new.vmdk new.vdi => new.vdi
        create -f vmdk -o subformat=streamOptimized new.vmdk 3M => new.vmdk
        convert -O vmdk -o subformat=streamOptimized disk.qcow2 new.vmdk ; compare disk.qcow2 new.vmdk
        convert -c -O vmdk -o subformat=streamOptimized raw.img new.vmdk ; compare raw.img new.vmdk
        convert -p -m 8 -O vmdk -o subformat=streamOptimized top.qcow2 new.vmdk ; compare top.qcow2 new.vmdk
        convert -c -O vmdk disk.qcow2 new.vmdk ; compare disk.qcow2 new.vmdk
        convert -c -O vdi disk.qcow2 new.vdi
        create -f vmdk -o subformat=monolithicFlat new.vmdk 3M => new.vmdk
        create -f vmdk -o subformat=monolithicFlat new.vmdk 3M ; create -f vmdk -o subformat=monolithicFlat new.vmdk 2M => new.vmdk
        create -f vmdk -o subformat=twoGbMaxExtentFlat,adapter_type=lsilogic,toolsversion=7 new.vmdk 5G => new.vmdk
        create -f vmdk -o subformat=twoGbMaxExtentSparse,zeroed_grain=on new.vmdk 5G => new.vmdk
        create -f vmdk -o subformat=twoGbMaxExtentSparse,compat6=on sub/new 3M => sub/new
        create -f vmdk -o subformat=twoGbMaxExtentSparse,hwversion=9 sub/a.b.vmdk 3M => sub/a.b.vmdk
        create -f vmdk -o subformat=monolithicFlat,zeroed_grain=on new.vmdk 3M
        create -f vmdk -o subformat=nosuch new.vmdk 3M
        create -f vmdk -b sparse.vmdk -F vmdk new.vmdk => new.vmdk
        create -f vmdk -b sparse.vmdk -F vmdk new.vmdk 3M => new.vmdk
        create -f vmdk -b sparse.vmdk -F vmdk -o subformat=twoGbMaxExtentSparse new.vmdk => new.vmdk
        create -f vmdk -o backing_file=sparse.vmdk,backing_fmt=vmdk,adapter_type=lsilogic,hwversion=9 new.vmdk => new.vmdk
        create -f vmdk -b sparse.vmdk -F vmdk new.vmdk ; create -f vmdk -b new.vmdk -F vmdk third.vmdk 4M ; compare sparse.vmdk third.vmdk
        create -f vmdk -b sparse.vmdk -F vmdk -o subformat=monolithicFlat new.vmdk
        create -f vmdk -b sparse.vmdk new.vmdk
        create -f vmdk -b raw.img -F raw new.vmdk
        create -f vmdk -b sparse.vmdk -F vmdk sparse.vmdk
        convert -O vmdk -o subformat=monolithicFlat disk.qcow2 new.vmdk => new.vmdk
        convert -O vmdk -o subformat=monolithicFlat odd.img new.vmdk ; compare odd.img new.vmdk
        convert -p -O vmdk -o subformat=twoGbMaxExtentFlat top.qcow2 new.vmdk => new.vmdk
        convert -O vmdk -o subformat=twoGbMaxExtentSparse longer.qcow2 new.vmdk => new.vmdk
        convert -S 0 -O vmdk -o subformat=monolithicFlat disk.qcow2 new.vmdk ; compare disk.qcow2 new.vmdk
        convert -O vmdk -o subformat=monolithicFlat disk.qcow2 new.vmdk ; convert -O vmdk -o subformat=twoGbMaxExtentSparse new.vmdk second.vmdk => second.vmdk
        convert -O vmdk disk.qcow2 base.vmdk ; convert -O vmdk -B base.vmdk -F vmdk top.qcow2 new.vmdk ; compare top.qcow2 new.vmdk
        convert -O vmdk disk.qcow2 base.vmdk ; convert -O vmdk -o subformat=twoGbMaxExtentSparse -B base.vmdk -F vmdk raw.img new.vmdk ; compare raw.img new.vmdk
        dd -O vdi bs=64k if=disk.qcow2 of=new.vdi => new.vdi
        ",
    );
}

#[test]
fn the_parts_of_a_disk_whose_name_is_a_link_are_found() {
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    std::fs::write(here.join("disk.img"), vec![7; 1 << 20]).expect("room");
    std::fs::create_dir(here.join("other")).expect("a directory");
    for name in ["real.vmdk", "other/real.vmdk"] {
        std::fs::write(here.join(name), "old").expect("room");
    }
    symlink("real.vmdk", here.join("link.vmdk")).expect("a link");
    symlink("other/real.vmdk", here.join("away.vmdk")).expect("a link");
    let convert = |to: &str| {
        let line = format!("convert -f raw -O vmdk -o subformat=twoGbMaxExtentFlat disk.img {to}");
        ours(here, &words(&line))
    };
    convert("link.vmdk").success();
    for name in ["link.vmdk", "real.vmdk"] {
        let compare = words(&format!("compare -f raw -F vmdk disk.img {name}"));
        run(Command::new("qemu-img").args(compare).current_dir(here)).success();
    }
    let names = |directory: &str| {
        let files = std::fs::read_dir(here.join(directory)).expect("a directory");
        let mut names: Vec<_> = files.map(|file| file.expect("a file").file_name()).collect();
        names.sort();
        names
    };
    let expected = ["away.vmdk", "disk.img", "link.vmdk", "other", "real-f001.vmdk", "real.vmdk"];
    assert_eq!(names(""), expected);
    // Both programs look for the parts beside the link.
    let refused = convert("away.vmdk");
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("symbolic link to"), "{refused:?}");
    assert_eq!(names("other"), ["real.vmdk"]);
    assert_eq!(std::fs::read(here.join("other/real.vmdk")).expect("the file"), b"old");
}

#[test]
fn images_of_other_formats_are_checked_alike() {
    compare_all(
        "
        convert -O vdi disk.qcow2 new.vdi ; check new.vdi ; check --output=json new.vdi
        create -f vdi new.vdi 3M ; check new.vdi ; check --output=json new.vdi
        convert -O vdi -o static=on longer.qcow2 new.vdi ; check -f vdi new.vdi
        convert -O vdi disk.qcow2 new.vdi ; check -r all new.vdi
        convert -O vhdx -o block_size=1M longer.qcow2 new.vhdx ; check new.vhdx ; check --output=json new.vhdx
        convert -O vhdx disk.qcow2 new.vhdx ; check -r all new.vhdx ; check -r leaks new.vhdx
        convert -O vmdk disk.qcow2 new.vmdk ; check new.vmdk ; check --output=json new.vmdk
        convert -O vmdk -o subformat=streamOptimized disk.qcow2 new.vmdk ; check new.vmdk
        convert -O vmdk -o subformat=monolithicFlat disk.qcow2 new.vmdk ; check new.vmdk
        convert -O vmdk -o subformat=twoGbMaxExtentSparse longer.qcow2 new.vmdk ; check new.vmdk
        create -f vmdk -b sparse.vmdk -F vmdk new.vmdk ; check new.vmdk
        check -r all sparse.vmdk
        check -r leaks sparse.vmdk
        convert -O vpc disk.qcow2 new.vpc ; check new.vpc
        ",
    );
}
