//! How much memory this process may use.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the control groups are, of both versions.
const GROUPS: &str = "/sys/fs/cgroup";

/// Bytes that can be used now without the system or a control group running out of memory: what is
/// available of the machine's memory, and no more than what the groups of this process have left.
pub(super) fn available() -> u64 {
    let free = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_in(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let left = left_in_groups(Path::new(GROUPS), &groups);
    left.into_iter().chain(free).min().unwrap_or_else(total)
}

/// The bytes that the most limited of the groups has left. The page cache of files that were
/// not used lately counts as left, because the system frees it.
fn left_in_groups(root: &Path, groups: &str) -> Option<u64> {
    // Without a limit it has the word 'max'.
    let number =
        |file: PathBuf| -> Option<u64> { fs::read_to_string(file).ok()?.trim().parse().ok() };
    let left = limit_files(root, groups).into_iter().filter_map(|file| {
        let directory = file.parent()?.to_owned();
        let limit = number(file)?;
        let used = ["memory.current", "memory.usage_in_bytes"]
            .into_iter()
            .find_map(|name| number(directory.join(name)))
            .unwrap_or(0);
        let statistics = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
        Some(limit.saturating_sub(used.saturating_sub(inactive_file(&statistics))))
    });
    left.min()
}

/// The bytes in the page cache that were not used lately, of a group and the groups in it.
fn inactive_file(statistics: &str) -> u64 {
    let of = |name: &str| {
        let mut lines = statistics.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok())
    };
    // The first is what version 1 says of all groups below.
    of("total_inactive_file").or_else(|| of("inactive_file")).unwrap_or(0)
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

/// The files with the limits of a process, of its own groups and of those above them. In a
/// container some of them do not exist.
fn limit_files(root: &Path, groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, names): (_, &[&str]) = match controllers {
            "" => (root.to_owned(), &["memory.max", "memory.high"]),
            list if list.split(',').any(|name| name == "memory") => {
                (root.join("memory"), &["memory.limit_in_bytes"])
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
        let found = limit_files(Path::new(GROUPS), "0::/a/b\n");
        let expected = ["a/b/memory.max", "a/b/memory.high", "a/memory.max", "memory.max"];
        assert!(expected.iter().all(|name| found.contains(&Path::new(GROUPS).join(name))));
        let found = limit_files(Path::new(GROUPS), "7:cpu,memory:/a\n6:pids:/a\nnonsense\n");
        let names = ["memory/a/memory.limit_in_bytes", "memory/memory.limit_in_bytes"];
        assert_eq!(found, names.map(|name| Path::new(GROUPS).join(name)));
    }

    #[test]
    fn what_a_group_uses_already_is_not_available() {
        let root = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let file = root.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let left = |groups: &str| left_in_groups(root.path(), groups);
        assert_eq!(left("0::/a/b\n"), None);
        put("a/memory.max", "1000\n");
        put("a/b/memory.max", "max\n");
        assert_eq!(left("0::/a/b\n"), Some(1000));
        put("a/memory.current", "900\n");
        assert_eq!(left("0::/a/b\n"), Some(100));
        put("a/memory.stat", "anon 700\ninactive_file 150\n");
        assert_eq!(left("0::/a/b\n"), Some(250));
        put("a/memory.current", "1900\n");
        assert_eq!(left("0::/a/b\n"), Some(0));
        put("memory/c/memory.limit_in_bytes", "5000\n");
        put("memory/c/memory.usage_in_bytes", "2000\n");
        put("memory/c/memory.stat", "inactive_file 10\ntotal_inactive_file 500\n");
        assert_eq!(left("4:memory:/c\n"), Some(3500));
    }
}
