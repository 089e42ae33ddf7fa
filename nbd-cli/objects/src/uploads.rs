//! Uploads that are not complete: the client of the store has no means to list them.

use bytes::{Buf as _, Bytes};
use hyper::header::DATE;
use hyper::{Method, StatusCode};
use object_store::aws::{AwsAuthorizer, AwsCredentialProvider};
use object_store::client::{HttpRequest, HttpRequestBody, HttpService as _};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::calendar::{of_http, of_s3};
use crate::crypto::OpenSsl;
use crate::error::StoreError;
use crate::shown::shown;
use crate::transport::Transport;

/// What a query may not have as it is (RFC 3986, section 2.3).
const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// The same of a path.
const PATH: &AsciiSet = &QUERY.remove(b'/');

/// An upload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Upload {
    pub(crate) id: String,
    /// When it began, by the clock of the store, in seconds since 1970.
    pub(crate) begun: Option<u64>,
    /// Who began it, as the store tells.
    pub(crate) initiator: String,
}

/// The uploads of one key.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listed {
    pub(crate) uploads: Vec<Upload>,
    /// When they were listed, by the clock of the store, in seconds since 1970.
    pub(crate) time: u64,
}

/// Lists the uploads of a bucket.
pub(crate) struct Uploads {
    pub(crate) transport: Transport,
    /// None if requests are not signed.
    pub(crate) credentials: Option<AwsCredentialProvider>,
    pub(crate) region: String,
    /// The address of the bucket.
    pub(crate) bucket: String,
}

impl Uploads {
    /// Lists the uploads of a key. Makes one request; the error is for the log.
    pub(crate) async fn list(&self, key: &str) -> Result<Listed, String> {
        let prefix = utf8_percent_encode(key, QUERY);
        let query = format!("max-uploads=1000&prefix={prefix}&uploads=");
        // A bucket in the name of the host has no path of its own.
        let has_path = self.bucket.split_once("://").is_some_and(|(_, rest)| rest.contains('/'));
        let (body, time) = self.get(if has_path { "" } else { "/" }, &query).await?;
        let time = time.ok_or("the store does not tell its time")?;
        let uploads = uploads(body, key).ok_or("the reply is not a whole list of uploads")?;
        Ok(Listed { uploads, time })
    }

    /// Returns whether an upload has no parts.
    pub(crate) async fn is_empty(&self, key: &str, id: &str) -> Result<bool, String> {
        let path = format!("/{}", utf8_percent_encode(key, PATH));
        let query = format!("max-parts=1&uploadId={}", utf8_percent_encode(id, QUERY));
        let (body, _) = self.get(&path, &query).await?;
        let list: PartList = parsed(body).ok_or("the reply is not a list of parts")?;
        Ok(!list.is_truncated && list.part.is_none())
    }

    async fn get(&self, path: &str, query: &str) -> Result<(Bytes, Option<u64>), String> {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = Method::GET;
        let address = format!("{}{path}?{query}", self.bucket);
        *request.uri_mut() = address.parse().map_err(|_| "the address is malformed")?;
        if let Some(credentials) = &self.credentials {
            let credentials = credentials.get_credential().await;
            let failed = |error| StoreError::of("use", "the credentials", &error).to_string();
            let credentials = credentials.map_err(failed)?;
            let authorizer = AwsAuthorizer::new(&credentials, "s3", &self.region);
            let signed = authorizer.with_crypto(&OpenSsl).try_authorize(&mut request, None);
            signed.map_err(|error| shown(&error.to_string()))?;
        }
        let reply =
            self.transport.call(request).await.map_err(|error| shown(&error.to_string()))?;
        let status = reply.status();
        let time = reply.headers().get(DATE).and_then(|date| of_http(date.to_str().ok()?));
        let body = reply.into_body().bytes().await.map_err(|error| shown(&error.to_string()))?;
        match status {
            StatusCode::OK => Ok((body, time)),
            status => Err(format!("the store answered {status}")),
        }
    }
}

/// A list of uploads in the words of S3.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct UploadList {
    is_truncated: bool,
    #[serde(default, rename = "Upload")]
    uploads: Vec<ListedUpload>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedUpload {
    key: String,
    upload_id: String,
    initiated: Option<String>,
    #[serde(default)]
    initiator: Person,
    #[serde(default)]
    owner: Person,
}

#[derive(Default, Deserialize)]
struct Person {
    #[serde(default, rename = "ID")]
    id: String,
}

/// A list of the parts of an upload.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PartList {
    is_truncated: bool,
    /// One at most is asked for.
    part: Option<IgnoredAny>,
}

/// Parses a reply from the reader that `object_store` uses: another one would be a parser of its
/// own in the program.
fn parsed<T: DeserializeOwned>(body: Bytes) -> Option<T> {
    quick_xml::de::from_reader(body.reader()).ok()
}

/// Reads a list of uploads, of which those of other keys are left out; `None` if it is not a whole
/// one.
fn uploads(body: Bytes, key: &str) -> Option<Vec<Upload>> {
    let list: UploadList = parsed(body)?;
    let own = list.uploads.into_iter().filter(|upload| upload.key == key);
    let upload = |upload: ListedUpload| Upload {
        id: upload.upload_id,
        begun: upload.initiated.as_deref().and_then(of_s3),
        initiator: format!("{} {}", upload.initiator.id, upload.owner.id),
    };
    (!list.is_truncated).then(|| own.map(upload).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(truncated: &str, uploads: &str) -> String {
        format!(
            "<?xml version=\"1.0\"?>\n<ListMultipartUploadsResult xmlns=\"http://s3\"><IsTruncated>\
             {truncated}</IsTruncated>{uploads}</ListMultipartUploadsResult>"
        )
    }

    #[test]
    fn uploads_of_other_keys_are_left_out() {
        let upload = |key: &str, id: &str| {
            format!(
                "<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiator><ID>me</ID></Initiator>\
                 <Owner><ID>us</ID></Owner><Initiated>1970-01-02T00:00:01.000Z</Initiated></Upload>"
            )
        };
        let all = [upload("a&amp;b", "1"), upload("a&amp;b.bak", "2"), upload("a&#38;b", "3&lt;")];
        let text = list("false", &all.concat());
        let read = |text: &str, key| uploads(Bytes::copy_from_slice(text.as_bytes()), key);
        let found = read(&text, "a&b").unwrap();
        let of = |id: &str| Upload {
            id: id.to_owned(),
            begun: Some(86_401),
            initiator: "me us".to_owned(),
        };
        assert_eq!(found, [of("1"), of("3<")]);
        assert_eq!(read(&list("false", ""), "a").unwrap(), []);
        for bad in [
            "",
            "<html>Welcome</html>",
            &list("true", &all.concat()),
            &list("", ""),
            &text[..text.len() - 1],
            &list("false", "<Upload><Key>a</Key>"),
            &list("false", "<Upload><Key>a&b</Key><UploadId>1</UploadId></Upload>"),
        ] {
            assert_eq!(read(bad, "a"), None, "{bad}");
        }
    }

    #[test]
    fn keys_are_encoded_for_addresses() {
        assert_eq!(utf8_percent_encode("a/b c+ü", PATH).to_string(), "a/b%20c%2B%C3%BC");
        assert_eq!(utf8_percent_encode("a/b=&", QUERY).to_string(), "a%2Fb%3D%26");
    }
}
