//! One file per subcommand: its arguments and its output.

pub mod attach;
pub mod backup;
pub mod bench;
pub mod bitmap;
pub mod checksum;
pub mod completions;
pub mod control;
pub mod copy;
pub mod detach;
pub mod devices;
pub mod image;
pub mod info;
pub mod list_meta;
pub mod map;
#[cfg(feature = "mount")]
pub mod mount;
pub mod qemu_img;
pub mod qemu_nbd;
#[cfg(feature = "object-storage")]
pub mod repo;
pub mod restore;
pub mod serve;
pub mod tls;
pub mod top;
