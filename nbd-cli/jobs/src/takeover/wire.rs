//! Messages between the two servers of a takeover, with descriptors.
//!
//! ```text
//! | "NBTO" u32 | kind u32 | length of the payload u64 | payload |
//! ```
//!
//! A descriptor comes with the first byte of its message.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use imgfmt::storage::FileIdentity;
use nbd_proto::codec::Reader;
use nbd_server::ListenerOrigin;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::{ServiceManager, TakeoverError};
use crate::control::server::{DiskFile, DiskFiles};

const MAGIC: u32 = 0x4e42_544f;
const HEADER_LEN: usize = 16;
/// Longest payload, in bytes: a saved connection.
const MAX_PAYLOAD_LEN: u64 = 128 << 20;
/// Longest path of a socket's file, in bytes.
const MAX_PATH_LEN: usize = 4096;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A listening socket, with its origin.
    Listener = 1,
    /// A connection, with its state.
    Connection = 2,
    /// There are no further ones.
    Complete = 3,
    /// The successor has opened everything.
    Ready = 4,
    /// The predecessor will not go on.
    Go = 5,
    /// The successor serves.
    Serving = 6,
    /// The predecessor goes on, for a reason in words.
    Abandoned = 7,
    /// The service manager of the predecessor.
    Manager = 9,
    /// The control socket, with its origin.
    Control = 11,
    /// What a disk consists of, which the successor has to find. Earlier ones, 8 and 10, told less.
    Disk = 12,
}

const KINDS: [Kind; 10] = [
    Kind::Control,
    Kind::Listener,
    Kind::Connection,
    Kind::Complete,
    Kind::Ready,
    Kind::Go,
    Kind::Serving,
    Kind::Abandoned,
    Kind::Disk,
    Kind::Manager,
];

/// A received message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) payload: Vec<u8>,
    pub(super) descriptor: Option<OwnedFd>,
}

/// Sends a message. Blocks.
pub(super) fn send(
    mut stream: &UnixStream,
    kind: Kind,
    payload: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut header = Vec::with_capacity(HEADER_LEN);
    header.extend_from_slice(&MAGIC.to_be_bytes());
    header.extend_from_slice(&(kind as u32).to_be_bytes());
    header.extend_from_slice(&(payload.len() as u64).to_be_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let sent = loop {
        match sendmsg(stream, &[IoSlice::new(&header)], &mut ancillary, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => break sent?,
        }
    };
    stream.write_all(header.get(sent..).unwrap_or_default())?;
    stream.write_all(payload)
}

/// Receives a message; `None` at the end of the stream. Blocks.
pub(super) fn receive(mut stream: &UnixStream) -> Result<Option<Message>, TakeoverError> {
    let unexpected = |what| Err(TakeoverError::Unexpected { what });
    let mut header = [0; HEADER_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut header)];
        match recvmsg(stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received.map_err(io::Error::from)?.bytes,
        }
    };
    if received == 0 {
        return Ok(None);
    }
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    stream.read_exact(header.get_mut(received..).unwrap_or_default())?;
    let mut reader = Reader::new(&header);
    if reader.u32() != Some(MAGIC) {
        return unexpected("something that is not part of a takeover");
    }
    let number = reader.u32().unwrap_or_default();
    let Some(kind) = KINDS.into_iter().find(|kind| *kind as u32 == number) else {
        return unexpected("a message of another version");
    };
    let length = reader.u64().unwrap_or_default();
    if length > MAX_PAYLOAD_LEN {
        return unexpected("a message that is too long");
    }
    let mut payload = Vec::new();
    stream.take(length).read_to_end(&mut payload)?;
    if payload.len() as u64 != length {
        return Err(TakeoverError::Gone);
    }
    Ok(Some(Message { kind, payload, descriptor }))
}

/// The origin of a listener as bytes.
pub(super) fn encode_origin(origin: &ListenerOrigin) -> Vec<u8> {
    match origin {
        ListenerOrigin::Tcp => 0_u32.to_be_bytes().to_vec(),
        ListenerOrigin::ServiceManager => 1_u32.to_be_bytes().to_vec(),
        ListenerOrigin::UnixFile { path, identity: (device, inode) } => {
            let mut bytes = 2_u32.to_be_bytes().to_vec();
            bytes.extend_from_slice(&device.to_be_bytes());
            bytes.extend_from_slice(&inode.to_be_bytes());
            bytes.extend_from_slice(path.as_os_str().as_bytes());
            bytes
        }
    }
}

/// The origin of a listener from bytes.
pub(super) fn decode_origin(bytes: &[u8]) -> Option<ListenerOrigin> {
    let mut reader = Reader::new(bytes);
    let origin = match reader.u32()? {
        0 => ListenerOrigin::Tcp,
        1 => ListenerOrigin::ServiceManager,
        2 => {
            let identity = (reader.u64()?, reader.u64()?);
            let path = reader.bytes(reader.rest().len())?.to_vec();
            let path = PathBuf::from(OsString::from_vec(path));
            let is_plain = path.is_absolute() && path.as_os_str().len() <= MAX_PATH_LEN;
            return is_plain.then_some(ListenerOrigin::UnixFile { path, identity });
        }
        _ => return None,
    };
    reader.is_empty().then_some(origin)
}

/// What a disk consists of and the name of its export as bytes.
pub(super) fn encode_disk(name: &str, disk: &DiskFiles) -> Vec<u8> {
    let mut bytes = Vec::new();
    for text in [name, &disk.source, &disk.view] {
        put_text(&mut bytes, text.as_bytes());
    }
    bytes.extend_from_slice(&u64::from(disk.is_all).to_be_bytes());
    for DiskFile { path, identity: FileIdentity { device, inode } } in &disk.files {
        bytes.extend_from_slice(&device.to_be_bytes());
        bytes.extend_from_slice(&inode.to_be_bytes());
        put_text(&mut bytes, path.as_os_str().as_bytes());
    }
    bytes
}

/// What a disk consists of and the name of its export from bytes.
pub(super) fn decode_disk(bytes: &[u8]) -> Option<(String, DiskFiles)> {
    let mut reader = Reader::new(bytes);
    let mut text = || String::from_utf8(take_text(&mut reader)?.to_vec()).ok();
    let [name, source, view] = [text()?, text()?, text()?];
    let is_all = match reader.u64()? {
        0 => false,
        1 => true,
        _ => return None,
    };
    let mut files = Vec::new();
    while !reader.is_empty() {
        let identity = FileIdentity { device: reader.u64()?, inode: reader.u64()? };
        let path = OsString::from_vec(take_text(&mut reader)?.to_vec());
        files.push(DiskFile::new(path.into(), identity));
    }
    Some((name, DiskFiles { files, is_all, source, view }))
}

/// A service manager as bytes.
pub(super) fn encode_manager(manager: &ServiceManager) -> Vec<u8> {
    let watchdog = manager.watchdog.map_or(0, |limit| limit.as_micros());
    let mut bytes = u64::try_from(watchdog).unwrap_or(u64::MAX).to_be_bytes().to_vec();
    bytes.extend_from_slice(manager.notify_socket.as_bytes());
    bytes
}

/// A service manager from bytes.
pub(super) fn decode_manager(bytes: &[u8]) -> Option<ServiceManager> {
    let mut reader = Reader::new(bytes);
    let watchdog = Some(reader.u64()?).filter(|limit| *limit > 0).map(Duration::from_micros);
    let notify_socket = OsString::from_vec(reader.bytes(reader.rest().len())?.to_vec());
    let is_plain = !notify_socket.is_empty() && notify_socket.len() <= MAX_PATH_LEN;
    is_plain.then_some(ServiceManager { notify_socket, watchdog })
}

fn put_text(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.extend_from_slice(&(text.len() as u64).to_be_bytes());
    bytes.extend_from_slice(text);
}

fn take_text<'a>(reader: &mut Reader<'a>) -> Option<&'a [u8]> {
    let length = usize::try_from(reader.u64()?).ok()?;
    reader.bytes(length)
}

#[cfg(test)]
mod tests {
    use std::io::Seek as _;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn messages_arrive_with_their_descriptors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        file.rewind().unwrap();
        send(&ours, Kind::Connection, b"state", Some(file.as_fd())).unwrap();
        send(&ours, Kind::Complete, b"", None).unwrap();
        drop((ours, file));
        let first = receive(&theirs).unwrap().unwrap();
        assert_eq!((first.kind, &first.payload[..]), (Kind::Connection, &b"state"[..]));
        let mut content = String::new();
        std::fs::File::from(first.descriptor.unwrap()).read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
        let second = receive(&theirs).unwrap().unwrap();
        assert_eq!((second.kind, second.descriptor.is_none()), (Kind::Complete, true));
        assert!(receive(&theirs).unwrap().is_none());
    }

    #[test]
    fn messages_of_others_are_refused() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"NBTO\0\0\0\x63\0\0\0\0\0\0\0\0",
            b"NBTO\0\0\0\x01\xff\0\0\0\0\0\0\0",
            b"NBTO\0\0\0\x01\0\0\0\0\0\0\0\x05abc",
            b"NBTO",
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(receive(&theirs).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_service_manager_comes_back_as_it_was() {
        for watchdog in [None, Some(Duration::from_secs(30))] {
            let manager = ServiceManager { notify_socket: "@notify".into(), watchdog };
            assert_eq!(decode_manager(&encode_manager(&manager)), Some(manager));
        }
        assert_eq!(decode_manager(&[0; 8]), None, "without a socket");
        assert_eq!(decode_manager(&[0; 7]), None);
    }

    #[test]
    fn the_files_of_disks_come_back_as_they_were() {
        let file =
            |path: &str, inode| DiskFile::new(path.into(), FileIdentity { device: 1 << 40, inode });
        for files in [vec![], vec![file("/srv/vm", 1)], vec![file("/a", 2), file("/b", u64::MAX)]] {
            let [source, view] = ["nbd://host/vm", "raw"].map(str::to_owned);
            let files = DiskFiles { files, is_all: true, source, view };
            let bytes = encode_disk("vm", &files);
            assert_eq!(decode_disk(&bytes), Some(("vm".to_owned(), files)));
            assert_eq!(decode_disk(&bytes[..bytes.len() - 1]), None);
        }
        assert_eq!(decode_disk(&[0xff; 16]), None);
    }

    #[test]
    fn origins_come_back_as_they_were() {
        let path = PathBuf::from("/run/nbd.socket");
        let unix = ListenerOrigin::UnixFile { path, identity: (7, 1 << 40) };
        for origin in [ListenerOrigin::Tcp, ListenerOrigin::ServiceManager, unix] {
            let bytes = encode_origin(&origin);
            assert_eq!(decode_origin(&bytes), Some(origin));
            assert_eq!(decode_origin(&bytes[..3]), None);
        }
        assert_eq!(decode_origin(&[0, 0, 0, 0, 1]), None);
        assert_eq!(decode_origin(b"\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0relative"), None);
    }
}
