//! The magic numbers and their ASCII forms.

/// First eight bytes from a server: `NBDMAGIC`.
pub const INIT: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes from a newstyle server and first eight of every option: `IHAVEOPT`.
pub const OPTION: u64 = 0x4948_4156_454f_5054;
/// Second eight bytes from an oldstyle server.
pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// First eight bytes of every option reply.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a compact request.
pub const REQUEST: u32 = 0x2560_9513;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// First four bytes of an extended request.
pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
/// First four bytes of an extended reply chunk.
pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;
