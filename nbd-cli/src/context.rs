//! The meaning of values in the known metadata contexts.

use nbd_proto::wire::MetaContextName;

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
}
