//! The rules of metadata contexts (section "Metadata querying"): matching queries with contexts,
//! and numbering contexts.

use std::collections::HashSet;

use bytes::Bytes;

use crate::codec::Reader;
use crate::limits::{MAX_META_CONTEXT_QUERIES, MAX_STRING_LEN};
use crate::wire::{MetaContextId, MetaContextName, MetaContextQuery, OptionReplyType};

/// The selection made by SET_META_CONTEXT. It applies to a GO or EXPORT_NAME with the same name
/// only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Selection {
    pub(super) export_name: String,
    pub(super) contexts: Vec<(MetaContextId, MetaContextName)>,
}

/// Returns the contexts in force for `export_name`.
pub(super) fn contexts_for(
    selection: Option<Selection>,
    export_name: &str,
) -> Vec<(MetaContextId, MetaContextName)> {
    match selection {
        Some(selection) if selection.export_name == export_name => selection.contexts,
        _ => Vec::new(),
    }
}

/// Numbers the contexts of an export: 0 `base:allocation`, 1 `qemu:allocation-depth`, from 2 on the
/// others in the export's order. A repeated name counts once.
pub(super) fn number_contexts(
    available: &[MetaContextName],
) -> impl Iterator<Item = (MetaContextId, &MetaContextName)> {
    let mut next_id = 2_u32;
    let mut seen = HashSet::new();
    available.iter().filter(move |name| seen.insert(name.as_str())).map(move |name| {
        let id = match name.as_str() {
            MetaContextName::BASE_ALLOCATION => 0,
            MetaContextName::QEMU_ALLOCATION_DEPTH => 1,
            _ => {
                let id = next_id;
                next_id = next_id.saturating_add(1);
                id
            }
        };
        (MetaContextId(id), name)
    })
}

/// The payload of LIST_META_CONTEXT or SET_META_CONTEXT, checked.
///
/// ```text
/// | name length u32 | name | number of queries u32 | length u32, query | ...
/// ```
#[derive(Debug, Clone)]
pub(super) struct MetaContextQuestion {
    pub(super) export_name: String,
    /// The queries as received: kept as bytes, so that many short ones cost no extra memory.
    queries: Bytes,
    pub(super) is_empty: bool,
}

impl MetaContextQuestion {
    /// Decodes a payload. On failure returns the error reply and its reason.
    pub(super) fn parse(payload: &Bytes) -> Result<Self, (OptionReplyType, &'static str)> {
        const TRUNCATED: (OptionReplyType, &str) =
            (OptionReplyType::ERR_INVALID, "the option is shorter than its length fields say");
        let mut reader = Reader::new(payload);
        let export_name = export_name(&mut reader)?;
        let count = reader.u32().ok_or(TRUNCATED)?;
        let queries = payload.slice_ref(reader.rest());
        if count as usize > MAX_META_CONTEXT_QUERIES {
            return Err((OptionReplyType::ERR_TOO_BIG, "there are too many queries"));
        }
        for _ in 0..count {
            let length = reader.u32().ok_or(TRUNCATED)? as usize;
            let query = reader.bytes(length).ok_or(TRUNCATED)?;
            // Longer than any context name: it matches nothing.
            if length <= MAX_STRING_LEN
                && (query.contains(&0) || std::str::from_utf8(query).is_err())
            {
                return Err((
                    OptionReplyType::ERR_INVALID,
                    "a query is not UTF-8 or contains a NUL byte",
                ));
            }
        }
        if !reader.is_empty() {
            return Err((OptionReplyType::ERR_INVALID, "there are bytes after the last query"));
        }
        Ok(Self { export_name, queries, is_empty: count == 0 })
    }

    /// The queries that can match a context.
    fn queries(&self) -> HashSet<&str> {
        let mut reader = Reader::new(&self.queries);
        let mut queries = HashSet::new();
        while let Some(length) = reader.u32() {
            let Some(query) = reader.bytes(length as usize) else { break };
            if query.len() > MAX_STRING_LEN {
                continue;
            }
            if let Ok(query) = std::str::from_utf8(query) {
                queries.insert(query);
            }
        }
        queries
    }

    /// The contexts that answer LIST_META_CONTEXT: all of them if there is no query.
    pub(super) fn listed<'a>(
        &self,
        available: &'a [MetaContextName],
    ) -> Vec<(MetaContextId, &'a MetaContextName)> {
        let queries = self.queries();
        let wildcards: Vec<MetaContextQuery<'_>> = MetaContextQuery::WILDCARDS
            .into_iter()
            .filter(|wildcard| queries.contains(wildcard))
            .map(MetaContextQuery::new)
            .collect();
        number_contexts(available)
            .filter(|(_, name)| {
                self.is_empty
                    || queries.contains(name.as_str())
                    || wildcards.iter().any(|wildcard| wildcard.lists(name))
            })
            .collect()
    }

    /// The contexts that SET_META_CONTEXT selects: those queried by their full name.
    pub(super) fn selected(
        &self,
        available: &[MetaContextName],
    ) -> Vec<(MetaContextId, MetaContextName)> {
        let queries = self.queries();
        number_contexts(available)
            .filter(|(_, name)| queries.contains(name.as_str()))
            .map(|(id, name)| (id, name.clone()))
            .collect()
    }
}

/// Reads an export name with its length in front.
pub(super) fn export_name(
    reader: &mut Reader<'_>,
) -> Result<String, (OptionReplyType, &'static str)> {
    let length = reader
        .u32()
        .ok_or((OptionReplyType::ERR_INVALID, "the option is too short for a name length"))?;
    let name = usize::try_from(length)
        .ok()
        .and_then(|length| reader.bytes(length))
        .ok_or((OptionReplyType::ERR_INVALID, "the name length is larger than the option"))?;
    if name.len() > MAX_STRING_LEN {
        return Err((OptionReplyType::ERR_INVALID, "the export name is longer than 4096 bytes"));
    }
    match std::str::from_utf8(name) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err((
            OptionReplyType::ERR_INVALID,
            "the export name is not UTF-8 or contains a NUL byte",
        )),
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;

    use super::*;

    fn question(name: &str, queries: &[&[u8]]) -> Bytes {
        let mut payload = Vec::new();
        payload.put_u32(name.len() as u32);
        payload.put_slice(name.as_bytes());
        payload.put_u32(queries.len() as u32);
        for query in queries {
            payload.put_u32(query.len() as u32);
            payload.put_slice(query);
        }
        payload.into()
    }

    fn names(texts: &[&str]) -> Vec<MetaContextName> {
        texts.iter().map(|text| MetaContextName::new(*text).unwrap()).collect()
    }

    #[test]
    fn numbers_are_fixed_for_the_two_well_known_contexts() {
        let available = names(&[
            "qemu:dirty-bitmap:b0",
            "qemu:allocation-depth",
            "x-thing:a",
            "base:allocation",
            "x-thing:a",
            "qemu:dirty-bitmap:b1",
        ]);
        let numbered: Vec<(u32, &str)> =
            number_contexts(&available).map(|(id, name)| (id.0, name.as_str())).collect();
        assert_eq!(
            numbered,
            [
                (2, "qemu:dirty-bitmap:b0"),
                (1, "qemu:allocation-depth"),
                (3, "x-thing:a"),
                (0, "base:allocation"),
                (4, "qemu:dirty-bitmap:b1"),
            ]
        );
    }

    #[test]
    fn duplicate_overlong_and_foreign_queries_do_no_harm() {
        let available = names(&["base:allocation", "qemu:dirty-bitmap:b0"]);
        let long = vec![b'x'; MAX_STRING_LEN + 1];
        let asked: [&[u8]; 6] = [
            b"base:allocation",
            b"base:allocation",
            &long,
            b"other:thing",
            b"",
            b"qemu:dirty-bitmap:",
        ];
        let question = MetaContextQuestion::parse(&question("disk", &asked)).unwrap();
        assert_eq!(question.export_name, "disk");
        let selected = question.selected(&available);
        assert_eq!(selected.len(), 1, "a wildcard never selects, a duplicate counts once");
        assert_eq!(selected[0].0, MetaContextId(0));
        assert_eq!(question.listed(&available).len(), 2, "the wildcard lists the bitmap");
    }

    #[test]
    fn no_query_lists_all_and_selects_nothing() {
        let available = names(&["base:allocation", "qemu:allocation-depth"]);
        let question = MetaContextQuestion::parse(&question("", &[])).unwrap();
        assert_eq!(question.listed(&available).len(), 2);
        assert!(question.selected(&available).is_empty());
    }

    #[test]
    fn a_payload_that_contradicts_itself_is_invalid() {
        let good = question("a", &[b"base:"]);
        for end in 0..good.len() {
            let answer = MetaContextQuestion::parse(&good.slice(..end)).unwrap_err();
            assert_eq!(answer.0, OptionReplyType::ERR_INVALID, "cut at {end}");
        }
        let mut longer = good.to_vec();
        longer.push(0);
        assert!(MetaContextQuestion::parse(&longer.into()).is_err());
        assert!(MetaContextQuestion::parse(&question("a", &[b"base:\0"])).is_err());
        assert!(MetaContextQuestion::parse(&question("a", &[&[0xff]])).is_err());
        assert!(MetaContextQuestion::parse(&question(&"n".repeat(4097), &[])).is_err());
    }

    #[test]
    fn a_selection_belongs_to_the_export_it_was_made_for() {
        let selection = || {
            Some(Selection {
                export_name: "a".into(),
                contexts: vec![(MetaContextId(0), MetaContextName::base_allocation())],
            })
        };
        assert_eq!(contexts_for(selection(), "a").len(), 1);
        assert!(contexts_for(selection(), "b").is_empty());
        assert!(contexts_for(selection(), "").is_empty(), "the default export has its own name");
        assert!(contexts_for(None, "a").is_empty());
    }
}
