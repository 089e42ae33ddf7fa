//! A ring of the kernel, and the memory that it reads from and writes into.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, opcode, squeue, types};

use crate::protocol::{REQUEST_BYTES, bad};

/// Blocks in flight: more than any client here asks for at a time.
pub(crate) const SLOTS: usize = 256;
pub(crate) const SLOT_BYTES: usize = 4096;
/// What is received with one call.
const RECEIVE_BYTES: usize = SLOTS * (SLOT_BYTES + REQUEST_BYTES);
/// The number of a result that tells how much was received; smaller ones are those of slots.
pub(crate) const RECEIVED: usize = SLOTS;

/// A ring, a block of memory for each slot, and memory for what is received.
///
/// The memory is never given back, because the kernel may still use it.
pub(crate) struct Ring {
    ring: IoUring,
    memory: &'static mut [u8],
    /// Where the first slot begins; what is received is behind the last one.
    start: usize,
}

impl Ring {
    /// # Errors
    ///
    /// Those of the system.
    pub(crate) fn new() -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_coop_taskrun().setup_defer_taskrun();
        let ring = builder.build(2 * SLOTS as u32)?;
        let memory = vec![0; (SLOTS + 1) * SLOT_BYTES + RECEIVE_BYTES].leak();
        let start = memory.as_ptr().addr().wrapping_neg() % SLOT_BYTES;
        Ok(Self { ring, memory, start })
    }

    fn slot(&mut self, slot: usize) -> &mut [u8] {
        &mut self.memory[self.start..][..SLOTS * SLOT_BYTES][slot * SLOT_BYTES..][..SLOT_BYTES]
    }

    /// Copies the block that was received at byte `at` into the slot.
    pub(crate) fn fill(&mut self, slot: usize, at: usize) {
        let (slots, received) = self.memory[self.start..].split_at_mut(SLOTS * SLOT_BYTES);
        slots[slot * SLOT_BYTES..][..SLOT_BYTES].copy_from_slice(&received[at..][..SLOT_BYTES]);
    }

    /// All slots, one behind the other.
    pub(crate) fn slots(&self) -> &[u8] {
        &self.memory[self.start..][..SLOTS * SLOT_BYTES]
    }

    /// The memory for what is received.
    pub(crate) fn received(&mut self) -> &mut [u8] {
        &mut self.memory[self.start + SLOTS * SLOT_BYTES..][..RECEIVE_BYTES]
    }

    /// Reads a block of the file into the slot.
    pub(crate) fn read(&mut self, slot: usize, file: &File, offset: u64) -> io::Result<()> {
        let place = self.slot(slot).as_mut_ptr();
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), place, SLOT_BYTES as u32);
        self.push(slot, entry.offset(offset).build())
    }

    /// Writes the slot to a block of the file: to stable storage, if it is `durable`.
    pub(crate) fn write(
        &mut self,
        slot: usize,
        file: &File,
        offset: u64,
        durable: bool,
    ) -> io::Result<()> {
        let place = self.slot(slot).as_ptr();
        let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), place, SLOT_BYTES as u32);
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        self.push(slot, entry.offset(offset).rw_flags(flags).build())
    }

    /// Brings what was written to stable storage.
    pub(crate) fn sync(&mut self, slot: usize, file: &File) -> io::Result<()> {
        let entry = opcode::Fsync::new(types::Fd(file.as_raw_fd()));
        self.push(slot, entry.flags(types::FsyncFlags::DATASYNC).build())
    }

    /// Receives into the memory for it, from its byte `at` on.
    pub(crate) fn receive(&mut self, socket: impl AsFd, at: usize) -> io::Result<()> {
        let room = &mut self.received()[at..];
        let (place, length) = (room.as_mut_ptr(), room.len() as u32);
        let socket = types::Fd(socket.as_fd().as_raw_fd());
        self.push(RECEIVED, opcode::Recv::new(socket, place, length).build())
    }

    fn push(&mut self, number: usize, entry: squeue::Entry) -> io::Result<()> {
        let entry = entry.user_data(number as u64);
        // SAFETY: every entry is about a part of the memory that is never freed. The numbers of
        // slots in use, and of the receiver, are given to one entry at a time.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| bad("the ring is full"))
    }

    /// Submits what was pushed, and waits for `least` results.
    pub(crate) fn enter(&mut self, least: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(least) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            entered => entered.map(drop),
        }
    }

    /// The numbers of what has ended, and the results.
    pub(crate) fn ended(&mut self) -> Vec<(usize, i32)> {
        self.ring.completion().map(|entry| (entry.user_data() as usize, entry.result())).collect()
    }
}
