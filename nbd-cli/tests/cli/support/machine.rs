//! A small virtual machine with a Debian kernel, which has the driver of NBD devices.
//!
//! `cargo xtask peers` lays the kernel in `target/kernel`; QEMU runs it without hardware support,
//! in some seconds.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::initramfs::Initramfs;
use super::{PROGRAM, run, tool};

/// The modules that a test may need, with those that they need.
const MODULES: [&str; 16] = [
    "drivers/block/nbd.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_ring.ko",
    "fs/ext4/ext4.ko",
    "fs/jbd2/jbd2.ko",
    "fs/mbcache.ko",
    "lib/crc16.ko",
    "lib/libcrc32c.ko",
    "crypto/crc32c_generic.ko",
    "arch/x86/crypto/crc32c-intel.ko",
    "lib/crc32c.ko",
    "net/core/failover.ko",
];

const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /bin /dev /mnt /proc /run /sbin /sys /tmp /var/tmp
/bin/busybox --install -s /bin
export PATH=/sbin:/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /run
mount -t tmpfs none /tmp
ln -s /bin/modprobe /sbin/modprobe
ip link set lo up
depmod
for module in virtio_pci virtio_blk crc32c_generic ext4; do modprobe -q $module; done
echo 1 4 1 7 > /proc/sys/kernel/printk
# With a terminal of its own no process is told to hang up.
if setsid sh -eux /test 2>&1; then echo machine: passed; else echo machine: failed; fi
dmesg | grep -i -E 'nbd|ext4|bug|panic' | tail -40
poweroff -f
";

const MACHINE: &str = "qemu-system-x86_64";

/// The parts of a machine.
pub(crate) struct Machine {
    qemu: PathBuf,
    busybox: PathBuf,
    mke2fs: PathBuf,
    e2fsck: PathBuf,
    /// Has `boot` and `lib/modules`.
    kernel: PathBuf,
}

impl Machine {
    /// Finds the parts. If one is missing, the test says so and passes; in continuous integration
    /// that holds for the machine and the kernel only, which not every container can get.
    pub(crate) fn find() -> Option<Self> {
        if !cfg!(target_arch = "x86_64") {
            eprintln!("skipped: the virtual machine is for x86_64 only");
            return None;
        }
        let kernel = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("kernel");
        if !kernel.join("boot").is_dir() {
            eprintln!("skipped: there is no kernel in {kernel:?}; `cargo xtask peers` gets one");
            return None;
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|directory| directory.join(MACHINE).is_file()) {
            eprintln!("skipped: {MACHINE} is not installed");
            return None;
        }
        Some(Self {
            qemu: tool(MACHINE)?,
            busybox: tool("busybox")?,
            mke2fs: tool("mke2fs")?,
            e2fsck: tool("e2fsck")?,
            kernel,
        })
    }

    /// Runs a script with the program on its path as `nbd-cli` and `qemu-nbd`, and the disks as
    /// `/dev/vda` and so on.
    ///
    /// Fails unless every command succeeds.
    #[track_caller]
    pub(crate) fn run(&self, script: &str, disks: &[&Path]) {
        let directory = tempfile::tempdir().expect("a directory");
        let initramfs = directory.path().join("initramfs");
        std::fs::write(&initramfs, self.initramfs(script)).expect("the initramfs");
        let mut command = Command::new("timeout");
        // The test must not hang with a machine that hangs.
        command.arg("600").arg(&self.qemu);
        command.args(["-accel", "tcg", "-cpu", "max", "-m", "768", "-smp", "2"]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        command.arg("-kernel").arg(self.vmlinuz()).arg("-initrd").arg(&initramfs);
        // The kernel's test of the timer needs a host that is not busy.
        let options = "console=ttyS0 quiet panic=-1 no_timer_check rdinit=/init";
        command.args(["-append", options]);
        for disk in disks {
            let disk = disk.to_str().expect("a plain name");
            command.args(["-drive", &format!("file={disk},format=raw,if=virtio,discard=unmap")]);
        }
        let outcome = run(&mut command);
        let console = &outcome.stdout;
        assert!(
            console.lines().any(|line| line.trim() == "machine: passed"),
            "{console}\n{}",
            outcome.stderr
        );
    }

    fn initramfs(&self, script: &str) -> Vec<u8> {
        let mut initramfs = Initramfs::default();
        initramfs.script("init", INIT);
        initramfs.script("test", script);
        initramfs.program("bin/busybox", &self.busybox);
        initramfs.program("bin/nbd-cli", Path::new(PROGRAM));
        initramfs.link("bin/qemu-nbd", "nbd-cli");
        initramfs.program("sbin/mke2fs", &self.mke2fs);
        initramfs.link("sbin/mkfs.ext4", "mke2fs");
        initramfs.program("sbin/e2fsck", &self.e2fsck);
        // The console, before there is a file system for it.
        initramfs.directory("dev");
        let release = self.release();
        let modules = Path::new("lib/modules").join(&release);
        for module in MODULES {
            let name = modules.join("kernel").join(module);
            let file = self.kernel.join(&name);
            // Which of them a kernel has built in differs.
            if file.is_file() {
                initramfs.file(&name, &file);
            }
        }
        initramfs.finish()
    }

    fn release(&self) -> String {
        let mut entries = self.kernel.join("lib/modules").read_dir().expect("modules");
        let entry = entries.next().expect("a release").expect("an entry");
        entry.file_name().into_string().expect("a plain name")
    }

    fn vmlinuz(&self) -> PathBuf {
        self.kernel.join("boot").join(format!("vmlinuz-{}", self.release()))
    }
}
