//! What a chart distinguishes, and how each class looks.

use nbd_proto::wire::MetaContextName;

/// The characters of a chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CharacterSet {
    /// Block elements.
    Unicode,
    /// ASCII alone.
    Ascii,
}

/// When text has colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    /// Escape sequences.
    On,
    /// Plain text.
    Off,
}

/// The classes that a chart distinguishes, the most prominent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Of `base:allocation`: data.
    Data,
    /// Of `base:allocation`: a hole that may read as anything.
    Hole,
    /// Allocated, and reads as zero.
    Zero,
    /// Of `base:allocation`: a hole that reads as zero.
    HoleZero,
    /// In the active layer.
    Local,
    /// In a layer below.
    Backing,
    /// In no layer.
    Absent,
    /// Dirty in a bitmap.
    Dirty,
    /// Clean in a bitmap.
    Clean,
    /// Any value but 0 of another context.
    NotZero,
    /// The value 0 of another context.
    IsZero,
}

/// The colours of a class.
struct Hue {
    /// The number of the foreground colour in terminals.
    ansi: &'static str,
    light: &'static str,
    dark: &'static str,
}

const GREEN: Hue = Hue { ansi: "\x1b[32m", light: "#1a7f37", dark: "#3fb950" };
const YELLOW: Hue = Hue { ansi: "\x1b[33m", light: "#9a6700", dark: "#d29922" };
const BLUE: Hue = Hue { ansi: "\x1b[34m", light: "#0969da", dark: "#58a6ff" };
const PURPLE: Hue = Hue { ansi: "\x1b[35m", light: "#8250df", dark: "#bc8cff" };
const GREY: Hue = Hue { ansi: "\x1b[90m", light: "#d1d9e0", dark: "#3d444d" };
const RED: Hue = Hue { ansi: "\x1b[31m", light: "#cf222e", dark: "#ff7b72" };

/// The background of pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Dark on light.
    Light,
    /// Light on dark.
    Dark,
}

impl Class {
    /// All of them, the most prominent first.
    pub const ALL: [Self; 11] = [
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
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// Returns the class of a value of that context.
    pub fn of(context: &MetaContextName, flags: u64) -> Self {
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
    pub fn index(self) -> usize {
        self as usize
    }

    /// Returns its name in style sheets.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Hole => "hole",
            Self::Zero => "zero",
            Self::HoleZero => "hole-zero",
            Self::Local => "local",
            Self::Backing => "backing",
            Self::Absent => "absent",
            Self::Dirty => "dirty",
            Self::Clean => "clean",
            Self::NotZero => "not-zero",
            Self::IsZero => "is-zero",
        }
    }

    /// Returns its meaning in words.
    pub fn label(self) -> &'static str {
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

    /// Returns its character.
    pub fn glyph(self, characters: CharacterSet) -> char {
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
    pub fn ansi(self) -> &'static str {
        self.hue().ansi
    }

    /// Returns its colour in pictures, as `#rrggbb`.
    pub fn rgb(self, scheme: Scheme) -> &'static str {
        match scheme {
            Scheme::Light => self.hue().light,
            Scheme::Dark => self.hue().dark,
        }
    }

    const fn hue(self) -> &'static Hue {
        match self {
            Self::Data | Self::Local | Self::NotZero => &GREEN,
            Self::Hole => &YELLOW,
            Self::Zero => &BLUE,
            // In one picture with `Zero`.
            Self::Backing => &PURPLE,
            Self::HoleZero | Self::Absent | Self::Clean | Self::IsZero => &GREY,
            Self::Dirty => &RED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_stands_at_its_index() {
        for (index, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class.index(), index);
        }
    }
}
