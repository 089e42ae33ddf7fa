//! Kernel devices, in a virtual machine with a kernel that has them.

use std::fs::File;
use std::process::Command;

use crate::support::machine::Machine;
use crate::support::{PROGRAM, nbd_cli, peer, run, says};
use crate::tools;

/// Commands that every script may use.
const COMMON: &str = "
until_ready() { timeout 30 sh -c \"until test -S $1; do sleep 0.1; done\"; }
serve() { nbd-cli serve --socket /tmp/disk.sock --format raw /dev/vda > /tmp/serve.log 2>&1 & server=$!; until_ready /tmp/disk.sock; }
pid_of() { sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' /run/nbd-cli/$1.json; }
uri='nbd+unix:///?socket=/tmp/disk.sock'
";

const SURVIVES: &str = "
nbd-cli devices
serve
device=$(nbd-cli attach --connections 3 --timeout 2 \"$uri\")
test \"$device\" = /dev/nbd0
nbd-cli devices | grep -F \"$uri\" | grep ' rw   3 '
nbd-cli devices --json
/sbin/mke2fs -q -t ext4 $device
mount -t ext4 -o discard $device /mnt
dd if=/dev/urandom of=/mnt/one bs=64k count=48
sync
rm /mnt/one
fstrim /mnt
( dd if=/dev/urandom of=/mnt/two bs=64k count=64 && sync ) & writer=$!
kill -9 $server
rm /tmp/disk.sock
sleep 1
serve
wait $writer
sha256sum /mnt/two > /tmp/sum
! nbd-cli detach $device 2> /tmp/refused
grep -F 'it is mounted at /mnt' /tmp/refused
umount /mnt
mount -t ext4 -o ro $device /mnt
sha256sum -c /tmp/sum
umount /mnt
e2fsck -fn $device
dd if=$device of=/dev/vdb bs=1M
# While the server is away a flush would wait for it: the process that keeps the device does not.
keeper=$(pid_of nbd0)
kill -9 $server
rm /tmp/disk.sock
sleep 3
kill $keeper
timeout 30 sh -c \"while test -e /proc/$keeper; do sleep 0.1; done\"
test -e /sys/block/nbd0/pid
serve
nbd-cli attach --connections 3 --timeout 2 \"$uri\" $device
nbd-cli detach $device
test -z \"$(nbd-cli devices)\"
test ! -e /run/nbd-cli/nbd0.json
# A flush that the server does not answer is explained, and ended by force.
nbd-cli attach --timeout 600 \"$uri\" /dev/nbd7
kill -STOP $server
nbd-cli detach /dev/nbd7 2> /tmp/flushing & flushing=$!
timeout 60 sh -c \"until grep -q 'still being flushed' /tmp/flushing; do sleep 0.1; done\"
timeout 60 nbd-cli detach --force /dev/nbd7
! wait $flushing
kill -CONT $server
timeout 60 sh -c \"while test -e /sys/block/nbd7/pid -o -e /run/nbd-cli/nbd7.json; do sleep 0.1; done\"
kill $server
wait $server
sync
";

const IMAGES: &str = "
gone() { timeout 30 sh -c \"while test -e /sys/block/$1/pid -o -e /run/nbd-cli/$1.json; do sleep 0.1; done\"; }
refused() { ! \"$@\" 2> /tmp/refused; cat /tmp/refused; }

# An image, through a process that is killed while it serves and whose successor adopts the device.
nbd-cli image create --format qcow2 /tmp/disk.qcow2 24M
nbd-cli attach --timeout 2 /tmp/disk.qcow2 /dev/nbd3
/sbin/mke2fs -q -t ext4 /dev/nbd3
mount -t ext4 /dev/nbd3 /mnt
( dd if=/dev/urandom of=/mnt/data bs=64k count=64 && sync ) & writer=$!
kill -9 $(pid_of nbd3)
nbd-cli attach --timeout 2 /tmp/disk.qcow2 /dev/nbd3
wait $writer
sha256sum /mnt/data > /tmp/sum
# In use, it stays attached when its process is told to end.
keeper=$(pid_of nbd3)
kill $keeper
timeout 30 sh -c \"while test -e /proc/$keeper; do sleep 0.1; done\"
test -e /sys/block/nbd3/pid
refused nbd-cli attach memory:24M /dev/nbd3
grep -F \"'/tmp/disk.qcow2 (file \" /tmp/refused
refused nbd-cli attach --read-only /tmp/disk.qcow2 /dev/nbd3
grep -F 'writable, and its source is not' /tmp/refused
# A copy in its place is another disk.
mv /tmp/disk.qcow2 /tmp/elsewhere
cp /tmp/elsewhere /tmp/disk.qcow2
refused nbd-cli attach --timeout 2 /tmp/disk.qcow2 /dev/nbd3
grep -F 'is attached to it' /tmp/refused
mv /tmp/elsewhere /tmp/disk.qcow2
nbd-cli attach --timeout 2 /tmp/disk.qcow2 /dev/nbd3
refused nbd-cli attach /tmp/disk.qcow2 /dev/nbd3
umount /mnt
mount -t ext4 -o ro /dev/nbd3 /mnt
sha256sum -c /tmp/sum
umount /mnt
/sbin/e2fsck -fn /dev/nbd3
dd if=/dev/nbd3 of=/dev/vdb bs=1M
# Unused, it is detached.
kill $(pid_of nbd3)
gone nbd3
nbd-cli image check /tmp/disk.qcow2
dd if=/tmp/disk.qcow2 of=/dev/vda bs=1M
refused nbd-cli detach /dev/nbd3
grep -F 'it is not attached' /tmp/refused

# By force, while it is mounted.
nbd-cli attach --read-only /tmp/disk.qcow2 /dev/nbd6
mount -t ext4 -o ro,noload /dev/nbd6 /mnt
timeout 60 nbd-cli detach --force /dev/nbd6 2> /tmp/refused
grep -F 'it is mounted at /mnt' /tmp/refused
umount /mnt
gone nbd6

# Memory is not adopted: it ended with its process.
nbd-cli attach memory:1M /dev/nbd4
kill -9 $(pid_of nbd4)
refused nbd-cli attach memory:1M /dev/nbd4
grep -F 'is attached to it' /tmp/refused
nbd-cli detach --force /dev/nbd4
gone nbd4

# A device that refuses writes; blocks of another size.
nbd-cli attach --read-only --block-size 4096 --connections 3 /tmp/disk.qcow2 /dev/nbd5
test $(cat /sys/block/nbd5/ro) = 1
test $(cat /sys/block/nbd5/queue/logical_block_size) = 4096
nbd-cli devices | grep -E '/dev/nbd5 +24.0 MiB  ro   3 '
! dd if=/dev/zero of=/dev/nbd5 bs=4096 count=1 conv=fsync
nbd-cli detach /dev/nbd5
refused nbd-cli attach --block-size 3000 memory:1M
refused nbd-cli attach nbd://localhost:1/
test -z \"$(nbd-cli devices)\"

# The command line of qemu-nbd.
qemu-nbd -c /dev/nbd7 -r -f qcow2 --pid-file /tmp/nbd7.pid /tmp/disk.qcow2
cmp /dev/nbd7 /dev/vdb
mount -t ext4 -o ro,noload /dev/nbd7 /mnt
refused qemu-nbd -d /dev/nbd7
grep -F 'it is mounted at /mnt' /tmp/refused
umount /mnt
qemu-nbd -d /dev/nbd7
test ! -e /sys/block/nbd7/pid
qemu-nbd -d /dev/nbd7
refused qemu-nbd -c /dev/vda /tmp/disk.qcow2

# A process that is killed while the kernel looks for partitions ends at once, and its image is free.
qemu-nbd -c /dev/nbd8 --pid-file /tmp/nbd8.pid 'json:{\"driver\":\"null-co\",\"size\":1048576,\"latency-ns\":900000000000}'
keeper=$(cat /tmp/nbd8.pid)
timeout 30 sh -c \"until read reads writes < /sys/block/nbd8/inflight && test \\$reads != 0; do sleep 0.1; done\"
kill -9 $keeper
timeout 30 sh -c \"while test -e /proc/$keeper; do sleep 0.1; done\"
nbd-cli detach --force /dev/nbd8

# TLS, through this process, with a server that is killed and comes back.
nbd-cli tls psk alice --file /tmp/keys --client-file /tmp/alice
tls_serve() { nbd-cli serve --socket /tmp/tls.sock --tls-psk /tmp/keys /tmp/disk.qcow2 & server=$!; until_ready /tmp/tls.sock; }
tls_serve
nbd-cli attach --timeout 2 --tls-psk /tmp/alice 'nbds+unix://alice@/?socket=/tmp/tls.sock' /dev/nbd6
mount -t ext4 /dev/nbd6 /mnt
sha256sum -c /tmp/sum
( dd if=/dev/urandom of=/mnt/more bs=64k count=48 && sync ) & writer=$!
kill -9 $server
rm /tmp/tls.sock
tls_serve
wait $writer
umount /mnt
/sbin/e2fsck -fn /dev/nbd6
nbd-cli detach /dev/nbd6
kill $server
wait $server
nbd-cli image check /tmp/disk.qcow2
cd /tmp
sync

# A backup in a repository: read-only, or with writes that are gone when it is detached.
nbd-cli repo init /tmp/repository
dd if=/dev/urandom of=/tmp/vm.img bs=64k count=32
nbd-cli backup -q --name vm /tmp/vm.img /tmp/repository
refused nbd-cli attach backup:/tmp/repository/vm /dev/nbd8 | grep -F 'read-only'
for option in --temporary --read-only; do
nbd-cli attach $option backup:/tmp/repository/vm@latest /dev/nbd8
cmp /tmp/vm.img /dev/nbd8
test $option = --read-only || dd if=/dev/zero of=/dev/nbd8 bs=64k count=1 conv=fsync
nbd-cli detach /dev/nbd8
gone nbd8
done
";

/// The commands of the guide that need a device, one after the other.
fn guide() -> String {
    let text = include_str!("../../../docs/devices.md");
    let blocks = text.split("\n```sh machine\n").skip(1);
    blocks.filter_map(|block| block.split("```").next()).collect()
}

#[test]
fn devices_of_images_survive_their_process() {
    tools!(qemu_img = "qemu-img");
    let Some(machine) = Machine::find() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let [image, seen] = ["image", "seen"].map(|name| directory.path().join(name));
    for (disk, size) in [(&image, 64 << 20), (&seen, 24 << 20)] {
        File::create(disk).and_then(|file| file.set_len(size)).expect("a disk");
    }
    machine.run(&format!("{COMMON}{IMAGES}"), &[&image, &seen]);
    let [image, seen] = [&image, &seen].map(|name| name.to_str().expect("a plain name"));
    peer(&qemu_img, &["compare", "-f", "qcow2", "-F", "raw", image, seen]);
}

#[test]
fn devices_readme_commands_run() {
    let Some(machine) = Machine::find() else { return };
    machine.run(&guide(), &[]);
}

#[test]
fn devices_keep_a_file_system_through_a_killed_server() {
    tools!(qemu_img = "qemu-img");
    let Some(machine) = Machine::find() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let disks = ["served", "seen"].map(|name| directory.path().join(name));
    for disk in &disks {
        File::create(disk).and_then(|file| file.set_len(32 << 20)).expect("a disk");
    }
    machine.run(&format!("{COMMON}{SURVIVES}"), &[&disks[0], &disks[1]]);
    let names = disks.each_ref().map(|disk| disk.to_str().expect("a plain name"));
    peer(&qemu_img, &["compare", "-f", "raw", "-F", "raw", names[0], names[1]]);
}

#[test]
fn devices_need_administrative_rights() {
    // Root has none without this capability either.
    let mut command = match rustix::process::geteuid().is_root() {
        true => Command::new("setpriv"),
        false => Command::new("env"),
    };
    if command.get_program() == "setpriv" {
        command.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]);
    }
    let outcome = run(command.args([PROGRAM, "attach", "memory:1M"]));
    says(outcome, &["kernel devices need administrative rights (CAP_SYS_ADMIN)"]);
}

#[test]
fn devices_have_names_of_the_kernel() {
    for name in ["/dev/sda", "/dev/nbd0p1", "nbd"] {
        let outcome = nbd_cli(&["detach", name]);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.stderr.contains("is not an NBD device"), "{outcome:?}");
    }
}

#[test]
fn devices_that_are_attached_are_listed_without_rights() {
    let list = nbd_cli(&["devices", "--json"]).success();
    assert!(list.trim_start().starts_with('['), "{list}");
}
