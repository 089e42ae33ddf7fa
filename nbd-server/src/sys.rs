//! System calls without a safe wrapper.
#![allow(unsafe_code)]

pub(crate) mod uring;

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::io::{Errno, ReadWriteFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The system call `cachestat` (Linux 6.5), the same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether a range of a file is in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residency {
    /// All of it, as far as is visible: reading it will hardly wait.
    Whole,
    /// Not all of it, or a part is still being read from the disk.
    Partial,
    /// The system cannot tell.
    Unknown,
}

/// Distance of the bytes that are examined to see whether the disk has delivered a range. The
/// kernel reads ahead in larger units.
const PROBE_STEP: u64 = 256 * 1024;

/// Whether a range of `file` (in bytes) is in the page cache.
pub(crate) fn residency(file: BorrowedFd<'_>, offset: u64, length: u64) -> Residency {
    let Some(last) = length.checked_sub(1).and_then(|length| offset.checked_add(length)) else {
        return Residency::Partial;
    };
    match is_cached(file, offset, last) {
        None => Residency::Unknown,
        Some(false) => Residency::Partial,
        // Pages that the kernel reads ahead count as cached from the moment at which they are asked
        // for.
        Some(true) => {
            let mut probes = (offset..last).step_by(PROBE_STEP as usize).chain([last]);
            let is_here = probes.all(|at| has_arrived(file, at));
            if is_here { Residency::Whole } else { Residency::Partial }
        }
    }
}

/// Whether a byte can be read without waiting for a disk. Also true if the system cannot tell.
fn has_arrived(file: BorrowedFd<'_>, offset: u64) -> bool {
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let read = rustix::io::preadv2(file, &mut buffers, offset, ReadWriteFlags::NOWAIT);
    !matches!(read, Ok(0) | Err(Errno::AGAIN))
}

/// Whether there are pages for all bytes from `offset` to `last`. `None` if the system cannot tell.
fn is_cached(file: BorrowedFd<'_>, offset: u64, last: u64) -> Option<bool> {
    let length = last - offset + 1;
    let page = rustix::param::page_size() as u64;
    let range = CachestatRange { offset, length };
    let mut stat = Cachestat::default();
    // SAFETY: both structures have the layout of the kernel's and live across the call; the kernel
    // reads the first and writes the second, and keeps neither.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            std::ptr::from_ref(&range),
            std::ptr::from_mut(&mut stat),
            0 as libc::c_uint,
        )
    };
    (result == 0).then(|| stat.cached == last / page - offset / page + 1)
}

/// Bytes written to a socket that its peer has not acknowledged (TCP) or not read (unix: counted in
/// the system's buffers of about 32 KiB, including their overhead). `None` if the system cannot
/// tell.
pub(crate) fn untaken_len(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut length: libc::c_int = 0;
    // SAFETY: for sockets TIOCOUTQ is SIOCOUTQ; the kernel writes one int, which lives across the
    // call, and keeps nothing. On other files it fails or writes an int as well.
    let result =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, std::ptr::from_mut(&mut length)) };
    u64::try_from(length).ok().filter(|_| result == 0)
}

/// Attaches a descriptor to the runtime on which this is called.
///
/// # Errors
///
/// Those of the system.
pub(crate) fn watch(descriptor: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays the same, and it is closed when the `AsyncFd` has let go of
    // it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// The process at the other end of a unix socket, at the moment when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PeerCredentials {
    /// Its id; `None` if it is in another PID namespace.
    pub(crate) process: Option<i32>,
    pub(crate) user: u32,
    pub(crate) group: u32,
}

/// The process at the other end of a unix socket, if the system reports it.
pub(crate) fn peer_credentials(socket: BorrowedFd<'_>) -> Option<PeerCredentials> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = libc::socklen_t::try_from(size_of_val(&credentials)).ok()?;
    // SAFETY: the kernel writes at most `length` bytes into the structure, which has that many, and
    // their number into `length`. Both live across the call, and it keeps neither.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            std::ptr::from_mut(&mut credentials).cast(),
            std::ptr::from_mut(&mut length),
        )
    };
    let process = (credentials.pid > 0).then_some(credentials.pid);
    let (user, group) = (credentials.uid, credentials.gid);
    (result == 0).then_some(PeerCredentials { process, user, group })
}

/// Supplementary groups of the process at the other end of a unix socket, at the moment when it
/// connected. Empty if the system cannot tell.
pub(crate) fn peer_groups(socket: BorrowedFd<'_>) -> Vec<u32> {
    // NGROUPS_MAX of Linux.
    const MOST: usize = 65_536;
    let mut groups: Vec<libc::gid_t> = vec![0; 32];
    loop {
        let capacity = size_of_val(groups.as_slice());
        let Ok(mut length) = libc::socklen_t::try_from(capacity) else { return Vec::new() };
        // SAFETY: the kernel writes at most `length` bytes into the vector, which has that many,
        // and their number into `length`. Both live across the call, and it keeps neither.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                std::ptr::from_mut(&mut length),
            )
        };
        let count = usize::try_from(length).unwrap_or(0) / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return groups;
        }
        let is_short = std::io::Error::last_os_error().raw_os_error() == Some(libc::ERANGE);
        if !is_short || count <= groups.len() || count > MOST {
            return Vec::new();
        }
        groups.resize(count, 0);
    }
}

/// The shortest time slice that the kernel allows. A thread with it that wakes up for a request
/// gets a core at once from programs that compute (Linux 6.12), and its share of the core is
/// unchanged.
pub(crate) const SHORTEST_SLICE: Duration = Duration::from_micros(100);

/// Sets the time for which the current thread computes before others with the same deadline get its
/// core; zero is the system's default. A thread with a longer slice gives way at once to one with a
/// shorter slice that wakes up (Linux 6.12). If it cannot be set, nothing changes; threads with
/// another policy than the usual ones keep theirs.
pub(crate) fn set_time_slice(slice: Duration) {
    const SIZE: u32 = size_of::<libc::sched_attr>() as u32;
    const THIS_THREAD: libc::pid_t = 0;
    const NO_FLAGS: libc::c_uint = 0;
    // SAFETY: the structure is plain integers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the given size, that of the structure, which lives across
    // the call.
    let result = unsafe {
        let attributes = std::ptr::from_mut(&mut attributes);
        libc::syscall(libc::SYS_sched_getattr, THIS_THREAD, attributes, SIZE, NO_FLAGS)
    };
    let policy = libc::c_int::try_from(attributes.sched_policy);
    if result != 0 || !matches!(policy, Ok(libc::SCHED_OTHER | libc::SCHED_BATCH)) {
        return;
    }
    attributes.size = SIZE;
    attributes.sched_runtime = u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: the kernel reads the structure, which lives across the call, and keeps nothing.
    unsafe {
        let attributes = std::ptr::from_ref(&attributes);
        libc::syscall(libc::SYS_sched_setattr, THIS_THREAD, attributes, NO_FLAGS);
    }
}

/// Takes over descriptors that the service manager opened for this process: `count` of them from
/// 3 on.
///
/// The caller makes sure that this happens once, before anything else uses those numbers.
pub(crate) fn take_inherited(count: u16) -> Vec<OwnedFd> {
    const FIRST: RawFd = 3;
    (FIRST..FIRST + RawFd::from(count))
        .filter(|fd| {
            // SAFETY: F_GETFD reads a flag and fails with EBADF on a number that is not open.
            let flags = unsafe { libc::fcntl(*fd, libc::F_GETFD) };
            // An inherited descriptor does not close on exec; one that does was opened by this
            // process.
            flags >= 0 && flags & libc::FD_CLOEXEC == 0
        })
        .map(|fd| {
            // SAFETY: the descriptor is open (checked above), and by the protocol of socket
            // activation it belongs to the process that LISTEN_PID names: this one.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
            fd
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn what_was_just_written_is_resident_and_what_lies_behind_the_end_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        let residency = |offset, length| residency(file.as_fd(), offset, length);
        if residency(0, 8192) == Residency::Unknown {
            // A kernel before 6.5, or one that hides the page cache.
            eprintln!("skipped: this system has no cachestat");
            return;
        }
        assert_eq!(residency(0, 8192), Residency::Whole);
        assert_eq!(residency(4095, 2), Residency::Whole);
        for (offset, length) in [(8192, 1), (0, 0), (u64::MAX, 2)] {
            assert_eq!(residency(offset, length), Residency::Partial);
        }
    }

    #[test]
    fn what_is_on_its_way_from_the_disk_is_not_resident() {
        const LENGTH: u64 = 32 << 20;
        const PART: usize = 256 << 10;
        // Not in a directory that may be in memory.
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![1; LENGTH as usize]).unwrap();
        file.sync_all().unwrap();
        let advise = |advice| rustix::fs::fadvise(&file, 0, None, advice).unwrap();
        let mut buffer = vec![0; PART];
        for _ in 0..4 {
            advise(rustix::fs::Advice::DontNeed);
            advise(rustix::fs::Advice::WillNeed);
            for part in (0..LENGTH / PART as u64).rev() {
                let offset = part * PART as u64;
                if residency(file.as_fd(), offset, PART as u64) != Residency::Whole {
                    continue;
                }
                let mut buffers = [IoSliceMut::new(&mut buffer)];
                let flags = ReadWriteFlags::NOWAIT;
                match rustix::io::preadv2(&file, &mut buffers, offset, flags) {
                    // Memory may be so scarce that pages go again.
                    Ok(PART) | Err(Errno::OPNOTSUPP) => {}
                    other => assert!(
                        is_cached(file.as_fd(), offset, offset + PART as u64 - 1) != Some(true),
                        "{other:?} at {offset}"
                    ),
                }
            }
        }
    }

    #[test]
    fn what_the_peer_has_not_read_is_untaken() {
        let (mut ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let empty = untaken_len(ours.as_fd()).unwrap();
        ours.write_all(&[1; 10_000]).unwrap();
        let full = untaken_len(ours.as_fd()).unwrap();
        assert!(full >= empty + 10_000, "{empty} {full}");
        theirs.read_exact(&mut [0; 10_000]).unwrap();
        assert_eq!(untaken_len(ours.as_fd()), Some(empty));
        assert_eq!(untaken_len(tempfile::tempfile().unwrap().as_fd()), None);
    }

    #[test]
    fn the_credentials_of_a_peer_are_those_of_its_process() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let expected = PeerCredentials {
            process: i32::try_from(std::process::id()).ok(),
            user: rustix::process::geteuid().as_raw(),
            group: rustix::process::getegid().as_raw(),
        };
        assert_eq!(peer_credentials(ours.as_fd()), Some(expected));
        assert_eq!(peer_credentials(tempfile::tempfile().unwrap().as_fd()), None);
    }

    #[test]
    fn the_groups_of_a_peer_are_those_of_its_process() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut found = peer_groups(ours.as_fd());
        let mut own: Vec<u32> =
            rustix::process::getgroups().unwrap().iter().map(|group| group.as_raw()).collect();
        found.sort_unstable();
        own.sort_unstable();
        assert_eq!(found, own);
        assert!(peer_groups(tempfile::tempfile().unwrap().as_fd()).is_empty());
    }

    #[test]
    fn a_time_slice_changes_neither_the_policy_nor_the_nice_value_and_can_be_taken_back() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        for slice in [Duration::from_millis(20), Duration::ZERO] {
            set_time_slice(slice);
            // SAFETY: asks for the policy of this thread.
            assert_eq!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_OTHER);
            assert_eq!(nice(), before);
        }
    }

    #[test]
    fn descriptors_that_this_process_opened_itself_are_not_taken() {
        // The standard library opens everything with FD_CLOEXEC; some of these are in the range.
        let files: Vec<_> = (0..8).map(|_| tempfile::tempfile().unwrap()).collect();
        let own: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let taken = take_inherited(64);
        assert!(taken.iter().all(|fd| !own.contains(&fd.as_raw_fd())));
        // The parent of this test may have left some open: they are not ours to close.
        taken.into_iter().for_each(std::mem::forget);
    }
}
