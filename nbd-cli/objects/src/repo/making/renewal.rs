//! The sign of life of a backup that is being made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::task::JoinHandle;

use super::super::error::Result;
use super::super::id::{Id, Key};
use super::super::objects::{Creates, Objects};
use super::super::repository::Repository;
use super::super::session_record::SessionRecord;
use crate::runtime::boxed;

/// Longest time to end a session whose store does not answer.
const TIME_TO_GIVE_UP: Duration = Duration::from_secs(10);

/// Renews the record of a session, so that a collector can tell a slow backup from one that was
/// killed. Ends when it is dropped.
#[derive(Debug)]
pub(super) struct Renewal {
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
    is_ended: Arc<AtomicBool>,
    record: Option<SessionRecord>,
}

impl Renewal {
    /// Starts, for a session that is registered.
    pub(super) fn start(
        objects: Arc<Objects>,
        id: Id,
        record: SessionRecord,
        interval: Duration,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let is_ended = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&is_ended);
        let known = record.clone();
        let task = tokio::spawn(boxed(async move {
            if renew(&objects, (id, &record), interval, stopped).await {
                ended.store(true, Ordering::Relaxed);
            }
        }));
        Self { stop: Some(stop), task: Some(task), is_ended, record: Some(known) }
    }

    /// One that does nothing.
    pub(super) fn none() -> Self {
        Self { stop: None, task: None, is_ended: Arc::default(), record: None }
    }

    /// Returns whether the session was ended, as far as it is known.
    pub(super) fn is_ended(&self) -> bool {
        self.is_ended.load(Ordering::Relaxed)
    }

    /// Says in the record that nothing will be committed. It was stopped.
    async fn mark_failed(&mut self, objects: &Objects, id: Id) -> Result<()> {
        let Some(record) = self.record.take() else { return Ok(()) };
        let record = SessionRecord { failed: true, ..record };
        // No renewal has this number, and no two records may have the same.
        let object = record.encode(&objects.sealer, id, u32::MAX)?;
        objects.write(&Key::Session(id).to_string(), object).await
    }

    /// Stops, and waits for a request that is on its way: it could bring a record back that is
    /// deleted meanwhile.
    pub(super) async fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            // If it panicked, nothing is on its way.
            let _ = task.await;
        }
    }
}

/// What a session that failed has left in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Its record.
    Nothing,
    /// Its record, and packs that the next one can use.
    Packs,
    /// The backup too, perhaps; or the request to create it may still have its effect.
    Create,
}

impl Repository {
    /// Ends a session that failed, so that no gc waits for it; tries so for a while.
    pub(super) async fn give_up(&self, id: Id, renewal: &mut Renewal, left: Left) {
        let key = Key::Session(id).to_string();
        let ending = async {
            renewal.stop().await;
            let ended = match left {
                // Only a tombstone keeps the create from having an effect.
                Left::Create if self.creates() == Creates::Overwriting => return Ok(()),
                Left::Create => return self.end_session(id).await.map(drop),
                Left::Nothing => self.objects.delete(&key).await,
                Left::Packs => renewal.mark_failed(&self.objects, id).await,
            };
            match ended {
                // The disk may be full. What was sent is not used again then.
                Err(_) => self.objects.delete(&key).await,
                ended => ended,
            }
        };
        let ended = tokio::time::timeout(TIME_TO_GIVE_UP, ending).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::debug!("the session {id} could not be ended; gc waits for it");
        }
    }
}

/// Returns true if it found that the session has ended, and false if it was stopped.
async fn renew(
    objects: &Objects,
    (id, record): (Id, &SessionRecord),
    interval: Duration,
    mut stopped: oneshot::Receiver<()>,
) -> bool {
    for counter in 1.. {
        tokio::select! {
            _ = &mut stopped => return false,
            () = tokio::time::sleep(interval) => {}
        }
        // A failure costs nothing but patience.
        if has_ended(objects, id).await.unwrap_or(false) {
            return true;
        }
        if stopped.try_recv() != Err(TryRecvError::Empty) {
            return false;
        }
        if let Ok(object) = record.encode(&objects.sealer, id, counter) {
            let _ = objects.write(&Key::Session(id).to_string(), object).await;
        }
    }
    false
}

/// Looks whether a session has ended: there is a tombstone or, where these can be written over, its
/// record is gone.
async fn has_ended(objects: &Objects, id: Id) -> Result<bool> {
    if objects.exists(Key::Backup(id)).await? {
        return Ok(true);
    }
    Ok(objects.creates == Creates::Overwriting && !objects.exists(Key::Session(id)).await?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::ObjectStore;
    use object_store::memory::InMemory;
    use object_store::path::Path;

    use super::super::super::protocol::{Object, Request};
    use super::super::super::seal::Sealer;
    use super::*;
    use crate::Place;

    fn objects(creates: Creates) -> Arc<Objects> {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let name = "memory".to_owned();
        let place = Place {
            store,
            path: Path::default(),
            name: name.clone(),
            identity: name,
            directory: None,
        };
        Arc::new(Objects::new(place, Sealer::default(), creates))
    }

    async fn put(objects: &Objects, key: Key, object: Object) {
        objects.carry_out(Request::Put(key, object)).await.unwrap();
    }

    #[tokio::test]
    async fn record_is_renewed_until_the_session_is_ended() {
        for creates in [Creates::Exclusive, Creates::Overwriting] {
            let (objects, id) = (objects(creates), Id::random().unwrap());
            let session = Key::Session(id);
            put(&objects, session, Object::Session("first".into())).await;
            let record =
                SessionRecord { name: "vm".into(), host: "host".into(), time: 1, failed: false };
            let interval = Duration::from_millis(1);
            let mut renewal = Renewal::start(Arc::clone(&objects), id, record, interval);
            let counter = async || {
                let object = objects.read(&session.to_string(), 1 << 10).await.unwrap().unwrap();
                SessionRecord::decode(&objects.sealer, id, &object).map(|(_, counter)| counter)
            };
            while counter().await < Some(3) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert!(!renewal.is_ended());
            match creates {
                Creates::Exclusive => {
                    put(&objects, Key::Backup(id), Object::Tombstone(None)).await;
                }
                Creates::Overwriting => objects.delete(&session.to_string()).await.unwrap(),
            }
            while !renewal.is_ended() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // It brings no record back.
            objects.delete(&session.to_string()).await.unwrap();
            renewal.stop().await;
            assert!(!objects.exists(session).await.unwrap());
        }
    }

    #[tokio::test]
    async fn nothing_is_renewed_after_it_was_stopped() {
        let (objects, id) = (objects(Creates::Exclusive), Id::random().unwrap());
        let record =
            SessionRecord { name: "vm".into(), host: "host".into(), time: 1, failed: false };
        let interval = Duration::from_millis(1);
        let mut renewal = Renewal::start(Arc::clone(&objects), id, record, interval);
        while !objects.exists(Key::Session(id)).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        renewal.stop().await;
        assert!(!renewal.is_ended());
        objects.delete(&Key::Session(id).to_string()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!objects.exists(Key::Session(id)).await.unwrap());
    }
}
