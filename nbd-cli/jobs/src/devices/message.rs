//! The messages of the generic netlink family `nbd` (linux/nbd-netlink.h).

use std::os::fd::{AsRawFd as _, OwnedFd};

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, Nla as _, NlasIterator, Parseable as _,
    ParseableParametrized, emit_u32, emit_u64, parse_u32,
};
use netlink_packet_generic::{GenlFamily, GenlHeader};

/// The multicast group of [`LINK_DEAD`].
pub(super) const MULTICAST_GROUP: &str = "nbd_mc_group";

/// Gives sockets to a device: the one of [`index`], or a free one.
pub(super) const CONNECT: u8 = 1;
pub(super) const DISCONNECT: u8 = 2;
/// Gives sockets to a device in place of those that are dead.
pub(super) const RECONFIGURE: u8 = 3;
/// The kernel's announcement that a socket of a device is dead.
pub(super) const LINK_DEAD: u8 = 4;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONNECTION_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;
/// In [`SOCKETS`]: one socket.
const SOCKET_ITEM: u16 = 1;
/// In [`SOCKET_ITEM`]: its descriptor in the process that sends the message.
const SOCKET_DESCRIPTOR: u16 = 1;

const VERSION: u8 = 1;

/// A message: its command and attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceMessage {
    pub(super) command: u8,
    attributes: Vec<DefaultNla>,
}

impl DeviceMessage {
    pub(super) fn new(command: u8) -> Self {
        Self { command, attributes: Vec::new() }
    }

    pub(super) fn index(self, index: u32) -> Self {
        self.with(number_u32(INDEX, index))
    }

    pub(super) fn size(self, bytes: u64) -> Self {
        self.with(number(SIZE_BYTES, bytes))
    }

    pub(super) fn block_size(self, bytes: u64) -> Self {
        self.with(number(BLOCK_SIZE_BYTES, bytes))
    }

    pub(super) fn timeout(self, seconds: u64) -> Self {
        self.with(number(TIMEOUT, seconds))
    }

    pub(super) fn server_flags(self, flags: u16) -> Self {
        self.with(number(SERVER_FLAGS, flags.into()))
    }

    pub(super) fn dead_connection_timeout(self, seconds: u64) -> Self {
        self.with(number(DEAD_CONNECTION_TIMEOUT, seconds))
    }

    /// At most 60 KiB, as attributes have lengths of 16 bits.
    pub(super) fn backend(self, identifier: &str) -> Self {
        let mut text = identifier.as_bytes().to_vec();
        text.push(0);
        self.with(DefaultNla::new(BACKEND_IDENTIFIER, text))
    }

    /// They must stay open until the message is sent; the kernel has them open itself then.
    pub(super) fn sockets(self, sockets: &[OwnedFd]) -> Self {
        let items: Vec<_> = sockets
            .iter()
            .map(|socket| {
                let descriptor = socket.as_raw_fd().cast_unsigned();
                nested(SOCKET_ITEM, &[number_u32(SOCKET_DESCRIPTOR, descriptor)])
            })
            .collect();
        self.with(nested(SOCKETS, &items))
    }

    /// The device that the message is about.
    pub(super) fn device(&self) -> Option<u32> {
        self.attributes.iter().find(|attribute| attribute.kind() == INDEX).and_then(value_u32)
    }

    fn with(mut self, attribute: DefaultNla) -> Self {
        self.attributes.push(attribute);
        self
    }
}

fn number_u32(kind: u16, value: u32) -> DefaultNla {
    let mut bytes = vec![0; 4];
    // Fails for a shorter buffer only.
    let _ = emit_u32(&mut bytes, value);
    DefaultNla::new(kind, bytes)
}

fn number(kind: u16, value: u64) -> DefaultNla {
    let mut bytes = vec![0; 8];
    let _ = emit_u64(&mut bytes, value);
    DefaultNla::new(kind, bytes)
}

fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, bytes_of(&attributes))
}

fn bytes_of(value: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; value.buffer_len()];
    value.emit(&mut bytes);
    bytes
}

fn value_u32(attribute: &DefaultNla) -> Option<u32> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    parse_u32(&bytes).ok()
}

impl GenlFamily for DeviceMessage {
    fn family_name() -> &'static str {
        "nbd"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        VERSION
    }
}

impl Emitable for DeviceMessage {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for DeviceMessage {
    fn parse_with_param(payload: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        let attributes = NlasIterator::new(payload)
            .map(|attribute| DefaultNla::parse(&attribute?))
            .collect::<Result<_, _>>()?;
        Ok(Self { command: header.cmd, attributes })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn parsed(command: u8, bytes: &[u8]) -> Result<DeviceMessage, DecodeError> {
        DeviceMessage::parse_with_param(bytes, GenlHeader { cmd: command, version: VERSION })
    }

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let sent = DeviceMessage::new(CONNECT).index(7).size(1 << 40).backend("nbd://host/disk");
        let received = parsed(CONNECT, &bytes_of(&sent)).expect("a message");
        assert_eq!(received, sent);
        assert_eq!(received.device(), Some(7));
    }

    #[test]
    fn sockets_are_nested_twice() {
        let (one, _other) = UnixStream::pair().expect("sockets");
        let descriptor = one.as_raw_fd();
        let message = DeviceMessage::new(RECONFIGURE).sockets(&[one.into()]);
        let bytes = bytes_of(&message);
        // Length and type of the list, of the item and of the number, in the order of this machine.
        let word = |at: usize| parse_u32(&bytes[at..at + 4]).expect("a word");
        let header = |length: u32, kind: u16| match cfg!(target_endian = "little") {
            true => length | u32::from(kind) << 16,
            false => length << 16 | u32::from(kind),
        };
        assert_eq!(word(0), header(16, SOCKETS | NLA_F_NESTED));
        assert_eq!(word(4), header(12, SOCKET_ITEM | NLA_F_NESTED));
        assert_eq!(word(8), header(8, SOCKET_DESCRIPTOR));
        assert_eq!(word(12), descriptor.cast_unsigned());
    }

    #[test]
    fn damaged_attributes_are_errors() {
        for bytes in [&[1][..], &[3, 0, 1, 0], &[9, 0, 1, 0, 0, 0, 0, 0], &[0; 4]] {
            assert!(parsed(LINK_DEAD, bytes).is_err(), "{bytes:?}");
        }
        // An index of the wrong length is none.
        let short = parsed(LINK_DEAD, &[6, 0, 1, 0, 1, 0, 0, 0]).expect("an attribute");
        assert_eq!(short.device(), None);
    }
}
