//! All limits of the protocol, with reasons.
//!
//! Allocations, loops and stored data that depend on the peer never exceed these numbers.

/// Longest string of the protocol (export name, description, context name), in bytes.
/// Section "Terminology": strings are at most 4096 bytes.
pub const MAX_STRING_LEN: usize = 4096;

/// Largest payload of one option or option reply, in bytes. A larger one ends the connection:
/// QEMU draws the line at the same place, and no legal option comes near it.
pub const MAX_OPTION_LEN: usize = 32 * 1024 * 1024;

/// Largest option payload that is kept in memory. A longer one (up to [`MAX_OPTION_LEN`]) is
/// consumed as it arrives and answered ERR_TOO_BIG, so an unauthenticated client cannot make the
/// server hold 32 MiB. 1 MiB holds 200 context queries of the longest legal kind.
pub const MAX_OPTION_KEPT_LEN: usize = 1024 * 1024;

/// Most queries looked at in one LIST_META_CONTEXT or SET_META_CONTEXT option.
/// Their total size is bounded by [`MAX_OPTION_KEPT_LEN`] already; this bounds the matching work.
pub const MAX_META_CONTEXT_QUERIES: usize = 100_000;

/// Most metadata contexts one connection can select or a server can list for one export.
/// 65 535 bitmaps is what a qcow2 file can hold; no client can use more than a handful at once.
pub const MAX_META_CONTEXTS: usize = 1024;

/// Most options one handshake may consist of before the server ends it. A client that has listed
/// and inspected a thousand exports and still goes on is not negotiating.
pub const MAX_OPTIONS_PER_HANDSHAKE: u32 = 4096;

/// Most exports a client accepts in one LIST answer.
pub const MAX_LISTED_EXPORTS: usize = 10_000;

/// Most information items a client accepts in one answer to INFO or GO. The specification knows
/// four; the rest is room for what it will know.
pub const MAX_INFO_ITEMS: usize = 256;

/// Largest payload of a READ or WRITE by default, in bytes (32 MiB). "Block sizes": a payload of
/// up to 2^25 bytes is never to be taken for an attack, and every peer handles it.
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;

/// Most error chunks in the answer to one request: more than there are bad sectors in a READ that
/// any server tells one by one. Without a bound an answer need never end.
pub const MAX_ERROR_CHUNKS: u32 = 1024;

/// Most bytes of error chunks in the answer to one request (1 MiB).
pub const MAX_ERROR_CHUNKS_LEN: u64 = 1024 * 1024;

/// Largest payload of a refused request that is read and thrown away to stay in sync (64 MiB).
/// Beyond it the server disconnects.
pub const MAX_DISCARDED_PAYLOAD: u64 = 64 * 1024 * 1024;

/// Most descriptors a server puts in one block status chunk. "Block status" allows 2^20; 2^17
/// keeps a compact chunk at 1 MiB, as QEMU does.
pub const MAX_DESCRIPTORS_SENT: usize = 128 * 1024;

/// Most descriptors a client accepts in one block status chunk ("Block status": at most 2^20).
pub const MAX_DESCRIPTORS_RECEIVED: usize = 1024 * 1024;

/// Longest text a server attaches to an error chunk or option error, in bytes. It fits any string
/// limit even when it quotes a name (names are cut before they are quoted).
pub const MAX_ERROR_MESSAGE_LEN: usize = 512;

/// Most content chunks a client accepts in answer to one READ: one for every 512 bytes of the
/// largest payload, plus one for an error. Sector-sized chunks are the finest any server sends.
pub const MAX_CHUNKS_PER_READ: usize = (MAX_PAYLOAD as usize) / 512 + 1;

/// Most places at which the answer to one READ may have gaps at a time. Servers answer in ascending
/// order, or from a few workers at once; more gaps than this only serve to keep a client busy.
pub const MAX_GAPS_PER_READ: usize = 4096;

/// Largest size of an export, in bytes: offsets are signed 64-bit numbers to every kernel.
pub const MAX_EXPORT_SIZE: u64 = i64::MAX as u64;

/// Longest error text or unknown chunk a client keeps of what the server sent, in bytes.
pub const MAX_UNKNOWN_CHUNK_LEN: u32 = 64 * 1024;

/// Preferred block size when an export names none, in bytes ("Block sizes": 4096).
pub const DEFAULT_PREFERRED_BLOCK_SIZE: u32 = 4096;

/// Largest minimum block size that may be advertised, in bytes ("Block sizes": 2^16).
pub const MAX_MINIMUM_BLOCK_SIZE: u32 = 64 * 1024;

/// Port on which NBD servers listen unless told otherwise, as assigned by IANA.
pub const DEFAULT_PORT: u16 = 10809;

/// Reserved bytes after the answer to EXPORT_NAME unless NO_ZEROES was agreed.
pub const EXPORT_NAME_PADDING_LEN: usize = 124;

/// Shortest pre-shared key, in bytes: 128 bits is the least that RFC 9257 lets a key have.
pub const MIN_PSK_LEN: usize = 16;

/// Longest pre-shared key, in bytes: what every version of OpenSSL takes.
pub const MAX_PSK_LEN: usize = 256;

/// Longest name of a user with a pre-shared key, in bytes: GnuTLS and OpenSSL take no more.
pub const MAX_PSK_USER_LEN: usize = 128;

/// Most users in one file of pre-shared keys. Every lookup looks at all of them.
pub const MAX_PSK_USERS: usize = 4096;

/// Largest file of pre-shared keys that is read, in bytes: room for all users and some comments.
pub const MAX_PSK_FILE_LEN: u64 = 4 * 1024 * 1024;
