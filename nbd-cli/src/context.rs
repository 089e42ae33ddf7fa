//! The meaning of values in the known metadata contexts.

use nbd_proto::wire::MetaContextName;

use crate::terminal::CharacterSet;

/// Returns nbdinfo's name of a value in a context, if the context is known.
pub(crate) fn description(context: &MetaContextName, flags: u64) -> Option<String> {
    let fixed: &[&str] = match context.as_str() {
        MetaContextName::BASE_ALLOCATION => &["data", "hole", "zero", "hole,zero"],
        MetaContextName::QEMU_ALLOCATION_DEPTH => match flags {
            0 => &["absent"],
            1 => &["", "local"],
            depth => return Some(format!("backing depth {depth}")),
        },
        _ if context.dirty_bitmap().is_some() => &["clean", "dirty"],
        _ => return None,
    };
    let index = usize::try_from(flags).ok()?;
    fixed.get(index).map(|&text| text.to_owned())
}

/// The classes that a chart distinguishes, the most prominent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Data,
    Hole,
    Zero,
    HoleZero,
    Local,
    Backing,
    Absent,
    Dirty,
    Clean,
    NotZero,
    IsZero,
}

impl Class {
    pub(crate) const ALL: [Self; 11] = [
        Self::Data,
        Self::Hole,
        Self::Zero,
        Self::HoleZero,
        Self::Local,
        Self::Backing,
        Self::Absent,
        Self::Dirty,
        Self::Clean,
        Self::NotZero,
        Self::IsZero,
    ];
    pub(crate) const COUNT: usize = Self::ALL.len();

    /// Returns the class of a value of that context.
    pub(crate) fn of(context: &MetaContextName, flags: u64) -> Self {
        match context.as_str() {
            MetaContextName::BASE_ALLOCATION => match flags & 3 {
                0 => Self::Data,
                1 => Self::Hole,
                2 => Self::Zero,
                _ => Self::HoleZero,
            },
            MetaContextName::QEMU_ALLOCATION_DEPTH => match flags {
                0 => Self::Absent,
                1 => Self::Local,
                _ => Self::Backing,
            },
            _ if context.dirty_bitmap().is_some() => match flags & 1 {
                0 => Self::Clean,
                _ => Self::Dirty,
            },
            _ => match flags {
                0 => Self::IsZero,
                _ => Self::NotZero,
            },
        }
    }

    /// Returns its index in [`ALL`](Self::ALL).
    pub(crate) fn index(self) -> usize {
        self as usize
    }

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Hole => "hole",
            Self::Zero => "allocated, reads as zero",
            Self::HoleZero => "hole, reads as zero",
            Self::Local => "in this layer",
            Self::Backing => "in a backing layer",
            Self::Absent => "in no layer",
            Self::Dirty => "dirty",
            Self::Clean => "clean",
            Self::NotZero => "value not 0",
            Self::IsZero => "value 0",
        }
    }

    pub(crate) fn glyph(self, characters: CharacterSet) -> char {
        let (unicode, ascii) = match self {
            Self::Data | Self::Local | Self::Dirty | Self::NotZero => ('█', '#'),
            Self::Hole | Self::Backing => ('▚', '%'),
            Self::Zero => ('░', 'o'),
            Self::HoleZero | Self::Absent | Self::Clean | Self::IsZero => ('·', '.'),
        };
        match characters {
            CharacterSet::Unicode => unicode,
            CharacterSet::Ascii => ascii,
        }
    }

    /// Returns the escape sequence that starts its colour.
    pub(crate) fn ansi(self) -> &'static str {
        match self {
            Self::Data | Self::Local | Self::NotZero => "\x1b[32m",
            Self::Hole => "\x1b[33m",
            Self::Zero | Self::Backing => "\x1b[34m",
            Self::HoleZero | Self::Absent | Self::Clean | Self::IsZero => "\x1b[90m",
            Self::Dirty => "\x1b[31m",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_are_those_of_nbdinfo() {
        let base = MetaContextName::base_allocation();
        let depth = MetaContextName::qemu_allocation_depth();
        let bitmap = MetaContextName::qemu_dirty_bitmap("b0").unwrap();
        let other = MetaContextName::new("x-private:thing").unwrap();
        for (context, flags, text) in [
            (&base, 0, Some("data")),
            (&base, 1, Some("hole")),
            (&base, 2, Some("zero")),
            (&base, 3, Some("hole,zero")),
            (&base, 4, None),
            (&depth, 0, Some("absent")),
            (&depth, 1, Some("local")),
            (&depth, 7, Some("backing depth 7")),
            (&bitmap, 0, Some("clean")),
            (&bitmap, 1, Some("dirty")),
            (&bitmap, u64::MAX, None),
            (&other, 0, None),
        ] {
            assert_eq!(description(context, flags).as_deref(), text, "{context} {flags}");
        }
    }

    #[test]
    fn every_class_stands_at_its_index() {
        for (index, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class.index(), index);
        }
    }
}
