//! Creates whose outcome is not known.

use std::time::Duration;

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::objects::{Creates, Objects};
use super::protocol::{Answer, Request};

/// Creates of one object at most.
const CREATES_MAX: u32 = 8;
/// Pause before the second one; it doubles with each.
const PAUSE: Duration = Duration::from_millis(100);

/// Counts the creates of one object.
///
/// A create is not repeated by the client of the store: its reply may be lost although the object
/// was written. Stores that are busy say of an object that is not there that it exists. Either way
/// the object has to be read.
#[derive(Debug, Default)]
pub(crate) struct Tries(u32);

impl Tries {
    /// Creates an object. [`Answer::Exists`] says that the object has to be read, and created again
    /// if there is none.
    pub(crate) async fn create(&mut self, objects: &Objects, request: Request) -> Result<Answer> {
        if self.0 > 0 {
            tokio::time::sleep(PAUSE * 2_u32.pow((self.0 - 1).min(CREATES_MAX))).await;
        }
        self.0 += 1;
        // Where creates are puts, the client of the store has repeated it, and what is found does
        // not say whether the session was ended.
        let is_last = self.0 >= CREATES_MAX || objects.creates == Creates::Overwriting;
        match objects.carry_out(request).await {
            Err(error) if error.kind() == RepositoryErrorKind::Store && !is_last => {
                tracing::debug!("{error}; the object is looked for");
                Ok(Answer::Exists)
            }
            Ok(Answer::Exists) if self.0 > CREATES_MAX => Err(RepositoryError::new(
                RepositoryErrorKind::Store,
                format!("{} says of a new object again and again that it exists", objects.name()),
            )),
            answer => answer,
        }
    }
}
