//! What a store for tests has, and what its requests do with it.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};
use hyper::{Method, StatusCode};
use openssl::hash::{MessageDigest, hash};

use crate::crypto::hex;

/// The clock of the store stands still, so that no test depends on how fast it runs.
const NOW: u64 = 1_795_863_115;
/// The same, as HTTP writes it.
const NOW_TEXT: &str = "Sat, 28 Nov 2026 10:51:55 GMT";

/// An object.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub(super) data: Bytes,
    pub(super) etag: String,
}

impl Object {
    fn new(data: Bytes) -> Self {
        let etag = format!("\"{}\"", md5_hex(&data));
        Self { data, etag }
    }
}

/// An upload that is not complete.
#[derive(Debug)]
struct Upload {
    key: String,
    parts: BTreeMap<u32, Object>,
    /// Seconds since 1970.
    begun: u64,
}

/// The contents of a store.
#[derive(Debug, Default)]
pub(super) struct Objects {
    pub(super) objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, Upload>,
    last_upload: u32,
}

/// A request, as far as the store looks at it.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) method: Method,
    /// `/bucket/key`, without encoding.
    pub(super) key: String,
    pub(super) query: BTreeMap<String, String>,
    pub(super) range: Option<String>,
    pub(super) if_match: Option<String>,
    pub(super) creates: bool,
    pub(super) body: Bytes,
}

/// A reply.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Bytes,
}

impl Answer {
    fn new(status: u16, body: impl Into<Bytes>) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or_default();
        Self { status, headers: Vec::new(), body: body.into() }
    }

    pub(super) fn error(status: u16, code: &str) -> Self {
        let body =
            format!("<Error><Code>{code}</Code><Message>As the test wants.</Message></Error>");
        Self::new(status, body)
    }

    /// What a proxy says that wants its user to log in.
    pub(super) fn page() -> Self {
        Self::new(200, "<html><body>Welcome to this network!</body></html>")
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl Objects {
    pub(super) fn put(&mut self, key: &str, data: Bytes) {
        self.objects.insert(key.to_owned(), Object::new(data));
    }

    pub(super) fn put_all(&mut self, all: impl IntoIterator<Item = (String, Bytes)>) {
        let mut last: Option<Object> = None;
        for (key, data) in all {
            let is_same = |it: &Object| it.data.as_ptr() == data.as_ptr();
            let object = last.take().filter(is_same).unwrap_or_else(|| Object::new(data.clone()));
            last = Some(object.clone());
            self.objects.insert(key, object);
        }
    }

    pub(super) fn uploads(&self) -> Vec<String> {
        self.uploads.keys().cloned().collect()
    }

    /// Begins an upload so many seconds ago.
    pub(super) fn begin_upload(&mut self, key: &str, ago: u64) -> String {
        self.last_upload += 1;
        let id = format!("upload&{}", self.last_upload);
        let begun = NOW.saturating_sub(ago);
        let upload = Upload { key: key.to_owned(), parts: BTreeMap::new(), begun };
        self.uploads.insert(id.clone(), upload);
        id
    }

    pub(super) fn put_first_part(&mut self, key: &str, id: &str, data: Bytes) {
        if let Some(upload) = self.uploads.get_mut(id).filter(|upload| upload.key == key) {
            upload.parts.insert(1, Object::new(data));
        }
    }

    pub(super) fn forget_uploads(&mut self) {
        self.uploads.clear();
    }

    pub(super) fn answer(&mut self, request: &Parsed) -> Answer {
        let query = |name: &str| request.query.get(name).map(String::as_str);
        let upload = query("uploadId");
        match request.method {
            Method::GET if query("list-type").is_some() => self.list(request),
            Method::GET if query("uploads").is_some() => self.list_uploads(request),
            Method::GET if upload.is_some() => self.list_parts(upload.unwrap_or_default()),
            Method::GET | Method::HEAD => self.get(request),
            Method::PUT if upload.is_some() => self.put_part(request, upload.unwrap_or_default()),
            Method::PUT if request.creates && self.objects.contains_key(&request.key) => {
                Answer::error(412, "PreconditionFailed")
            }
            Method::PUT => {
                self.put(&request.key, request.body.clone());
                Answer::new(200, "").with("etag", self.objects[&request.key].etag.clone())
            }
            Method::POST if query("uploads").is_some() => self.begin(request),
            Method::POST if upload.is_some() && !self.is_expected(request) => {
                Answer::error(412, "PreconditionFailed")
            }
            Method::POST if upload.is_some() => self.complete(request, upload.unwrap_or_default()),
            Method::POST if query("delete").is_some() => self.delete_many(request),
            Method::DELETE if upload.is_some() => {
                self.uploads.remove(upload.unwrap_or_default());
                Answer::new(204, "")
            }
            Method::DELETE => {
                self.objects.remove(&request.key);
                Answer::new(204, "")
            }
            _ => Answer::error(405, "MethodNotAllowed"),
        }
    }

    /// Returns whether the conditions for a write are fulfilled.
    fn is_expected(&self, request: &Parsed) -> bool {
        match (self.objects.get(&request.key), &request.if_match) {
            (Some(object), Some(etag)) => object.etag == *etag,
            (None, Some(_)) => false,
            (object, None) => object.is_none() || !request.creates,
        }
    }

    fn get(&self, request: &Parsed) -> Answer {
        let Some(object) = self.objects.get(&request.key) else {
            return Answer::error(404, "NoSuchKey");
        };
        if request.if_match.as_ref().is_some_and(|etag| *etag != object.etag) {
            return Answer::error(412, "PreconditionFailed");
        }
        let length = object.data.len();
        let answer = match request.range.as_deref().and_then(|range| bounds(range, length)) {
            Some(range) => {
                let shown = format!("bytes {}-{}/{length}", range.start, range.end.max(1) - 1);
                Answer::new(206, object.data.slice(range)).with("content-range", shown)
            }
            None if request.range.is_some() => return Answer::error(416, "InvalidRange"),
            None => Answer::new(200, object.data.clone()),
        };
        answer
            .with("etag", object.etag.clone())
            .with("last-modified", "Fri, 27 Nov 2026 10:00:00 GMT")
    }

    fn list(&self, request: &Parsed) -> Answer {
        let prefix = request.query.get("prefix").map_or("", String::as_str);
        let bucket = format!("{}/", request.key.trim_end_matches('/'));
        let after = request.query.get("continuation-token");
        let after = after.or_else(|| request.query.get("start-after")).map_or("", String::as_str);
        let delimiter = request.query.get("delimiter").map(String::as_str);
        let most = request.query.get("max-keys").and_then(|most| most.parse().ok());
        let most = most.unwrap_or(1000_usize);
        let (mut items, mut groups) = (Vec::new(), Vec::new());
        let mut last = None;
        let first = format!("{bucket}{}", after.max(prefix));
        for (key, object) in self.objects.range(first..) {
            let Some(key) = key.strip_prefix(&bucket).filter(|key| key.starts_with(prefix)) else {
                break;
            };
            if key <= after {
                continue;
            }
            if items.len() + groups.len() == most {
                last = items.last().or(groups.last()).cloned();
                break;
            }
            match delimiter.and_then(|end| key[prefix.len()..].split_once(end)) {
                Some((group, _)) => {
                    let group = format!("{prefix}{group}/");
                    if groups.last() != Some(&group) {
                        groups.push(group);
                    }
                }
                None => items.push(format!("{key}|{}|{}", object.data.len(), object.etag)),
            }
        }
        let mut xml = format!(
            "<ListBucketResult><IsTruncated>{}</IsTruncated>",
            if last.is_some() { "true" } else { "false" }
        );
        for item in items {
            let mut parts = item.split('|');
            let mut next = || parts.next().unwrap_or_default();
            xml += &format!(
                "<Contents><Key>{}</Key><Size>{}</Size><ETag>{}</ETag><LastModified>\
                 2026-11-27T10:00:00.000Z</LastModified></Contents>",
                next(),
                next(),
                next()
            );
        }
        for group in groups {
            xml += &format!("<CommonPrefixes><Prefix>{group}</Prefix></CommonPrefixes>");
        }
        if let Some(last) = last {
            let last = last.split('|').next().unwrap_or_default();
            xml += &format!("<NextContinuationToken>{last}</NextContinuationToken>");
        }
        Answer::new(200, xml + "</ListBucketResult>")
    }

    fn list_uploads(&self, request: &Parsed) -> Answer {
        let prefix = request.query.get("prefix").map_or("", String::as_str);
        let bucket = format!("{}/", request.key.trim_end_matches('/'));
        let mut xml = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>".to_owned();
        for (id, upload) in &self.uploads {
            let key = upload.key.strip_prefix(&bucket).filter(|key| key.starts_with(prefix));
            let Some(key) = key else { continue };
            xml += &format!(
                "<Upload><Key>{key}</Key><UploadId>{}</UploadId><Initiator><ID>a</ID></Initiator>\
                 <Initiated>{}</Initiated></Upload>",
                id.replace('&', "&amp;"),
                DateTime::from_timestamp(upload.begun as i64, 0)
                    .map(|begun| begun.to_rfc3339_opts(SecondsFormat::Millis, true))
                    .unwrap_or_default()
            );
        }
        Answer::new(200, xml + "</ListMultipartUploadsResult>").with("date", NOW_TEXT)
    }

    fn list_parts(&self, id: &str) -> Answer {
        let Some(upload) = self.uploads.get(id) else {
            return Answer::error(404, "NoSuchUpload");
        };
        let parts: String = upload
            .parts
            .keys()
            .map(|number| format!("<Part><PartNumber>{number}</PartNumber></Part>"))
            .collect();
        Answer::new(
            200,
            format!("<ListPartsResult><IsTruncated>false</IsTruncated>{parts}</ListPartsResult>"),
        )
    }

    fn begin(&mut self, request: &Parsed) -> Answer {
        let id = self.begin_upload(&request.key, 0).replace('&', "&amp;");
        let body = format!(
            "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
        );
        Answer::new(200, body)
    }

    fn put_part(&mut self, request: &Parsed, id: &str) -> Answer {
        let number = request.query.get("partNumber").and_then(|number| number.parse().ok());
        match (self.uploads.get_mut(id), number) {
            (Some(upload), Some(number)) if upload.key == request.key => {
                let part = Object::new(request.body.clone());
                let etag = part.etag.clone();
                upload.parts.insert(number, part);
                Answer::new(200, "").with("etag", etag)
            }
            _ => Answer::error(404, "NoSuchUpload"),
        }
    }

    fn complete(&mut self, request: &Parsed, id: &str) -> Answer {
        let Some(upload) = self.uploads.get(id) else {
            return Answer::error(404, "NoSuchUpload");
        };
        let text = String::from_utf8_lossy(&request.body);
        let (mut data, mut sums, mut count) = (Vec::new(), Vec::new(), 0);
        for part in text.split("<Part>").skip(1) {
            let number = part.split("<PartNumber>").nth(1);
            let number = number.and_then(|rest| rest.split('<').next()?.parse::<u32>().ok());
            let Some(part_there) = number.and_then(|number| upload.parts.get(&number)) else {
                return Answer::error(400, "InvalidPart");
            };
            if !part.contains(part_there.etag.trim_matches('"')) {
                return Answer::error(400, "InvalidPart");
            }
            data.extend_from_slice(&part_there.data);
            if let Ok(sum) = hash(MessageDigest::md5(), &part_there.data) {
                sums.extend_from_slice(&sum);
            }
            count += 1;
        }
        let etag = format!("\"{}-{count}\"", md5_hex(&sums));
        self.objects.insert(upload.key.clone(), Object { data: data.into(), etag: etag.clone() });
        self.uploads.remove(id);
        let etag = etag.replace('"', "&quot;");
        let body = format!(
            "<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        );
        Answer::new(200, body)
    }

    fn delete_many(&mut self, request: &Parsed) -> Answer {
        let text = String::from_utf8_lossy(&request.body);
        let mut body = "<DeleteResult>".to_owned();
        for part in text.split("<Key>").skip(1) {
            let key = part.split("</Key>").next().unwrap_or_default();
            self.objects.remove(&format!("{}/{key}", request.key.trim_end_matches('/')));
            body += &format!("<Deleted><Key>{key}</Key></Deleted>");
        }
        Answer::new(200, body + "</DeleteResult>")
    }
}

/// The bytes of a range (RFC 9110, section 14.1.2); `None` if there are none.
fn bounds(range: &str, length: usize) -> Option<std::ops::Range<usize>> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = match first {
        "" => (length.saturating_sub(last.parse().ok()?), ""),
        first => (first.parse().ok()?, last),
    };
    let end = last.parse().map_or(length, |last: usize| last.saturating_add(1).min(length));
    (first < end).then_some(first..end)
}

pub(super) fn md5_hex(data: &[u8]) -> String {
    hash(MessageDigest::md5(), data).map_or_else(|_| String::new(), |digest| hex(&digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_a_start_and_an_end_or_a_length() {
        for (range, expected) in [
            ("bytes=2-3", Some(2..4)),
            ("bytes=2-", Some(2..10)),
            ("bytes=2-99", Some(2..10)),
            ("bytes=-3", Some(7..10)),
            ("bytes=-99", Some(0..10)),
            ("bytes=-0", None),
            ("bytes=10-", None),
            ("bytes=-", None),
        ] {
            assert_eq!(bounds(range, 10), expected, "{range}");
        }
    }
}
