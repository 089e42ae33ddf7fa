//! Redirects (RFC 9110, sections 10.2.2 and 15.4).

use hyper::header::{AUTHORIZATION, COOKIE, HOST, HeaderValue, PROXY_AUTHORIZATION};
use hyper::{StatusCode, Uri};
use object_store::client::{HttpError, HttpErrorKind, HttpRequest};

use super::connection::Origin;
use super::failure::failed;

pub(super) fn is_redirect(status: StatusCode) -> bool {
    [301, 302, 303, 307, 308].contains(&status.as_u16())
}

/// Changes a request to one for the address that a redirect names. Another server gets no secrets.
pub(super) fn follow(
    request: &mut HttpRequest,
    location: Option<&HeaderValue>,
) -> Result<(), HttpError> {
    let to = redirected(request.uri(), location)?;
    let is_elsewhere = Origin::of(request.uri())? != Origin::of(&to)?;
    *request.uri_mut() = to;
    let headers = request.headers_mut();
    headers.remove(HOST);
    if is_elsewhere {
        for secret in [AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION] {
            headers.remove(secret);
        }
    }
    Ok(())
}

/// The address that a redirect names. From HTTPS it does not lead to HTTP.
fn redirected(from: &Uri, location: Option<&HeaderValue>) -> Result<Uri, HttpError> {
    let refused = |why| failed(HttpErrorKind::Decode, why);
    let to = location.and_then(|value| resolved(from, value.to_str().ok()?));
    let to = to.ok_or_else(|| refused("the server redirects to a malformed address"))?;
    if to.authority().is_none_or(|authority| authority.as_str().contains('@')) {
        return Err(refused("the server redirects to an address with a user or without a host"));
    }
    match (from.scheme_str(), to.scheme_str()) {
        (Some("https"), Some("http")) => {
            Err(refused("the server redirects from https to an address without TLS"))
        }
        (_, Some("http" | "https")) => Ok(to),
        _ => Err(refused("the server redirects to an address that is not of HTTP")),
    }
}

/// Resolves a reference against the address of its reply (RFC 3986, section 5.2).
fn resolved(from: &Uri, reference: &str) -> Option<Uri> {
    let reference = reference.split('#').next().unwrap_or_default();
    let (scheme, authority) = (from.scheme_str()?, from.authority()?);
    if has_scheme(reference) {
        return reference.parse().ok();
    }
    if reference.starts_with("//") {
        return format!("{scheme}:{reference}").parse().ok();
    }
    let (path, query) = match reference.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None if reference.is_empty() => ("", from.query()),
        None => (reference, None),
    };
    let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
    let path = match path {
        "" => from.path().to_owned(),
        path if path.starts_with('/') => without_dots(path),
        path => without_dots(&format!("{folder}/{path}")),
    };
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    format!("{scheme}://{authority}{path}{query}").parse().ok()
}

/// Whether a reference begins with a scheme and a colon.
fn has_scheme(reference: &str) -> bool {
    let end = reference.find([':', '/', '?']);
    end.is_some_and(|end| {
        reference[end..].starts_with(':')
            && reference.starts_with(|char: char| char.is_alphabetic())
    })
}

/// Removes the parts `.` and `..` of a path that begins with a slash (RFC 3986, section 5.2.4).
fn without_dots(path: &str) -> String {
    let mut kept = Vec::new();
    let parts = path.strip_prefix('/').unwrap_or(path).split('/');
    let mut is_folder = false;
    for part in parts {
        is_folder = part == "." || part == "..";
        match part {
            "." => {}
            ".." => drop(kept.pop()),
            part => kept.push(part),
        }
    }
    if is_folder {
        kept.push("");
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(from: &'static str, location: &'static str) -> Result<String, String> {
        let from = Uri::from_static(from);
        redirected(&from, Some(&HeaderValue::from_static(location)))
            .map(|uri| uri.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn redirects_lead_to_other_hosts_but_never_out_of_tls() {
        for (location, expected) in [
            ("https://b/y?z", "https://b/y?z"),
            ("//b:8/y", "https://b:8/y"),
            ("/y", "https://a/y"),
            ("/p/../y/.", "https://a/y/"),
            ("y", "https://a/d/y"),
            ("y?z#w", "https://a/d/y?z"),
            ("./y:z", "https://a/d/y:z"),
            ("../../y//u", "https://a/y//u"),
            ("?z=/..", "https://a/d/x?z=/.."),
            ("", "https://a/d/x?q"),
        ] {
            assert_eq!(to("https://a/d/x?q", location).as_deref(), Ok(expected), "{location}");
        }
        assert_eq!(to("http://a/x", "https://a/x"), Ok("https://a/x".to_owned()));
        assert!(to("https://a/x", "http://a/x").unwrap_err().contains("without TLS"));
        assert!(to("http://a/x", "ftp://a/x").unwrap_err().contains("not of HTTP"));
        for bad in ["https://u:p@h/", "//u@h/y"] {
            assert!(to("https://a/x", bad).unwrap_err().contains("with a user"), "{bad}");
        }
        assert!(to("https://a/x", "y:z").is_err());
        assert!(redirected(&Uri::from_static("http://a/"), None).is_err());
    }

    #[test]
    fn another_server_gets_no_secrets() {
        let has = |location: &'static str| {
            let mut request = HttpRequest::new(object_store::client::HttpRequestBody::empty());
            *request.uri_mut() = Uri::from_static("https://a/x");
            for name in [AUTHORIZATION, COOKIE, HOST] {
                request.headers_mut().insert(name, HeaderValue::from_static("s"));
            }
            request.headers_mut().insert("range", HeaderValue::from_static("bytes=0-1"));
            follow(&mut request, Some(&HeaderValue::from_static(location))).unwrap();
            let names = request.headers().keys().map(ToString::to_string);
            names.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        };
        assert_eq!(has("/y"), ["authorization", "cookie", "range"]);
        assert_eq!(has("https://a:443/y"), ["authorization", "cookie", "range"]);
        assert_eq!(has("https://b/y"), ["range"]);
        assert_eq!(has("https://a:8/y"), ["range"]);
    }
}
