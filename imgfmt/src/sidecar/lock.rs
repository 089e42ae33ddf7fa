//! The lock of a sidecar, and the process that holds it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::thread::sleep;
use std::time::Duration;

use crate::access::Access;

/// Number of attempts: a read-only open holds the lock only while it reads a file.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// Locks a sidecar that was found. A writable open waits up to a second for other processes:
/// without the sidecar, the bits would be lost permanently. A read-only open loses nothing and does
/// not wait.
///
/// # Errors
///
/// `WouldBlock`, with a clause that names the process that has locked it, if known.
pub(super) fn lock(file: &File, access: Access) -> io::Result<()> {
    if access == Access::ReadOnly {
        return file.try_lock_shared().map_err(|error| explained(error.into(), file));
    }
    for _ in 1..TRIES {
        match file.try_lock().map_err(io::Error::from) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(PAUSE),
            other => return other,
        }
    }
    file.try_lock().map_err(|error| explained(error.into(), file))
}

fn explained(error: io::Error, file: &File) -> io::Error {
    if error.kind() != io::ErrorKind::WouldBlock {
        return error;
    }
    let holder = std::fs::read_to_string("/proc/locks").ok().and_then(|locks| {
        let metadata = file.metadata().ok()?;
        let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
        holder(&locks, &format!("{major:02x}:{minor:02x}:{}", metadata.ino()))
    });
    let holder = holder.map_or("another program".into(), |process| format!("process {process}"));
    io::Error::new(error.kind(), format!("{holder} has locked it"))
}

/// The process that has locked a complete file, from the system's list of locks; `file` identifies
/// the file as the list does. Processes of other containers have no number there, or 0.
fn holder(locks: &str, file: &str) -> Option<u32> {
    let fields = locks.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let mut ours = fields.filter_map(|fields| match fields[..] {
        [_, "FLOCK", _, _, process, found, ..] if found == file => process.parse().ok(),
        _ => None,
    });
    ours.find(|process| *process > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_the_process_with_a_lock_of_the_whole_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 17 fe:00:99 0 EOF\n\
                     2: FLOCK  ADVISORY  READ -1 fe:00:99 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 21 fe:00:100 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 22 fe:00:99 0 EOF\n\
                     4: FLOCK  ADVISORY  READ 23 fe:00:99 0 EOF\nnonsense\n";
        assert_eq!(holder(locks, "fe:00:99"), Some(23));
        assert_eq!(holder(locks, "fe:00:100"), Some(21));
        assert_eq!(holder(locks, "fe:00:9"), None);
    }
}
