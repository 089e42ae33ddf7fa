//! Values of the options of QEMU's block drivers.

use imgfmt::storage::Part;
#[cfg(feature = "server")]
use nbd_server::export::filters::{DetectZeroes, Discard, Window};

use crate::key_values::KeyValues;
use crate::qemu_numbers::parse_size;

/// Parses a value of the option `discard`; `None` if it is invalid.
#[cfg(feature = "server")]
pub(crate) fn parse_discard(text: &str) -> Option<Discard> {
    match text {
        "off" | "ignore" => Some(Discard::Ignore),
        "on" | "unmap" => Some(Discard::Unmap),
        _ => None,
    }
}

/// Parses a value of the option `detect-zeroes`; `None` if it is invalid.
#[cfg(feature = "server")]
pub(crate) fn parse_detect_zeroes(text: &str) -> Option<DetectZeroes> {
    match text {
        "off" => Some(DetectZeroes::Off),
        "on" => Some(DetectZeroes::On),
        "unmap" => Some(DetectZeroes::Unmap),
        _ => None,
    }
}

pub(crate) fn take_size(options: &mut KeyValues, key: &str) -> Result<Option<u64>, String> {
    match options.take(key) {
        None => Ok(None),
        Some(text) => parse_size(&text)
            .map(Some)
            .ok_or_else(|| format!("Parameter '{key}' expects a size, not '{text}'")),
    }
}

/// Returns the memory for L2 tables, in bytes, that the options of the driver `qcow2` specify.
/// There is no separate memory for refcounts: `refcount-cache-size` is subtracted from
/// `cache-size`.
pub(super) fn take_metadata_cache(options: &mut KeyValues) -> Result<Option<u64>, String> {
    let both = take_size(options, "cache-size")?;
    let l2 = take_size(options, "l2-cache-size")?;
    let refcounts = take_size(options, "refcount-cache-size")?;
    let Some(both) = both else { return Ok(l2) };
    for (name, part) in [("l2-cache-size", l2), ("refcount-cache-size", refcounts)] {
        if part.is_some_and(|part| part > both) {
            return Err(format!("{name} may not exceed cache-size"));
        }
    }
    match (l2, refcounts) {
        (Some(_), Some(_)) => {
            Err("cache-size, l2-cache-size and refcount-cache-size may not be set \
                                   at the same time"
                .to_owned())
        }
        (Some(l2), None) => Ok(Some(l2)),
        (None, refcounts) => Ok(Some(both - refcounts.unwrap_or(0))),
    }
}

/// Removes the options of the driver `raw` for a part of its file.
pub(super) fn take_part(options: &mut KeyValues) -> Result<Part, String> {
    let offset = take_size(options, "offset")?.unwrap_or(0);
    let size = take_size(options, "size")?;
    if size.is_some_and(|size| size % 512 != 0) {
        return Err("Specified size is not a multiple of 512".to_owned());
    }
    Ok(Part { offset, size })
}

#[cfg(feature = "server")]
pub(crate) fn take_window(options: &mut KeyValues) -> Result<Window, String> {
    let Part { offset, size } = take_part(options)?;
    Ok(Window { offset, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_for_tables_follows_from_the_sizes_of_qemus_caches() {
        let memory = |sizes: &str| take_metadata_cache(&mut KeyValues::parse(sizes, None).unwrap());
        assert_eq!(memory("driver=qcow2"), Ok(None));
        assert_eq!(memory("l2-cache-size=64k,refcount-cache-size=1M"), Ok(Some(64 << 10)));
        assert_eq!(memory("cache-size=4M"), Ok(Some(4 << 20)));
        assert_eq!(memory("cache-size=4M,refcount-cache-size=1M"), Ok(Some(3 << 20)));
        assert_eq!(memory("cache-size=4M,l2-cache-size=1M"), Ok(Some(1 << 20)));
        for wrong in [
            "cache-size=1M,l2-cache-size=2M",
            "cache-size=1M,refcount-cache-size=2M",
            "cache-size=4M,l2-cache-size=2M,refcount-cache-size=2M",
            "l2-cache-size=much",
        ] {
            assert!(memory(wrong).unwrap_err().contains("-size"), "{wrong}");
        }
    }
}
