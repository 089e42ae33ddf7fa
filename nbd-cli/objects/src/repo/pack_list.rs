//! Lists of packs, as pages, backups and condemned lists begin with them: sessions, then packs.

use super::id::{Id, PackId};
use super::reader::Reader;
use super::stored::push;

/// Appends packs, in this order.
pub(crate) fn push_packs<'a>(
    bytes: &mut Vec<u8>,
    packs: impl ExactSizeIterator<Item = &'a PackId> + Clone,
) {
    let mut sessions: Vec<_> = packs.clone().map(|pack| pack.session).collect();
    sessions.sort_unstable();
    sessions.dedup();
    push(bytes, sessions.len());
    sessions.iter().for_each(|session| bytes.extend_from_slice(session.bytes()));
    push(bytes, packs.len());
    for pack in packs {
        push(bytes, sessions.binary_search(&pack.session).unwrap_or_default());
        bytes.extend_from_slice(&pack.number.to_le_bytes());
    }
}

/// Reads packs, in their order; `None` if the list is malformed.
pub(crate) fn read_packs(reader: &mut Reader<'_>) -> Option<Vec<PackId>> {
    let sessions = (0..reader.count(16)?)
        .map(|_| reader.array().map(Id::from_bytes))
        .collect::<Option<Vec<_>>>()?;
    let count = reader.count(8)?;
    let pack = |_| {
        let session = *sessions.get(usize::try_from(reader.u32()?).ok()?)?;
        Some(PackId { session, number: reader.u32()? })
    };
    (0..count).map(pack).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_keep_their_order_and_each_session_is_there_once() {
        let pack = |session, number| PackId { session: Id::from_bytes([session; 16]), number };
        let packs = [pack(2, 7), pack(1, 0x0102), pack(2, 3)];
        let mut bytes = Vec::new();
        push_packs(&mut bytes, packs.iter());
        let expected = [
            &[2, 0, 0, 0][..],
            &[1; 16],
            &[2; 16],
            &[3, 0, 0, 0],
            &[1, 0, 0, 0, 7, 0, 0, 0],
            &[0, 0, 0, 0, 2, 1, 0, 0],
            &[1, 0, 0, 0, 3, 0, 0, 0],
        ];
        assert_eq!(bytes, expected.concat());
        assert_eq!(read_packs(&mut Reader(&bytes)), Some(packs.to_vec()));
        for end in 0..bytes.len() {
            assert_eq!(read_packs(&mut Reader(&bytes[..end])), None);
        }
        // A session that the list does not have.
        bytes[40] = 2;
        assert_eq!(read_packs(&mut Reader(&bytes)), None);
    }
}
