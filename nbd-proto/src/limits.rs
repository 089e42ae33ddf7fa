//! All limits of the protocol, with reasons.
//!
//! Allocations, loops and stored data that depend on the peer never exceed these numbers.

/// Longest string of the protocol (export name, description, context name), in bytes. Section
/// "Conventions": strings are at most 4096 bytes.
pub const MAX_STRING_LEN: usize = 4096;

/// Largest payload of one option or option reply, in bytes. A larger one ends the connection: QEMU
/// uses the same limit, and no legal option comes near it.
pub const MAX_OPTION_LEN: usize = 32 * 1024 * 1024;

/// Largest option payload that is kept in memory, in bytes. A longer one (up to [`MAX_OPTION_LEN`])
/// is discarded on arrival and answered with ERR_TOO_BIG, so that an unauthenticated client cannot
/// make the server hold 32 MiB. 1 MiB holds 200 context queries of the longest legal kind.
pub const MAX_OPTION_KEPT_LEN: usize = 1024 * 1024;

/// Most queries processed in one LIST_META_CONTEXT or SET_META_CONTEXT option. Their total size is
/// bounded by [`MAX_OPTION_KEPT_LEN`]; this bounds the matching work.
pub const MAX_META_CONTEXT_QUERIES: usize = 100_000;

/// Most metadata contexts that one connection can select or a server can list for one export. A
/// qcow2 file can hold 65 535 bitmaps; no client uses more than a handful at once.
pub const MAX_META_CONTEXTS: usize = 1024;

/// Most options in one handshake; the server ends the connection after them. This is enough to list
/// and inspect a thousand exports.
pub const MAX_OPTIONS_PER_HANDSHAKE: u32 = 4096;

/// Most exports a client accepts in one LIST answer.
pub const MAX_LISTED_EXPORTS: usize = 10_000;

/// Most information items a client accepts in one answer to INFO or GO. The specification defines
/// four; the rest is reserve for future ones.
pub const MAX_INFO_ITEMS: usize = 256;

/// Largest payload of a READ or WRITE by default, in bytes (32 MiB). Section "Size constraints": a
/// payload of up to 2^25 bytes should not be treated as an attack, so every peer supports it.
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;

/// Most error chunks in the answer to one request: more than the bad sectors that any server
/// reports for one READ. Without a limit an answer could be endless.
pub const MAX_ERROR_CHUNKS: u32 = 1024;

/// Most bytes of error chunks in the answer to one request (1 MiB).
pub const MAX_ERROR_CHUNKS_LEN: u64 = 1024 * 1024;

/// Largest payload of a refused request that is discarded to keep the stream in sync, in bytes (64
/// MiB). For a larger one the server disconnects.
pub const MAX_DISCARDED_PAYLOAD: u64 = 64 * 1024 * 1024;

/// Most received bytes that a [saved](crate::transmission::SavedConnection) connection contains: a
/// WRITE with the longest payload, and a large receive buffer after it.
pub const MAX_SAVED_RECEIVED_LEN: usize = 2 * MAX_PAYLOAD as usize;

/// Most descriptors a server puts in one block status chunk. Section "Structured reply types"
/// allows 2^20; 2^17 keeps a compact chunk at 1 MiB, as QEMU does.
pub const MAX_DESCRIPTORS_SENT: usize = 128 * 1024;

/// Most descriptors a client accepts in one block status chunk (section "Structured reply types":
/// at most 2^20).
pub const MAX_DESCRIPTORS_RECEIVED: usize = 1024 * 1024;

/// Longest text a server attaches to an error chunk or option error, in bytes. It fits any string
/// limit even when it quotes a name (names are cut before they are quoted).
pub const MAX_ERROR_MESSAGE_LEN: usize = 512;

/// Most content chunks a client accepts in answer to one READ: one for every 512 bytes of the
/// largest payload, plus one for an error. No server sends chunks smaller than a sector.
pub const MAX_CHUNKS_PER_READ: usize = (MAX_PAYLOAD as usize) / 512 + 1;

/// Most gaps in the answer to one READ at a time. Servers answer in ascending order, or from a few
/// workers at once; more gaps only serve to keep a client busy.
pub const MAX_GAPS_PER_READ: usize = 4096;

/// Largest size of an export, in bytes: kernels use signed 64-bit offsets.
pub const MAX_EXPORT_SIZE: u64 = i64::MAX as u64;

/// Longest error text or unknown chunk of the server that a client keeps, in bytes.
pub const MAX_UNKNOWN_CHUNK_LEN: u32 = 64 * 1024;

/// Preferred block size of an export that specifies none, in bytes (section "Size constraints":
/// 4096).
pub const DEFAULT_PREFERRED_BLOCK_SIZE: u32 = 4096;

/// Largest minimum block size that may be advertised, in bytes (section "Size constraints": 2^16).
pub const MAX_MINIMUM_BLOCK_SIZE: u32 = 64 * 1024;

/// Default port of NBD servers, as assigned by IANA.
pub const DEFAULT_PORT: u16 = 10809;

/// Reserved bytes after the answer to EXPORT_NAME unless NO_ZEROES was negotiated.
pub const EXPORT_NAME_PADDING_LEN: usize = 124;

/// Shortest pre-shared key, in bytes: RFC 9257 requires at least 128 bits.
pub const MIN_PSK_LEN: usize = 16;

/// Longest pre-shared key, in bytes: every version of OpenSSL supports it.
pub const MAX_PSK_LEN: usize = 256;

/// Longest user name of a pre-shared key, in bytes: GnuTLS and OpenSSL accept no more.
pub const MAX_PSK_USER_LEN: usize = 128;

/// Most users in one file of pre-shared keys. Every lookup examines all of them.
pub const MAX_PSK_USERS: usize = 4096;

/// Largest file of pre-shared keys that is read, in bytes: enough for all users and some comments.
pub const MAX_PSK_FILE_LEN: u64 = 4 * 1024 * 1024;
