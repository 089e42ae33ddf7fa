//! A block of zeroes: to digest, and to write where the destination has no faster operation.

use std::sync::LazyLock;

/// 64 KiB of zeroes. Allocated, as a constant would take its size in the program's file.
pub(crate) static ZEROES: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; 64 << 10]);
