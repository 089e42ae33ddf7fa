//! Lists of objects.
//!
//! The client of the store takes any text for a list, an empty one if it finds no objects in it,
//! and the page of a proxy, too. A collector deletes what is not listed, so its lists have to be
//! complete.

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{Method, Uri};
use object_store::client::{HttpError, HttpErrorKind, HttpRequest};

use super::body::ReplyBody;
use super::failure::failed;

/// Longest list, in bytes: it has at most 1000 objects, and no key is longer than 1024 bytes, each
/// of which XML may write as six.
pub(super) const LIST_MAX: u64 = 16 << 20;

/// Returns whether a request asks for a list.
pub(super) fn is_wanted(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|part| part == "list-type=2"))
}

/// Returns whether a request asks for a list of uploads or of their parts.
pub(super) fn is_of_uploads(request: &HttpRequest) -> bool {
    let is_name = |part: &str| matches!(part.split('=').next(), Some("uploads" | "uploadId"));
    request.method() == Method::GET
        && request.uri().query().is_some_and(|query| query.split('&').any(is_name))
}

/// Reads a reply, and refuses it unless it is a whole list, which says whether another one follows.
pub(super) async fn checked(body: ReplyBody) -> Result<Bytes, HttpError> {
    let list = body.collect().await?.to_bytes();
    if !is_list(&String::from_utf8_lossy(&list)) {
        let why = "the reply is not a list of objects; if there is a proxy between, it made it";
        return Err(failed(HttpErrorKind::Decode, why));
    }
    Ok(list)
}

fn is_list(text: &str) -> bool {
    let text = text.trim_start_matches('\u{feff}').trim();
    let text = match text.strip_prefix("<?xml") {
        Some(rest) => rest.split_once("?>").map_or("", |(_, rest)| rest.trim_start()),
        None => text,
    };
    let inside = text.strip_prefix("<ListBucketResult");
    let inside =
        inside.filter(|rest| rest.starts_with(|next: char| next == '>' || next.is_whitespace()));
    let Some(inside) = inside.and_then(|rest| rest.strip_suffix("</ListBucketResult>")) else {
        return false;
    };
    inside.contains("<IsTruncated>false</IsTruncated>")
        || (inside.contains("<IsTruncated>true</IsTruncated>")
            && inside.contains("<NextContinuationToken>"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_list_is_a_list() {
        let list = |inside: &str| format!("<ListBucketResult>{inside}</ListBucketResult>");
        let whole = list("<IsTruncated>false</IsTruncated>");
        assert!(is_list(&whole));
        let begun =
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult xmlns=\"http://s3\">";
        assert!(is_list(&whole.replace("<ListBucketResult>", begun)));
        let token =
            "<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>";
        assert!(is_list(&list(token)));
        for other in [
            "",
            "<html><body>Welcome</body></html>",
            "<?xml version=\"1.0\"",
            "<Error><Code>SlowDown</Code></Error>",
            &list(""),
            &list("<IsTruncated>true</IsTruncated>"),
            &whole[..whole.len() - 1],
            &whole.replace("<ListBucketResult>", "<ListBucketResults>"),
        ] {
            assert!(!is_list(other), "{other}");
        }
    }

    #[test]
    fn lists_are_told_by_their_query() {
        let is_wanted = |uri: &str| is_wanted(&uri.parse().unwrap());
        assert!(is_wanted("http://h/b?list-type=2&prefix=x"));
        assert!(!is_wanted("http://h/b/list-type=2") && !is_wanted("http://h/b?prefix=list-type"));
    }
}
