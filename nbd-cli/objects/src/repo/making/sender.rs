//! The packs of a session: filled and sent.

use std::sync::Arc;

use super::super::error::{RepositoryError, Result};
use super::super::id::{Id, Key, PackId};
use super::super::objects::Objects;
use super::super::pack::{FrameKind, PACK_SIZE, PackBuilder};
use super::super::seal::{Hash, PACKS_MAX};
use super::super::stored::Stored;
use super::puts::Puts;

#[derive(Debug)]
pub(super) struct Sender {
    objects: Arc<Objects>,
    /// The pack that is being filled.
    pack: PackBuilder,
    pub(super) puts: Puts,
    /// Packs and bytes that were sent, or are on their way.
    pub(super) packs: u32,
    pub(super) added: u64,
}

impl Sender {
    pub(super) fn new(objects: Arc<Objects>, session: Id) -> Self {
        let pack = PackBuilder::new(PackId { session, number: 0 });
        Self { objects, pack, puts: Puts::default(), packs: 0, added: 0 }
    }

    /// Bytes of the pack that is being filled.
    pub(super) fn len(&self) -> usize {
        self.pack.len()
    }

    /// Adds a frame to the pack, and sends the pack if it is full.
    pub(super) async fn store(
        &mut self,
        what: (FrameKind, u64),
        packed: Vec<u8>,
        hash: Hash,
    ) -> Result<Stored> {
        let stored = self.pack.add(&self.objects.sealer, what, packed, hash)?;
        if self.pack.len() >= PACK_SIZE {
            self.send_pack().await?;
        }
        Ok(stored)
    }

    pub(super) async fn send_pack(&mut self) -> Result<()> {
        if self.pack.len() == 0 {
            return Ok(());
        }
        if self.packs >= PACKS_MAX {
            return Err(RepositoryError::invalid("the backup has too many packs"));
        }
        self.packs += 1;
        let next = PackId { number: self.packs, ..self.pack.id() };
        let memory = self.puts.memory();
        let full = std::mem::replace(&mut self.pack, PackBuilder::reusing(next, memory));
        let name = Key::Pack(full.id()).to_string();
        let content = full.finish(&self.objects.sealer)?;
        self.added += content.len() as u64;
        self.puts.send(&self.objects, name, content).await
    }

    /// Sends the last pack, and waits for all.
    pub(super) async fn finish(&mut self) -> Result<()> {
        self.send_pack().await?;
        self.puts.finish().await
    }
}
