//! The status page, with the colours and words of charts.

use std::sync::LazyLock;

use crate::chart::{Class, Scheme};

const SOURCE: &str = include_str!("page.html");

static PAGE: LazyLock<String> = LazyLock::new(|| {
    let colors =
        |scheme| of_classes(|class| format!("--{}: {}; ", class.name(), class.rgb(scheme)));
    SOURCE
        .replace("/* light classes */", &colors(Scheme::Light))
        .replace("/* dark classes */", &colors(Scheme::Dark))
        .replace(
            "/* labels */",
            &of_classes(|class| format!("\"{}\": \"{}\", ", class.name(), class.label())),
        )
});

/// Returns the page.
pub(super) fn page() -> &'static str {
    &PAGE
}

fn of_classes(text: impl Fn(Class) -> String) -> String {
    Class::ALL.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_colours_and_its_label() {
        for class in Class::ALL {
            for scheme in [Scheme::Light, Scheme::Dark] {
                let color = format!("--{}: {};", class.name(), class.rgb(scheme));
                assert!(page().contains(&color), "{color}");
            }
            let label = format!("\"{}\": \"{}\",", class.name(), class.label());
            assert!(page().contains(&label), "{label}");
        }
        for place in ["light classes", "dark classes", "/* labels"] {
            assert!(SOURCE.contains(place) && !page().contains(place), "{place}");
        }
    }
}
