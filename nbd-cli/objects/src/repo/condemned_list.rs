//! The list of packs that a gc deletes.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::error::{RepositoryError, Result};
use super::id::{Id, PackId};
use super::pack_list::{push_packs, read_packs};
use super::reader::Reader;
use super::seal::{CONDEMNED, FramePlace, Hash, Sealer};
use super::stored::push;

/// Its first bytes.
const MAGIC: &[u8; 8] = b"nbdlist1";
/// Its greatest length, in bytes.
const LEN_MAX: usize = 256 << 20;

/// Writes the list of this identity.
///
/// # Errors
///
/// It is too long.
pub(super) fn encode(sealer: &Sealer, id: Id, packs: &BTreeSet<PackId>) -> Result<Bytes> {
    let mut content = Vec::new();
    push_packs(&mut content, packs.iter());
    if content.len() > LEN_MAX {
        return Err(RepositoryError::invalid("there are too many packs to delete at once"));
    }
    let mut object = MAGIC.to_vec();
    push(&mut object, content.len());
    object.extend_from_slice(&sealer.hash(&content).0);
    object.extend_from_slice(&sealer.frame(place(id), &content)?);
    Ok(object.into())
}

/// Reads the list of this identity; `None` if it is damaged.
pub(super) fn decode(sealer: &Sealer, id: Id, object: &[u8]) -> Option<BTreeSet<PackId>> {
    let mut reader = Reader(object.strip_prefix(MAGIC)?);
    let length = usize::try_from(reader.u32()?).ok().filter(|&it| it <= LEN_MAX)?;
    let hash = Hash(reader.array()?);
    let content = sealer.open(place(id), reader.0, length, hash).ok()?;
    let mut reader = Reader(&content);
    let packs = read_packs(&mut reader)?;
    reader.0.is_empty().then(|| packs.into_iter().collect())
}

fn place(id: Id) -> FramePlace {
    FramePlace { session: id, number: CONDEMNED, offset: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn condemned_lists_are_read_as_they_were_written() {
        let pack = |n: u32| PackId { session: Id::from_bytes([n as u8 % 3; 16]), number: n };
        let (id, sealer) = (Id::from_bytes([8; 16]), Sealer::default());
        for count in [0, 1, 100] {
            let packs: BTreeSet<_> = (0..count).map(pack).collect();
            let object = encode(&sealer, id, &packs).unwrap();
            assert_eq!(decode(&sealer, id, &object).as_ref(), Some(&packs));
            for at in 0..object.len() {
                let mut damaged = object.to_vec();
                damaged[at] ^= 4;
                let found = decode(&sealer, id, &damaged);
                assert!(found.is_none_or(|found| found == packs), "byte {at}");
            }
        }
    }
}
