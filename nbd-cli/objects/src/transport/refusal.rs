//! What a store says of a request that it refuses.
//!
//! The text goes into error messages, so it is cut to the code and the message of S3's errors. The
//! complete one can have the access key, the signature and the text that was signed.

use http_body_util::BodyExt as _;
use object_store::client::{HttpError, HttpErrorKind, HttpResponse};

use crate::refusal::Refusal;
use crate::shown::summary;

use super::body::ReplyBody;

/// Longest reply that is looked at, in bytes.
const READ_MAX: usize = 64 * 1024;

/// Returns the code and message of an error of S3, and nothing for other replies.
pub(super) async fn summarised(mut body: ReplyBody) -> String {
    let mut text = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data() {
            text.extend_from_slice(&data[..data.len().min(READ_MAX - text.len())]);
        }
        if text.len() == READ_MAX {
            break;
        }
    }
    summary(&String::from_utf8_lossy(&text))
}

/// Makes an error of a refusal that the client of the store would hand on as text alone.
pub(super) async fn typed(reply: HttpResponse) -> Result<HttpResponse, HttpError> {
    let status = reply.status();
    if Refusal::is_told(status) {
        return Ok(reply);
    }
    let said = reply.into_body().bytes().await?;
    let refusal = Refusal::new(status, String::from_utf8_lossy(&said));
    Err(HttpError::new(HttpErrorKind::Unknown, refusal))
}
