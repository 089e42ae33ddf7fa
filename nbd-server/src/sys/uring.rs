//! Reads and writes through io_uring. The buffer of one belongs to the [`Ring`] until the kernel is
//! done with it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use io_uring::{EnterFlags, IoUring, opcode, squeue, types};
use nbd_proto::transmission::Durability;
use rustix::event::{EventfdFlags, eventfd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A transfer that has ended: a read or a write.
pub(crate) struct Ended {
    pub(crate) number: usize,
    pub(crate) buffer: Vec<u8>,
    /// How many bytes were moved.
    pub(crate) result: io::Result<usize>,
}

/// A buffer, the first byte of the part that a transfer is about, and the length of that part.
pub(crate) type Part = (Vec<u8>, usize, usize);

/// Transfers at a time. The kernel keeps room for the results of twice as many.
pub(crate) const TRANSFERS_MAX: usize = 256;

/// A ring, and the buffers that the kernel reads from and writes into.
///
/// It is used by the thread that made it alone: others get errors.
pub(crate) struct Ring {
    ring: IoUring,
    /// An eventfd that is written to when results have come. (The ring's own descriptor becomes
    /// readable only when they were fetched.)
    event: OwnedFd,
    /// The buffers of all transfers that have not ended, each in the place that its transfer is
    /// numbered by.
    in_flight: Vec<Option<Vec<u8>>>,
    free: Vec<usize>,
    /// The transfers that are not submitted, in their order.
    unsubmitted: VecDeque<usize>,
}

impl Ring {
    /// # Errors
    ///
    /// Those of the system, which may lack io_uring or forbid it.
    pub(crate) fn new() -> io::Result<Self> {
        let entries = TRANSFERS_MAX as u32;
        let mut modern = IoUring::builder();
        // Nothing interrupts the thread: it fetches results when it looks for them. Linux 6.1.
        modern.setup_single_issuer().setup_coop_taskrun().setup_defer_taskrun();
        let ring = match modern.build(entries) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries),
            ring => ring,
        }?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let mut in_flight = Vec::new();
        in_flight.resize_with(TRANSFERS_MAX, || None);
        Ok(Self {
            ring,
            event,
            in_flight,
            free: (0..TRANSFERS_MAX).rev().collect(),
            unsubmitted: VecDeque::new(),
        })
    }

    /// Becomes readable when results have come. To be called within a runtime.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub(crate) fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        super::watch(self.event.try_clone()?, Interest::READABLE)
    }

    /// How many transfers have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        TRANSFERS_MAX - self.free.len()
    }

    /// Begins to read `length` bytes from `offset` of a file on into `buffer`, from its byte `at`
    /// on. The number of the read comes back, or the buffer if there is no room.
    pub(crate) fn read(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        buffer: Part,
    ) -> Result<usize, Vec<u8>> {
        let file = types::Fd(file.as_raw_fd());
        self.begin(buffer, |start, length| {
            opcode::Read::new(file, start, length).offset(offset).build()
        })
    }

    /// Begins to write `length` bytes of `buffer`, from its byte `at` on, to `offset` of a file: to
    /// stable storage, if `durability` says so. The number of the write comes back, or the buffer
    /// if there is no room.
    pub(crate) fn write(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        buffer: Part,
        durability: Durability,
    ) -> Result<usize, Vec<u8>> {
        let file = types::Fd(file.as_raw_fd());
        let flags = if durability == Durability::Fua { libc::RWF_DSYNC } else { 0 };
        self.begin(buffer, |start, length| {
            let write = opcode::Write::new(file, start.cast_const(), length).offset(offset);
            write.rw_flags(flags).build()
        })
    }

    /// Begins the transfer that `entry` describes, between a file and these bytes of the buffer.
    fn begin(
        &mut self,
        (mut buffer, at, length): Part,
        entry: impl FnOnce(*mut u8, u32) -> squeue::Entry,
    ) -> Result<usize, Vec<u8>> {
        let fits = at.checked_add(length).is_some_and(|end| end <= buffer.len());
        let (true, Ok(short)) = (fits, u32::try_from(length)) else { return Err(buffer) };
        let Some(number) = self.free.pop() else { return Err(buffer) };
        let entry = entry(buffer[at..].as_mut_ptr(), short).user_data(number as u64);
        // SAFETY: the entry is about `length` bytes that lie within the buffer (checked above). It
        // goes to `in_flight`, is not touched there, and is taken out only when the kernel has
        // reported the end of this transfer; a ring that is dropped before that leaks it. The
        // kernel takes its own reference to the file when the entry is submitted.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.free.push(number);
            return Err(buffer);
        }
        self.in_flight[number] = Some(buffer);
        self.unsubmitted.push_back(number);
        Ok(number)
    }

    /// How many transfers have begun and are not submitted.
    pub(crate) fn unsubmitted(&self) -> usize {
        self.unsubmitted.len()
    }

    /// Whether a transfer that has not ended is not submitted either.
    pub(crate) fn is_unsubmitted(&self, number: usize) -> bool {
        self.unsubmitted.contains(&number)
    }

    /// The buffer of a transfer that has not ended; empty for any other number.
    pub(crate) fn buffer(&self, number: usize) -> &[u8] {
        self.in_flight.get(number).and_then(Option::as_deref).unwrap_or_default()
    }

    /// Submits the transfers that have begun.
    ///
    /// # Errors
    ///
    /// Those of the system; then the kernel does not know of all of them.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        while !self.unsubmitted.is_empty() {
            let told = self.enter(self.unsubmitted.len(), EnterFlags::empty())?;
            if told == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.unsubmitted.drain(..told.min(self.unsubmitted.len()));
        }
        Ok(())
    }

    /// The transfers that have ended.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub(crate) fn ended(&mut self) -> io::Result<Vec<Ended>> {
        if self.in_flight() == 0 {
            return Ok(Vec::new());
        }
        let entered = self.enter(0, EnterFlags::GETEVENTS);
        let Self { ring, in_flight, free, .. } = self;
        let ended = ring.completion().filter_map(|entry| {
            let number = entry.user_data() as usize;
            let buffer = in_flight.get_mut(number)?.take()?;
            free.push(number);
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
            Some(Ended { number, buffer, result })
        });
        let ended: Vec<_> = ended.collect();
        if ended.is_empty() {
            // What has ended is taken from a ring that fails, too.
            entered?;
        }
        Ok(ended)
    }

    fn enter(&self, count: usize, flags: EnterFlags) -> io::Result<usize> {
        loop {
            // SAFETY: no argument is passed along. The entries of the queue are those that `begin`
            // made, whose buffers live until the kernel is done with them.
            let entered = unsafe {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.ring.submitter().enter::<libc::sigset_t>(count, 0, flags.bits(), None)
            };
            match entered {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                entered => return entered,
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still use them.
        std::mem::forget(std::mem::take(&mut self.in_flight));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn ring() -> Option<Ring> {
        match Ring::new() {
            Ok(ring) => Some(ring),
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "io_uring: {error}");
                eprintln!("skipped: this system has no io_uring: {error}");
                None
            }
        }
    }

    /// Waits for all reads.
    fn all(ring: &mut Ring) -> Vec<Ended> {
        ring.submit().unwrap();
        let event = ring.event.try_clone().unwrap();
        let mut ended = Vec::new();
        while ring.in_flight() > 0 {
            poll(&mut [PollFd::new(&event, PollFlags::IN)], None).unwrap();
            ended.extend(ring.ended().unwrap());
        }
        ended
    }

    #[test]
    fn reads_fill_their_buffers_and_tell_what_was_wrong() {
        let Some(mut ring) = ring() else { return };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let whole = ring.read(file.as_fd(), 1000, (vec![0; 4010], 10, 4000)).unwrap();
        let short = ring.read(file.as_fd(), 4000, (vec![0; 4000], 0, 4000)).unwrap();
        let write_only = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        let bad = ring.read(write_only.as_fd(), 0, (vec![0; 10], 0, 10)).unwrap();
        let ended = all(&mut ring);
        assert_eq!(ended.len(), 3);
        for Ended { number, buffer, result } in ended {
            if number == whole {
                assert_eq!(result.unwrap(), 4000);
                assert_eq!((&buffer[..10], &buffer[10..]), (&[0; 10][..], &[7; 4000][..]));
            } else if number == short {
                assert_eq!(result.unwrap(), 1000);
                assert_eq!((&buffer[..1000], &buffer[1000..]), (&[7; 1000][..], &[0; 3000][..]));
            } else {
                assert_eq!(number, bad);
                assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EBADF));
            }
        }
    }

    #[test]
    fn there_are_never_more_reads_than_may_be_and_none_outside_its_buffer() {
        let Some(mut ring) = ring() else { return };
        let file = tempfile::tempfile().unwrap();
        for (at, length) in [(0, 11), (11, 1), (usize::MAX, 2)] {
            ring.read(file.as_fd(), 0, (vec![0; 10], at, length)).unwrap_err();
        }
        for _ in 0..TRANSFERS_MAX {
            ring.read(file.as_fd(), 0, (vec![0; 10], 0, 10)).unwrap();
        }
        let refused = ring.read(file.as_fd(), 0, (vec![3; 10], 0, 10)).unwrap_err();
        assert_eq!(refused, [3; 10]);
        assert_eq!(all(&mut ring).len(), TRANSFERS_MAX);
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn a_ring_that_is_dropped_leaves_the_buffers_to_the_kernel() {
        let Some(mut ring) = ring() else { return };
        let (reader, _writer) = io::pipe().unwrap();
        // So large that the allocator maps it by itself, and unmaps it when it is freed.
        let buffer = vec![0; 64 << 20];
        let (place, length) = (buffer.as_ptr().addr(), buffer.len());
        // Nothing is there to be read: this read has not ended when the ring goes.
        ring.read(reader.as_fd(), u64::MAX, (buffer, 0, length)).unwrap();
        ring.submit().unwrap();
        assert_eq!(ring.in_flight(), 1);
        drop(ring);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let address = |text| usize::from_str_radix(text, 16).unwrap();
        let is_mapped = maps.lines().any(|line| {
            let (start, end) = line.split(' ').next().and_then(|map| map.split_once('-')).unwrap();
            (address(start)..address(end)).contains(&place)
        });
        assert!(is_mapped, "the buffer was freed");
    }
}
