//! Uploads that a push began and did not record, because it was killed between the two.
//!
//! An upload has no name that could say whose it is. So each push records, before it begins one,
//! which others the object has. If the record goes no further, the next push looks for one that
//! came then, and that nobody used. Any doubt leaves it alone: it may be another program's.

use object_store::multipart::MultipartStore as _;

use super::record::{Intent, Record};
use super::target::Target;
use crate::uploads::{Listed, Upload};

/// How long after the record an upload may have begun, by the clock of the store, in seconds.
const BEGINS_WITHIN: u64 = 10;

impl Target {
    /// Returns which uploads there are before this push begins its own; `None` if the store does
    /// not tell.
    pub(super) async fn intent(&self) -> Option<Intent> {
        let listed = self.listed().await?;
        let others = listed.uploads.into_iter().map(|upload| upload.id).collect();
        Some(Intent { others, time: listed.time })
    }

    /// Ends what earlier pushes began and did not record, now that this one has an upload.
    pub(super) async fn end_orphans(&self, record: &mut Record, own: &str) {
        if record.intents().is_empty() {
            return;
        }
        if let Some(listed) = self.listed().await {
            for intent in record.intents().to_vec() {
                if let Some(orphan) = orphan(&intent, &listed, own) {
                    self.end_if_unused(&orphan.id).await;
                }
            }
        }
        record.forget_intents();
    }

    async fn end_if_unused(&self, id: &str) {
        match self.uploads.is_empty(self.path.as_ref(), id).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(why) => {
                tracing::debug!("the parts of an upload of {} are not told: {why}", self.name);
                return;
            }
        }
        match self.store.abort_multipart(&self.path, &id.to_owned()).await {
            Ok(()) => {
                tracing::info!("ended an upload of {} that an earlier push began", self.name);
            }
            Err(error) => {
                tracing::debug!("{}", self.failed("end an earlier upload of", &error));
            }
        }
    }

    async fn listed(&self) -> Option<Listed> {
        let listed = self.uploads.list(self.path.as_ref()).await;
        let why = |why| tracing::debug!("the uploads of {} are not told: {why}", self.name);
        listed.map_err(why).ok()
    }
}

/// Returns the upload that a push began when it had recorded this, if that is certain.
fn orphan<'a>(intent: &Intent, listed: &'a Listed, own: &str) -> Option<&'a Upload> {
    let own = listed.uploads.iter().find(|upload| upload.id == own)?;
    let begins = intent.time.saturating_sub(1)..=intent.time.saturating_add(BEGINS_WITHIN);
    let is_it = |upload: &&Upload| {
        upload.id != own.id
            && !intent.others.contains(&upload.id)
            && upload.initiator == own.initiator
            && upload.begun.is_some_and(|begun| begins.contains(&begun))
    };
    let mut found = listed.uploads.iter().filter(is_it);
    // One of two is another program's.
    found.next().filter(|_| found.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload(id: &str, begun: u64) -> Upload {
        Upload { id: id.to_owned(), begun: Some(begun), initiator: "me".to_owned() }
    }

    #[test]
    fn only_a_single_upload_that_can_be_no_other_is_an_orphan() {
        let intent = Intent { others: vec!["before".to_owned()], time: 1000 };
        let found = |uploads: &[Upload]| {
            let uploads = [uploads, &[upload("before", 1001), upload("own", 5000)]].concat();
            let listed = Listed { uploads, time: 5000 };
            orphan(&intent, &listed, "own").map(|upload| upload.id.clone())
        };
        assert_eq!(found(&[]), None);
        for begun in [999, 1000, 1010] {
            assert_eq!(found(&[upload("a", begun)]).as_deref(), Some("a"), "{begun}");
        }
        for begun in [998, 1011, 4999] {
            assert_eq!(found(&[upload("a", begun)]), None, "{begun}");
        }
        assert_eq!(found(&[upload("a", 1001), upload("b", 1001)]), None);
        assert_eq!(found(&[Upload { begun: None, ..upload("a", 0) }]), None);
        let of_others = Upload { initiator: "you".to_owned(), ..upload("a", 1001) };
        assert_eq!(found(&[of_others]), None);
        // A store that does not list the own one does not list all.
        let listed = Listed { uploads: vec![upload("a", 1001)], time: 5000 };
        assert_eq!(orphan(&intent, &listed, "own"), None);
    }
}
