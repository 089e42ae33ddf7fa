//! CRC-32C (Castagnoli), which protects headers, tables and the log.

/// The polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ POLYNOMIAL };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn update(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

/// Whether the checksum in a structure, 4 bytes from offset 4 on, is that of the structure with
/// zeroes in place of the checksum.
pub(super) fn is_sound(structure: &[u8]) -> bool {
    checksum(structure).is_some_and(|checksum| structure[4..8] == checksum)
}

/// Sets the checksum in a structure, of at least 8 bytes.
pub(super) fn seal(structure: &mut [u8]) {
    if let Some(checksum) = checksum(structure) {
        structure[4..8].copy_from_slice(&checksum);
    }
}

fn checksum(structure: &[u8]) -> Option<[u8; 4]> {
    let (start, rest) = structure.split_at_checked(8)?;
    let crc = update(update(update(u32::MAX, &start[..4]), &[0; 4]), rest);
    Some((!crc).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_the_usual_text_is_the_known_one() {
        assert_eq!(!update(u32::MAX, b"123456789"), 0xe306_9283);
    }
}
