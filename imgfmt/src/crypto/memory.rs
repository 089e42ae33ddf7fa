//! How much memory this process may use.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the control groups are, of both versions.
const GROUPS: &str = "/sys/fs/cgroup";

/// Bytes that can be used now without the system or a control group running out of memory: what is
/// available of the machine's memory, and no more than the limits of the groups of this process.
pub(super) fn available() -> u64 {
    let free = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_in(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|file| {
        // Without a limit it has the word 'max'.
        fs::read_to_string(file).ok()?.trim().parse().ok()
    });
    limits.chain(free).min().unwrap_or_else(total)
}

/// All of the machine's memory in bytes.
fn total() -> u64 {
    let system = rustix::system::sysinfo();
    (system.totalram as u64).saturating_mul(u64::from(system.mem_unit))
}

/// The bytes that the kernel's description of its memory says are available.
fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The files with the limits of a process, of its own groups and of those above them. In a container
/// some of them do not exist.
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, names): (_, &[&str]) = match controllers {
            "" => (PathBuf::from(GROUPS), &["memory.max", "memory.high"]),
            list if list.split(',').any(|name| name == "memory") => {
                (Path::new(GROUPS).join("memory"), &["memory.limit_in_bytes"])
            }
            _ => continue,
        };
        for above in Path::new(group).ancestors() {
            let directory = root.join(above.strip_prefix("/").unwrap_or(above));
            files.extend(names.iter().map(|name| directory.join(name)));
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_memory_and_not_the_total_counts() {
        let text = "MemTotal:       16000000 kB\nMemFree: 5 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available_in(text), Some(2 << 20));
        assert_eq!(available_in("MemTotal: 5 kB\n"), None);
        assert!(available() > 0);
    }

    #[test]
    fn limits_of_both_versions_of_control_groups_and_of_the_groups_above_are_looked_for() {
        let found = limit_files("0::/a/b\n");
        let expected = ["a/b/memory.max", "a/b/memory.high", "a/memory.max", "memory.max"];
        assert!(expected.iter().all(|name| found.contains(&Path::new(GROUPS).join(name))));
        let found = limit_files("7:cpu,memory:/a\n6:pids:/a\nnonsense\n");
        let names = ["memory/a/memory.limit_in_bytes", "memory/memory.limit_in_bytes"];
        assert_eq!(found, names.map(|name| Path::new(GROUPS).join(name)));
    }
}
