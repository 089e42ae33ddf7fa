//! Numbers in bytes of a file, big-endian unless the name says otherwise. Missing bytes count as 0.

pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    bytes.get(offset..offset + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]))
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes.get(offset..offset + 4);
    field.and_then(|field| field.try_into().ok()).map_or(0, u32::from_be_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes.get(offset..offset + 8);
    field.and_then(|field| field.try_into().ok()).map_or(0, u64::from_be_bytes)
}

pub(crate) fn u16_le_at(bytes: &[u8], offset: usize) -> u16 {
    u16_at(bytes, offset).swap_bytes()
}

pub(crate) fn u32_le_at(bytes: &[u8], offset: usize) -> u32 {
    u32_at(bytes, offset).swap_bytes()
}

pub(crate) fn u64_le_at(bytes: &[u8], offset: usize) -> u64 {
    u64_at(bytes, offset).swap_bytes()
}
