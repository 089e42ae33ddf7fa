//! The files `~/.aws/credentials` and `~/.aws/config`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use crate::error::{Result, StoreError};
use crate::shown::shown;

/// Largest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// The settings of a section, in lower case; those below a setting have its name and a dot before
/// them.
pub(super) type Section = BTreeMap<String, String>;

/// The sections of a file.
#[derive(Default)]
pub(super) struct Ini(BTreeMap<String, Section>);

impl Ini {
    /// Reads a file that the user names. A file that does not exist is empty.
    pub(super) fn read(path: &Path) -> Result<Self> {
        Self::load(path, &[])
    }

    /// Reads a file at its usual place, where a service often may not look: then it is empty.
    pub(super) fn read_usual(path: &Path) -> Result<Self> {
        Self::load(path, &[io::ErrorKind::NotADirectory, io::ErrorKind::PermissionDenied])
    }

    fn load(path: &Path, absent: &[io::ErrorKind]) -> Result<Self> {
        let unreadable = |why: &str| {
            let why = shown(why);
            StoreError::invalid(format!("cannot read '{}': {why}", path.display()))
        };
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut text));
        match read {
            Ok(_) if text.len() as u64 > FILE_MAX => Err(unreadable("it is too long")),
            // Comments are in any encoding; keys and names that matter are of ASCII.
            Ok(_) => Ok(Self::parse(&String::from_utf8_lossy(&text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) if absent.contains(&error.kind()) => {
                let error = unreadable(&error.to_string());
                tracing::debug!(%error, "a file of profiles is left out");
                Ok(Self::default())
            }
            Err(error) => Err(unreadable(&error.to_string())),
        }
    }

    fn parse(text: &str) -> Self {
        let mut sections = BTreeMap::<_, Section>::new();
        let mut section = String::new();
        let mut above = String::new();
        for line in text.lines() {
            let content = uncommented(line);
            if content.is_empty() {
                continue;
            }
            if let Some(name) = content.strip_prefix('[') {
                section = unquoted(name.split(']').next().unwrap_or_default().trim());
                sections.entry(section.clone()).or_default();
                above.clear();
                continue;
            }
            let Some((name, value)) = content.split_once('=') else { continue };
            let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
            let is_below = line.starts_with([' ', '\t']) && !above.is_empty();
            let name = match is_below {
                true => format!("{above}.{name}"),
                false => name,
            };
            if !is_below {
                above = if value.is_empty() { name.clone() } else { String::new() };
            }
            sections.entry(section.clone()).or_default().insert(name, value.to_owned());
        }
        Self(sections)
    }

    /// Returns the section of a profile: `[name]`, or `[profile name]`.
    pub(super) fn profile(&self, name: &str) -> Option<&Section> {
        self.0.get(&format!("profile {name}")).or_else(|| self.0.get(name))
    }
}

/// The name of a section. After the word of profiles, quotes are those of a shell.
fn unquoted(section: &str) -> String {
    let name = section.strip_prefix("profile").filter(|name| name.starts_with([' ', '\t']));
    let Some(name) = name.map(str::trim) else { return section.to_owned() };
    let inner = ['"', '\''].iter().find_map(|quote| {
        let inner = name.strip_prefix(*quote)?.strip_suffix(*quote)?;
        Some(inner).filter(|inner| !inner.contains(*quote))
    });
    format!("profile {}", inner.unwrap_or(name))
}

/// A line without its comment, which begins at the start or after a blank.
fn uncommented(line: &str) -> &str {
    let trimmed = line.trim();
    if trimmed.starts_with(['#', ';']) {
        return "";
    }
    let ends = [" #", " ;", "\t#", "\t;"].iter().filter_map(|start| trimmed.find(start));
    match ends.min() {
        Some(end) => trimmed[..end].trim_end(),
        None => trimmed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_found_with_and_without_their_word() {
        let text = "; comment\n[default]\naws_access_key_id=A # mine\nAWS_secret_access_key = b#c=\n\
                    [profile other]\nregion = eu-1\ns3 =\n  addressing_style = path\noutput = json\n";
        let ini = Ini::parse(text);
        let default = ini.profile("default").unwrap();
        assert_eq!(default["aws_access_key_id"], "A");
        assert_eq!(default["aws_secret_access_key"], "b#c=");
        let other = ini.profile("other").unwrap();
        assert_eq!((&*other["region"], &*other["s3.addressing_style"]), ("eu-1", "path"));
        assert_eq!(other["output"], "json");
        assert!(ini.profile("none").is_none());
    }

    #[test]
    fn quotes_around_the_name_of_a_profile_are_not_of_the_name() {
        let ini = Ini::parse("[profile \"my prof\"]\na=1\n[profile\t'b']\na=2\n[profile c]\na=3");
        let of = |name: &str| ini.profile(name).map(|section| section["a"].clone());
        assert_eq!(of("my prof").as_deref(), Some("1"));
        assert_eq!(of("b").as_deref(), Some("2"));
        assert_eq!(of("c").as_deref(), Some("3"));
    }

    #[test]
    fn comment_in_another_encoding_is_skipped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"# caf\xe9\n[a]\nb=c\n").unwrap();
        assert_eq!(Ini::read(file.path()).unwrap().profile("a").unwrap()["b"], "c");
    }

    #[test]
    fn nonsense_is_skipped_and_a_missing_file_is_empty() {
        assert!(Ini::parse("x\n = \n[\n]]\n=\n[a\nb").profile("a").is_some());
        assert!(Ini::read(Path::new("/nonexistent/aws")).unwrap().0.is_empty());
    }
}
