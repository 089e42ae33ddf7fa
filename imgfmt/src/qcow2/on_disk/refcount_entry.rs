//! The counts in a refcount block, which are 1 to 64 bits wide.

/// Reads one count of a block. Counts narrower than a byte start at the lowest bit.
pub(in crate::qcow2) fn read_entry(bytes: &[u8], entry: usize, order: u32) -> u64 {
    if order < 3 {
        let bit = entry << order;
        let mask = (1u16 << (1 << order)) - 1;
        return u64::from(u16::from(bytes[bit / 8]) >> (bit % 8) & mask);
    }
    let width = 1 << (order - 3);
    let field = &bytes[entry * width..][..width];
    field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes one count of a block; returns the bytes that changed.
pub(in crate::qcow2) fn write_entry(
    bytes: &mut [u8],
    entry: usize,
    order: u32,
    value: u64,
) -> (usize, usize) {
    if order < 3 {
        let bit = entry << order;
        let mask = ((1u16 << (1 << order)) - 1) << (bit % 8);
        let byte = &mut bytes[bit / 8];
        *byte = *byte & !(mask as u8) | (value << (bit % 8)) as u8 & mask as u8;
        return (bit / 8, bit / 8 + 1);
    }
    let width = 1 << (order - 3);
    let field = &mut bytes[entry * width..][..width];
    field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    (entry * width, (entry + 1) * width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_independent_of_their_neighbours() {
        for order in 0..=6 {
            let mut bytes = vec![0; 512];
            let entries = (512 * 8) >> order;
            let max = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            write_entry(&mut bytes, 5, order, max);
            write_entry(&mut bytes, 7, order, 1);
            write_entry(&mut bytes, entries - 1, order, max);
            for entry in 0..entries {
                let expected = match entry {
                    5 => max,
                    7 => 1,
                    last if last == entries - 1 => max,
                    _ => 0,
                };
                assert_eq!(read_entry(&bytes, entry, order), expected, "order {order}");
            }
            write_entry(&mut bytes, 5, order, 0);
            assert_eq!(read_entry(&bytes, 5, order), 0);
            assert_eq!(read_entry(&bytes, 7, order), 1);
        }
    }

    #[test]
    fn narrow_counts_start_at_the_lowest_bit_and_wide_ones_are_big_endian() {
        let mut bytes = vec![0; 8];
        write_entry(&mut bytes, 1, 0, 1);
        assert_eq!(bytes[0], 0b10);
        write_entry(&mut bytes, 1, 4, 0x1234);
        assert_eq!(bytes[2..4], [0x12, 0x34]);
    }
}
