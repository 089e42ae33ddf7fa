//! The files `~/.aws/credentials` and `~/.aws/config`.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::error::{Result, StoreError};

/// Largest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// The settings of each section, in lower case; those below a setting have its name and a dot before
/// them.
#[derive(Default)]
pub(super) struct Ini(BTreeMap<String, BTreeMap<String, String>>);

impl Ini {
    /// Reads a file. A file that does not exist is empty.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let unreadable = |why: &str| {
            let why = why.split(" (os error").next().unwrap_or_default();
            StoreError::invalid(format!("cannot read '{}': {why}", path.display()))
        };
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > FILE_MAX => return Err(unreadable("it is too long")),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(unreadable(&error.to_string())),
        }
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(&error.to_string()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut sections = BTreeMap::<_, BTreeMap<_, _>>::new();
        let mut section = String::new();
        let mut above = String::new();
        for line in text.lines() {
            let content = uncommented(line);
            if content.is_empty() {
                continue;
            }
            if let Some(name) = content.strip_prefix('[') {
                section = name.split(']').next().unwrap_or_default().trim().to_owned();
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
    pub(super) fn profile(&self, name: &str) -> Option<&BTreeMap<String, String>> {
        self.0.get(&format!("profile {name}")).or_else(|| self.0.get(name))
    }
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
    fn nonsense_is_skipped_and_a_missing_file_is_empty() {
        assert!(Ini::parse("x\n = \n[\n]]\n=\n[a\nb").profile("a").is_some());
        assert!(Ini::read(Path::new("/nonexistent/aws")).unwrap().0.is_empty());
    }
}
