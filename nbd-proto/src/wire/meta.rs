//! Names, queries and identifiers of metadata contexts (section "Metadata querying").

use crate::codec::protocol_string;
use crate::error::ProtocolError;

/// The number that identifies a selected context in block status chunks. The server chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MetaContextId(pub u32);

/// The full name of one context, such as `base:allocation`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MetaContextName(String);

impl MetaContextName {
    /// `base:allocation`: holes and zeroes.
    pub const BASE_ALLOCATION: &'static str = "base:allocation";
    /// `qemu:allocation-depth`: the layer of a backing chain that holds the data.
    pub const QEMU_ALLOCATION_DEPTH: &'static str = "qemu:allocation-depth";
    /// The prefix of the name of every exported dirty bitmap's context.
    pub const QEMU_DIRTY_BITMAP_PREFIX: &'static str = "qemu:dirty-bitmap:";

    /// Creates a full name: a namespace, a colon and a leaf that is not empty.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::TooLong`] beyond 4096 bytes, [`ProtocolError::Malformed`] if there is a NUL
    /// byte or no namespace, or the leaf is empty.
    pub fn new(name: impl Into<String>) -> Result<Self, ProtocolError> {
        const WHAT: &str = "metadata context name";
        let name = name.into();
        protocol_string(WHAT, name.as_bytes())?;
        match name.split_once(':') {
            Some((namespace, leaf)) if !namespace.is_empty() && !leaf.is_empty() => Ok(Self(name)),
            _ => Err(ProtocolError::Malformed {
                what: WHAT,
                why: "it has to be a namespace, a colon and a name",
            }),
        }
    }

    /// Returns `base:allocation`.
    #[must_use]
    pub fn base_allocation() -> Self {
        Self(Self::BASE_ALLOCATION.to_owned())
    }

    /// Returns `qemu:allocation-depth`.
    #[must_use]
    pub fn qemu_allocation_depth() -> Self {
        Self(Self::QEMU_ALLOCATION_DEPTH.to_owned())
    }

    /// Returns `qemu:dirty-bitmap:` followed by the name of a bitmap.
    ///
    /// # Errors
    ///
    /// As for [`MetaContextName::new`].
    pub fn qemu_dirty_bitmap(bitmap: &str) -> Result<Self, ProtocolError> {
        Self::new(format!("{}{bitmap}", Self::QEMU_DIRTY_BITMAP_PREFIX))
    }

    /// Returns the whole name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name of the bitmap if this is a dirty bitmap's context.
    #[must_use]
    pub fn dirty_bitmap(&self) -> Option<&str> {
        self.0.strip_prefix(Self::QEMU_DIRTY_BITMAP_PREFIX)
    }
}

impl std::fmt::Display for MetaContextName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// One query of LIST_META_CONTEXT or SET_META_CONTEXT.
///
/// A query is a full name or one of the wildcards `base:`, `qemu:` and `qemu:dirty-bitmap:`.
/// Wildcards list contexts; they never select.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetaContextQuery<'a>(&'a str);

impl<'a> MetaContextQuery<'a> {
    /// The wildcards: queries that match more than one context.
    pub const WILDCARDS: [&'static str; 3] =
        ["base:", "qemu:", MetaContextName::QEMU_DIRTY_BITMAP_PREFIX];

    /// Creates a query. Any text is legal; most texts match nothing.
    #[must_use]
    pub const fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// Returns true if LIST_META_CONTEXT answers this query with `name`.
    #[must_use]
    pub fn lists(&self, name: &MetaContextName) -> bool {
        self.selects(name)
            || (Self::WILDCARDS.contains(&self.0) && name.as_str().starts_with(self.0))
    }

    /// Returns true if SET_META_CONTEXT selects `name` for this query. Only a full name selects.
    #[must_use]
    pub fn selects(&self, name: &MetaContextName) -> bool {
        self.0 == name.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_list_but_never_select() {
        let base = MetaContextName::base_allocation();
        let bitmap = MetaContextName::qemu_dirty_bitmap("b0").unwrap();
        for (query, name, lists, selects) in [
            ("base:", &base, true, false),
            ("base:allocation", &base, true, true),
            ("base:allocation2", &base, false, false),
            ("base:alloc", &base, false, false),
            ("qemu:", &base, false, false),
            ("qemu:", &bitmap, true, false),
            ("qemu:dirty-bitmap:", &bitmap, true, false),
            ("qemu:dirty-bitmap:b", &bitmap, false, false),
            ("qemu:dirty-bitmap:b0", &bitmap, true, true),
            ("", &base, false, false),
        ] {
            let asked = MetaContextQuery::new(query);
            assert_eq!(asked.lists(name), lists, "{query} lists {name}");
            assert_eq!(asked.selects(name), selects, "{query} selects {name}");
        }
    }

    #[test]
    fn a_name_needs_a_namespace_and_a_leaf() {
        for bad in ["", "base", "base:", ":allocation", "a:\0"] {
            assert!(MetaContextName::new(bad).is_err(), "{bad:?}");
        }
        assert!(MetaContextName::new("qemu:dirty-bitmap:b:0").is_ok());
        assert!(MetaContextName::new(format!("x:{}", "y".repeat(4095))).is_err());
    }
}
