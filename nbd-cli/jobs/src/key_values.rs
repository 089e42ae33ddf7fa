//! QEMU's `key=value,key=value` syntax, in which a comma inside a value is doubled, and the
//! equivalent JSON objects.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Options by their dotted names, such as `file.filename`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyValues {
    /// `None` for a JSON null.
    values: BTreeMap<String, Option<String>>,
    /// The names of objects without members, which set nothing.
    empty: BTreeSet<String>,
}

impl KeyValues {
    /// Parses a text. Its first part is the value of `implied` if it has no key.
    ///
    /// # Errors
    ///
    /// A sentence that describes the defect.
    pub fn parse(text: &str, implied: Option<&str>) -> Result<Self, String> {
        if text.starts_with('{') {
            return Self::from_json(text);
        }
        let mut values = BTreeMap::new();
        for (index, part) in split(text).into_iter().enumerate() {
            let (key, value) = match (part.split_once('='), implied) {
                (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
                (None, Some(implied)) if index == 0 => (implied.to_owned(), part),
                // An option without a value is switched on, or off if it begins with "no".
                (None, _) if part == "help" || part == "?" => {
                    return Err("there is no list of the options here; see --help".to_owned());
                }
                (None, _) => (part, "on".to_owned()),
            };
            if key.is_empty() {
                return Err(format!("'{text}': a value has no key"));
            }
            // As in QEMU, the last one counts.
            values.insert(key, Some(value));
        }
        Ok(Self { values, empty: BTreeSet::new() })
    }

    /// Parses a JSON object; nested keys get dotted names.
    ///
    /// # Errors
    ///
    /// A sentence that describes the defect.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let parsed = serde_json::from_str(text);
        // As in QEMU, strings may be in single quotes.
        let parsed = parsed.or_else(|_| serde_json::from_str(&in_double_quotes(text)));
        let value: Value = parsed.map_err(|_| "this is not valid JSON".to_owned())?;
        let Value::Object(_) = value else {
            return Err("the JSON text is not an object".to_owned());
        };
        let mut parsed = Self::default();
        flatten(String::new(), value, &mut parsed);
        Ok(parsed)
    }

    /// Sets the value of a key.
    pub fn set(&mut self, key: &str, value: String) {
        self.values.insert(key.to_owned(), Some(value));
    }

    /// Removes a key and returns its value. A null counts as no value.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.values.remove(key).flatten()
    }

    /// Returns the value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key)?.as_deref()
    }

    /// Removes a key whose value is null, and returns whether there was one.
    pub fn take_null(&mut self, key: &str) -> bool {
        let is_null = self.values.get(key).is_some_and(Option::is_none);
        if is_null {
            self.values.remove(key);
        }
        is_null
    }

    /// Removes a key whose value is an object without members, and returns whether there was one.
    pub fn take_empty(&mut self, key: &str) -> bool {
        self.empty.remove(key)
    }

    /// Returns whether a key has this value.
    pub fn has(&self, key: &str, value: &str) -> bool {
        self.values.get(key).is_some_and(|found| found.as_deref() == Some(value))
    }

    /// Returns whether there is such a key.
    pub fn has_key(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Removes all keys that begin with `prefix` and a dot, and returns them without that prefix.
    pub fn take_below(&mut self, prefix: &str) -> Self {
        let dotted = format!("{prefix}.");
        let (below, rest) = std::mem::take(&mut self.values)
            .into_iter()
            .partition(|(key, _)| key.starts_with(&dotted));
        self.values = rest;
        let below: BTreeMap<String, Option<String>> = below;
        let strip =
            |(key, value): (String, Option<String>)| (key[dotted.len()..].to_owned(), value);
        let empty = self.empty.iter().filter_map(|key| key.strip_prefix(&dotted)).map(Into::into);
        let empty = empty.collect();
        self.empty.retain(|key| !key.starts_with(&dotted));
        Self { values: below.into_iter().map(strip).collect(), empty }
    }

    /// Removes a key and returns its value `on` or `off` (or a synonym).
    ///
    /// # Errors
    ///
    /// A sentence if it is neither.
    pub fn take_switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(other) => Err(format!("Parameter '{key}' expects 'on' or 'off', not '{other}'")),
        }
    }

    /// Returns one of the remaining keys.
    pub fn left_over(&self) -> Option<&str> {
        self.values.keys().next().map(String::as_str)
    }

    /// Returns whether no key is left.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// Splits at commas; two commas stand for one in the text.
fn split(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character != ',' {
            part.push(character);
        } else if characters.next_if_eq(&',').is_some() {
            part.push(',');
        } else {
            parts.push(std::mem::take(&mut part));
        }
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// Puts strings that are in single quotes into double ones.
fn in_double_quotes(text: &str) -> String {
    let (mut result, mut end) = (String::new(), None);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (letter, end) {
            ('\\', Some(_)) => match letters.next() {
                Some('\'') => result.push('\''),
                escaped => result.extend(['\\'].into_iter().chain(escaped)),
            },
            ('"', Some('\'')) => result.push_str("\\\""),
            ('"' | '\'', None) => {
                end = Some(letter);
                result.push('"');
            }
            (letter, Some(quote)) if letter == quote => {
                end = None;
                result.push('"');
            }
            _ => result.push(letter),
        }
    }
    result
}

/// The JSON parser bounds the depth of recursion.
fn flatten(prefix: String, value: Value, into: &mut KeyValues) {
    let below = |key: &str| match prefix.as_str() {
        "" => key.to_owned(),
        prefix => format!("{prefix}.{key}"),
    };
    let values = &mut into.values;
    match value {
        Value::Object(members) if members.is_empty() => drop(into.empty.insert(prefix)),
        Value::Object(members) => {
            // As in QEMU, a nested value is stronger than one with a dotted name.
            let (nested, plain): (Vec<_>, Vec<_>) =
                members.into_iter().partition(|(_, value)| value.is_object() || value.is_array());
            for (key, value) in plain.into_iter().chain(nested) {
                flatten(below(&key), value, into);
            }
        }
        Value::Array(members) => {
            for (index, value) in members.into_iter().enumerate() {
                flatten(below(&index.to_string()), value, into);
            }
        }
        Value::Null => drop(values.insert(prefix, None)),
        Value::Bool(true) => drop(values.insert(prefix, Some("on".to_owned()))),
        Value::Bool(false) => drop(values.insert(prefix, Some("off".to_owned()))),
        Value::Number(number) => drop(values.insert(prefix, Some(number.to_string()))),
        Value::String(text) => drop(values.insert(prefix, Some(text))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_json_may_be_in_single_quotes() {
        let parsed =
            KeyValues::from_json(r#"{'driver': 'raw', 'file': {"filename": 'a"\'\\b'}}"#).unwrap();
        assert_eq!(parsed.get("driver"), Some("raw"));
        assert_eq!(parsed.get("file.filename"), Some("a\"'\\b"));
        let parsed = KeyValues::from_json(r#"{"filename": "it's", 'b': 'it'}"#).unwrap();
        assert_eq!(parsed.get("filename"), Some("it's"));
        for wrong in ["{'a': 'b}", "{'a': \"b'}", "{'a' 'b'}", "{'a': '\\"] {
            assert!(KeyValues::from_json(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn commas_inside_values_are_doubled() {
        let text = "authz-simple,id=a,identity=CN=laptop,,O=Example Org,,C=GB,on-alone";
        let mut parsed = KeyValues::parse(text, Some("qom-type")).unwrap();
        assert_eq!(parsed.take("qom-type").as_deref(), Some("authz-simple"));
        assert_eq!(parsed.take("identity").as_deref(), Some("CN=laptop,O=Example Org,C=GB"));
        assert_eq!(parsed.take_switch("on-alone"), Ok(Some(true)));
        assert_eq!(parsed.left_over(), Some("id"));
    }

    #[test]
    fn json_and_text_give_the_same_options() {
        let text = "driver=raw,file.driver=file,file.locking=on,list.0=7";
        let json = r#"{"driver":"raw","file":{"driver":"file","locking":true},"list":[7]}"#;
        assert_eq!(KeyValues::parse(json, None), KeyValues::parse(text, None));
        let both = r#"{"driver":"raw","file":{"driver":"file","locking":true},"list.0":7,
                      "file.driver":"nbd"}"#;
        assert_eq!(KeyValues::from_json(both), KeyValues::parse(text, None));
        assert!(KeyValues::parse("{bad", None).is_err());
        let mut options = KeyValues::parse(text, None).unwrap();
        let mut file = options.take_below("file");
        assert_eq!(file.take("driver").as_deref(), Some("file"));
        assert_eq!(file.take("locking").as_deref(), Some("on"));
        assert!(file.is_empty());
    }
}
