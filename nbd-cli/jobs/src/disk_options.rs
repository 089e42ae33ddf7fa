//! The options of new raw and qcow2 images, as QEMU writes them (`-o`).

use imgfmt::{
    CompressionType, CreateOptions, Format, L2Entries, LazyRefcounts, Preallocation, Qcow2Version,
};

use crate::key_values::KeyValues;
use crate::qemu_numbers::parse_size;
use crate::text::printable;

/// Removes the options of qcow2 from a list and sets them. Those that are not given stay as they
/// are; the backing file, the data file and the preallocation are left to the caller.
///
/// # Errors
///
/// A sentence about an option whose value is not possible.
pub fn take_qcow2(options: &mut KeyValues, create: &mut CreateOptions) -> Result<(), String> {
    if let Some(version) = options.take("compat") {
        create.version = match version.as_str() {
            "0.10" | "v2" => Qcow2Version::V2,
            "1.1" | "v3" => Qcow2Version::V3,
            other => return Err(not_accepted("compat", other)),
        };
    }
    create.cluster_size = take_size(options, "cluster_size")?.unwrap_or(create.cluster_size);
    if let Some(bits) = options.take("refcount_bits") {
        create.refcount_bits = bits.parse().map_err(|_| not_accepted("refcount_bits", &bits))?;
    }
    if let Some(kind) = options.take("compression_type") {
        create.compression = match kind.as_str() {
            "zlib" => CompressionType::Zlib,
            "zstd" => CompressionType::Zstd,
            other => return Err(not_accepted("compression_type", other)),
        };
    }
    if let Some(is_on) = options.take_switch("extended_l2")? {
        create.l2_entries = if is_on { L2Entries::Extended } else { L2Entries::Standard };
    }
    if let Some(is_on) = options.take_switch("lazy_refcounts")? {
        create.lazy_refcounts = if is_on { LazyRefcounts::On } else { LazyRefcounts::Off };
    }
    Ok(())
}

/// Returns the preallocation of that name, if the format has it.
///
/// # Errors
///
/// A sentence if there is none.
pub fn preallocation(name: &str, format: Format) -> Result<Preallocation, String> {
    match name {
        "off" => Ok(Preallocation::Off),
        "metadata" if !matches!(format, Format::Raw | Format::Luks) => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        other => Err(not_accepted("preallocation", other)),
    }
}

/// Removes a size in bytes from a list.
///
/// # Errors
///
/// A sentence if it is not a size.
pub fn take_size(options: &mut KeyValues, key: &str) -> Result<Option<u64>, String> {
    let Some(text) = options.take(key) else { return Ok(None) };
    match parse_size(&text).filter(|size| i64::try_from(*size).is_ok()) {
        Some(size) => Ok(Some(size)),
        None => {
            Err(format!("Parameter '{key}' expects a size below 8E, not '{}'", printable(&text)))
        }
    }
}

/// Returns QEMU's words about an impossible value.
#[must_use]
pub fn not_accepted(key: &str, value: &str) -> String {
    format!("Parameter '{key}' does not accept value '{}'", printable(value))
}
