//! Sidecars that must be rejected, and malformed bytes.

use super::*;

fn bytes_of(durability: BitmapDurability) -> (Description, Vec<u8>) {
    let description = description(durability, 1 << 20, &[9, 16]);
    let bytes = store::new_bytes(&description);
    (description, bytes)
}

#[test]
fn process_death_level_is_believed_in_the_same_boot_only() {
    let (description, bytes) = bytes_of(BitmapDurability::ProcessDeath);
    let found = recovery(bytes.clone(), &description, BOOT).unwrap();
    assert_eq!(found.trust(), Trust::SameBoot);
    assert_eq!(found.bitmaps(), description.bitmaps);
    for boot in [OTHER_BOOT, ""] {
        let refused = recovery(bytes.clone(), &description, boot);
        assert!(matches!(refused, Err(Rejection::PowerLoss)));
    }
}

#[test]
fn power_loss_level_is_believed_in_every_boot() {
    let (description, bytes) = bytes_of(BitmapDurability::PowerLoss);
    for (boot, trust) in [(BOOT, Trust::SameBoot), (OTHER_BOOT, Trust::OtherBoot)] {
        assert_eq!(recovery(bytes.clone(), &description, boot).unwrap().trust(), trust);
    }
    // Without a boot id nobody can tell whether it is the same one.
    let nameless = Description { boot_id: String::new(), ..description };
    let bytes = store::new_bytes(&nameless);
    assert_eq!(recovery(bytes, &nameless, "").unwrap().trust(), Trust::OtherBoot);
}

#[test]
fn another_session_is_not_believed() {
    let (description, bytes) = bytes_of(BitmapDurability::PowerLoss);
    for identity in [
        Identity { generation: 8, ..description.identity },
        Identity { uuid: [0; 16], ..description.identity },
    ] {
        let refused = Recovery::examine(bytes.clone(), identity, description.image, BOOT);
        assert!(matches!(refused, Err(Rejection::OtherSession)));
    }
}

#[test]
fn an_image_that_somebody_else_changed_is_noticed() {
    let (description, bytes) = bytes_of(BitmapDurability::PowerLoss);
    let then = description.image;
    let now = now_nanoseconds();
    let examine = |image, boot| {
        Recovery::examine(bytes.clone(), description.identity, image, boot).map(|_| ())
    };
    assert!(examine(Fingerprint { modified: now, length: 2000, ..then }, BOOT).is_ok());
    for image in [
        Fingerprint { inode: 6, ..then },
        Fingerprint { length: 999, ..then },
        Fingerprint { header_crc: 10, ..then },
        Fingerprint { modified: now + 5_000_000_000, ..then },
    ] {
        assert!(matches!(examine(image, BOOT), Err(Rejection::ForeignWriter(_))), "{image:?}");
    }
    // After a loss of power nobody knows when the last change was.
    let later = Fingerprint { modified: now + 5_000_000_000, ..then };
    assert!(examine(later, OTHER_BOOT).is_ok());
}

#[test]
fn every_changed_byte_of_header_descriptors_and_log_is_noticed() {
    let (description, bytes) = bytes_of(BitmapDurability::PowerLoss);
    let descriptors = layout::DESCRIPTORS_OFFSET as usize;
    let log = layout::LOG_OFFSET as usize;
    let places = (0..512)
        .chain(log..log + layout::SLOT_BYTES)
        .chain(descriptors..descriptors + 2 * layout::DESCRIPTOR_BYTES);
    for place in places {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x41;
        assert!(recovery(damaged, &description, OTHER_BOOT).is_err(), "byte {place}");
    }
}

#[test]
fn every_length_but_the_right_one_is_noticed() {
    let (description, bytes) = bytes_of(BitmapDurability::PowerLoss);
    for length in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
        let cut = bytes[..length].to_vec();
        assert!(recovery(cut, &description, OTHER_BOOT).is_err(), "{length}");
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(recovery(longer, &description, OTHER_BOOT).is_err());
}

#[test]
fn a_header_with_a_good_checksum_can_claim_anything_without_harm() {
    let (description, bytes) = bytes_of(BitmapDurability::PowerLoss);
    let mut state = 88172645463325252_u64;
    for round in 0..20_000_u64 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let mut hostile = bytes.clone();
        let place = 40 + (state % 100) as usize;
        let value = [0, u64::MAX, 1 << 62, state, round][(state >> 32) as usize % 5];
        hostile[place..place + 8].copy_from_slice(&value.to_le_bytes());
        let crc = crc32fast::hash(&hostile[..508]);
        hostile[508..512].copy_from_slice(&crc.to_le_bytes());
        if let Ok(found) = recovery(hostile, &description, OTHER_BOOT) {
            for bitmap in &description.bitmaps {
                let _ = found.words(bitmap);
            }
        }
    }
}

#[test]
fn a_bitmap_of_another_kind_has_no_words() {
    let (description, bytes) = bytes_of(BitmapDurability::PowerLoss);
    let found = recovery(bytes, &description, BOOT).unwrap();
    let wanted = description.bitmaps[0].clone();
    for other in [
        BitmapDescriptor { name: b"another".to_vec(), ..wanted.clone() },
        BitmapDescriptor { granularity_bits: 10, ..wanted.clone() },
        BitmapDescriptor { bit_count: 1, ..wanted },
    ] {
        assert!(found.words(&other).unwrap().is_none());
    }
}
