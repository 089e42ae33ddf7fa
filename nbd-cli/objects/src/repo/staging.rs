//! Files that writers into a folder left when they were killed: parts of packs, which no list
//! shows.

use std::path::{Path, PathBuf};

use super::error::Result;
use super::id::{Id, Key};
use super::objects::Objects;

/// Removes the files of sessions that have ended. Those of others may be in use.
///
/// What cannot be removed costs space and nothing else; it is the next gc's.
pub(crate) async fn remove_staged(objects: &Objects) -> Result<()> {
    let Some(directory) = objects.directory() else { return Ok(()) };
    let packs = directory.join("packs");
    let found = tokio::task::spawn_blocking(move || staged(&packs)).await.unwrap_or_default();
    for (session, file) in found {
        if objects.exists(Key::Backup(session)).await?
            && let Err(error) = std::fs::remove_file(&file)
        {
            tracing::debug!(%error, "a part of a pack cannot be removed");
        }
    }
    Ok(())
}

/// Finds `packs/SESSION/NUMBER#DIGITS`, as the crate `object_store` names what is not yet complete.
fn staged(packs: &Path) -> Vec<(Id, PathBuf)> {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut found = Vec::new();
    for folder in entries(packs) {
        let Some(session) = folder.file_name().to_str().and_then(|it| it.parse::<Id>().ok()) else {
            continue;
        };
        for file in entries(&folder.path()) {
            let is_file = file.file_type().is_ok_and(|it| it.is_file());
            if is_file && file.file_name().to_str().is_some_and(|name| is_staged(session, name)) {
                found.push((session, file.path()));
            }
        }
    }
    found
}

fn is_staged(session: Id, name: &str) -> bool {
    name.split_once('#').is_some_and(|(pack, suffix)| {
        let is_number = !suffix.is_empty() && suffix.bytes().all(|it| it.is_ascii_digit());
        is_number && format!("packs/{session}/{pack}").parse::<Key>().is_ok()
    })
}
