//! Requests to the kernel's driver, and its announcements.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;

use nbd_client::TransmissionFlags;
use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::{GenlCtrlAttrs, McastGrpAttrs};
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;

use super::message::{CONNECT, DISCONNECT, DeviceMessage, LINK_DEAD, MULTICAST_GROUP, RECONFIGURE};
use crate::tasks;

/// The properties of a device for the kernel.
#[derive(Clone, Debug)]
pub(super) struct Configuration {
    /// `None`: the kernel chooses a free one.
    pub(super) index: Option<u32>,
    pub(super) size: u64,
    pub(super) block_size: u64,
    /// The transmission flags of the server.
    pub(super) flags: u16,
    /// Seconds after which a request is sent over another connection; 0 for no limit.
    pub(super) timeout: u64,
    /// Seconds for which requests wait for a new connection.
    pub(super) dead_connection_timeout: u64,
    /// Identifies the server of the device later.
    pub(super) backend: String,
}

impl Configuration {
    pub(super) fn is_read_only(&self) -> bool {
        TransmissionFlags::from_bits_retain(self.flags).contains(TransmissionFlags::READ_ONLY)
    }
}

/// The kernel's driver of NBD devices. Requests block, but not for long.
#[derive(Debug)]
pub(super) struct Driver {
    socket: Socket,
    family: u16,
    group: Option<u32>,
    sequence: u32,
}

impl Driver {
    /// Finds the driver.
    ///
    /// # Errors
    ///
    /// `NotFound` if the kernel has no such driver.
    pub(super) fn open() -> io::Result<Self> {
        let socket = kernel_socket()?;
        let mut driver = Self { socket, family: 0, group: None, sequence: 0 };
        let wanted = GenlCtrlAttrs::FamilyName(DeviceMessage::family_name().to_owned());
        let question = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![wanted] };
        let answers = driver.request(GenlMessage::from_payload(question))?;
        let mut family = None;
        for attribute in answers.into_iter().flat_map(|answer| answer.payload.nlas) {
            match attribute {
                GenlCtrlAttrs::FamilyId(id) => family = Some(id),
                GenlCtrlAttrs::McastGroups(groups) => driver.group = group_of(&groups),
                _ => {}
            }
        }
        driver.family = family.ok_or(io::ErrorKind::NotFound)?;
        Ok(driver)
    }

    /// Connects a device and returns its index.
    pub(super) fn connect(
        &mut self,
        configuration: &Configuration,
        sockets: &[OwnedFd],
    ) -> io::Result<u32> {
        let mut message = DeviceMessage::new(CONNECT);
        if let Some(index) = configuration.index {
            message = message.index(index);
        }
        message = message
            .size(configuration.size)
            .block_size(configuration.block_size)
            .timeout(configuration.timeout)
            .server_flags(configuration.flags)
            .dead_connection_timeout(configuration.dead_connection_timeout)
            .backend(&configuration.backend)
            .sockets(sockets);
        let answers = self.request_of_device(message)?;
        let index = answers.iter().find_map(DeviceMessage::device).or(configuration.index);
        index.ok_or_else(|| io::Error::other("the kernel does not name the device it chose"))
    }

    /// Replaces dead sockets of a device; surplus ones are ignored.
    pub(super) fn reconfigure(
        &mut self,
        index: u32,
        configuration: &Configuration,
        sockets: &[OwnedFd],
    ) -> io::Result<()> {
        let message = DeviceMessage::new(RECONFIGURE)
            .index(index)
            .timeout(configuration.timeout)
            .dead_connection_timeout(configuration.dead_connection_timeout)
            .backend(&configuration.backend)
            .sockets(sockets);
        self.request_of_device(message).map(drop)
    }

    /// Disconnects a device, whether it is in use or not.
    pub(super) fn disconnect(&mut self, index: u32) -> io::Result<()> {
        self.request_of_device(DeviceMessage::new(DISCONNECT).index(index)).map(drop)
    }

    /// Starts to receive announcements.
    pub(super) fn announcements(&self) -> io::Result<Announcements> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        let group = self.group.ok_or(io::ErrorKind::Unsupported)?;
        socket.add_membership(group)?;
        socket.set_non_blocking(true)?;
        let (sender, receiver) = mpsc::channel(QUEUED);
        let family = self.family;
        tasks::start_thread("nbd-announcements", move || listen(&socket, family, &sender))?;
        Ok(Announcements { receiver })
    }

    fn request_of_device(&mut self, message: DeviceMessage) -> io::Result<Vec<DeviceMessage>> {
        let mut message = GenlMessage::from_payload(message);
        message.set_resolved_family_id(self.family);
        let answers = self.request(message)?;
        Ok(answers.into_iter().map(|answer| answer.payload).collect())
    }

    /// Sends a message, and returns what the kernel answers before it acknowledges it.
    fn request<F>(&mut self, message: GenlMessage<F>) -> io::Result<Vec<GenlMessage<F>>>
    where
        F: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + Debug,
    {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let Some(answer) = received::<F>(&self.socket)? else { continue };
            if answer.header.sequence_number != self.sequence {
                continue;
            }
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => answers.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                _ => {}
            }
        }
    }
}

fn kernel_socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn group_of(groups: &[Vec<McastGrpAttrs>]) -> Option<u32> {
    let name = McastGrpAttrs::Name(MULTICAST_GROUP.to_owned());
    let group = groups.iter().find(|group| group.contains(&name))?;
    group.iter().find_map(|attribute| match attribute {
        McastGrpAttrs::Id(id) => Some(*id),
        McastGrpAttrs::Name(_) => None,
    })
}

/// Receives a message; `None` for one that is not the kernel's.
fn received<F>(socket: &Socket) -> io::Result<Option<NetlinkMessage<GenlMessage<F>>>>
where
    F: ParseableParametrized<[u8], GenlHeader> + Debug,
{
    let (bytes, sender) = socket.recv_from_full()?;
    if sender.port_number() != 0 {
        return Ok(None);
    }
    let message = NetlinkMessage::deserialize(&bytes);
    message.map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

/// An announcement of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Announcement {
    /// A connection of the device of this index is dead.
    Dead(u32),
    /// Announcements were lost: every connection may be dead.
    Lost,
}

/// The announcements of the kernel.
#[derive(Debug)]
pub(super) struct Announcements {
    receiver: mpsc::Receiver<io::Result<Announcement>>,
}

impl Announcements {
    /// Waits for the next one.
    ///
    /// # Errors
    ///
    /// If no more can be received.
    ///
    /// # Cancel safety
    ///
    /// Safe: nothing is lost.
    pub(super) async fn next(&mut self) -> io::Result<Announcement> {
        let next = self.receiver.recv().await;
        next.unwrap_or_else(|| Err(io::Error::other("their thread has ended")))
    }
}

/// Passes announcements on, until the receiver is gone.
fn listen(socket: &Socket, family: u16, sender: &mpsc::Sender<io::Result<Announcement>>) {
    let next = || loop {
        match received::<DeviceMessage>(socket) {
            Ok(message) => {
                if let Some(device) = message.and_then(|message| dead_device(message, family)) {
                    return Ok(Some(Announcement::Dead(device)));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.raw_os_error() == Some(OVERFLOW) => {
                return Ok(Some(Announcement::Lost));
            }
            // Of a newer kernel.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => return Err(error),
        }
    };
    while !sender.is_closed() {
        let failed = match next() {
            Ok(Some(announcement)) => sender.blocking_send(Ok(announcement)).is_err(),
            Ok(None) => match wait(socket) {
                Ok(()) => false,
                Err(error) => sender.blocking_send(Err(error)).is_ok(),
            },
            Err(error) => sender.blocking_send(Err(error)).is_ok(),
        };
        if failed {
            return;
        }
    }
}

/// Waits for bytes, for a limited time.
fn wait(socket: &Socket) -> io::Result<()> {
    match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&PATIENCE)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn dead_device(message: NetlinkMessage<GenlMessage<DeviceMessage>>, family: u16) -> Option<u32> {
    let NetlinkPayload::InnerMessage(message) = message.payload else { return None };
    let is_dead = message.resolved_family_id() == family && message.payload.command == LINK_DEAD;
    message.payload.device().filter(|_| is_dead)
}

/// The longest wait of the thread that receives, which then looks whether it is still needed.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Announcements that may wait.
const QUEUED: usize = 64;

/// The error of a socket whose queue was full.
const OVERFLOW: i32 = rustix::io::Errno::NOBUFS.raw_os_error();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_announcements_is_found_by_name() {
        let group =
            |name: &str, id| vec![McastGrpAttrs::Name(name.to_owned()), McastGrpAttrs::Id(id)];
        assert_eq!(group_of(&[group("other", 3), group("nbd_mc_group", 5)]), Some(5));
        assert_eq!(group_of(&[group("other", 3)]), None);
    }

    #[test]
    fn a_kernel_without_the_driver_says_so() {
        match Driver::open() {
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}"),
            Ok(driver) => assert_ne!(driver.family, 0),
        }
    }
}
