//! The list that orders the modules.

use std::collections::BTreeMap;

use super::tree::Module;

/// The order of the modules of every crate, as defined in `order.txt`.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// By crate and module: the names of the modules in it, from bottom to top. The module's own
    /// file is [`OWN_FILE`] among them.
    directories: BTreeMap<(String, Module), Vec<String>>,
    /// Exceptions: uses that point up, as crate, from, to.
    pub(super) exceptions: Vec<Exception>,
}

/// A use that may point up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exception {
    pub(super) package: String,
    pub(super) from: Module,
    pub(super) to: Module,
}

/// The name in the list for the module's own file.
pub(super) const OWN_FILE: &str = "self";

impl Order {
    /// Parses the list: sections `[crate::module]` with a module per line, and `[exceptions]` with
    /// lines `crate::module -> crate::module`; `#` begins a comment.
    ///
    /// # Errors
    ///
    /// The defect and its line.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut order = Self::default();
        let mut section: Option<(String, Module)> = None;
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let at_line = |what: &str| format!("line {}: {what}", index + 1);
            if line.is_empty() {
                continue;
            }
            if line == "[exceptions]" {
                section = None;
            } else if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                let key = split(name);
                if order.directories.insert(key.clone(), Vec::new()).is_some() {
                    return Err(at_line("this section is there twice"));
                }
                section = Some(key);
            } else if let Some((from, to)) = line.split_once("->") {
                let ((package, from), (other, to)) = (split(from.trim()), split(to.trim()));
                if package != other {
                    return Err(at_line("an exception between crates"));
                }
                order.exceptions.push(Exception { package, from, to });
            } else {
                let names = section.as_ref().and_then(|section| order.directories.get_mut(section));
                let names = names.ok_or_else(|| at_line("a module outside a section"))?;
                if names.iter().any(|name| name == line) {
                    return Err(at_line("this module is there twice"));
                }
                names.push(line.to_owned());
            }
        }
        Ok(order)
    }

    /// The sections of one crate: each module with the names in it, from bottom to top.
    pub(super) fn sections<'a>(
        &'a self,
        package: &'a str,
    ) -> impl Iterator<Item = (&'a Module, &'a Vec<String>)> {
        let is_of = move |key: &(String, Module)| key.0 == package;
        self.directories
            .iter()
            .filter(move |(key, _)| is_of(key))
            .map(|(key, names)| (&key.1, names))
    }

    /// The names of the sections' crates.
    pub(super) fn packages(&self) -> impl Iterator<Item = &str> {
        self.directories.keys().map(|(package, _)| package.as_str())
    }

    /// Returns the names of the two modules where their paths diverge, if the first is below the
    /// second.
    pub(super) fn points_up(&self, package: &str, from: &Module, to: &Module) -> Option<Step> {
        let common = from.iter().zip(to).take_while(|(a, b)| a == b).count();
        let directory = from[..common].to_vec();
        let names = self.directories.get(&(package.to_owned(), directory.clone()))?;
        let own_file = OWN_FILE.to_owned();
        let lower = from.get(common).unwrap_or(&own_file);
        let upper = to.get(common).unwrap_or(&own_file);
        let place = |name: &String| names.iter().position(|other| other == name);
        let step = Step { directory, lower: lower.clone(), upper: upper.clone() };
        (place(lower)? < place(upper)?).then_some(step)
    }
}

/// The place where a use points up: in this directory, from the lower to the upper module.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) directory: Module,
    pub(super) lower: String,
    pub(super) upper: String,
}

fn split(path: &str) -> (String, Module) {
    let mut names = path.split("::").map(str::to_owned);
    (names.next().unwrap_or_default(), names.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str) -> Module {
        split(path).1
    }

    #[test]
    fn paths_are_compared_where_they_part() {
        let text = "[a]\nlow\nself\nhigh  # why\n[a::high]\nself\nx\ny\n";
        let order = Order::parse(text).expect("a list");
        let up = |from, to| order.points_up("a", &module(from), &module(to)).is_some();
        assert!(up("a::low", "a::high::x") && !up("a::high::x", "a::low"));
        assert!(up("a::high::x", "a::high::y") && !up("a::high::y", "a::high::x"));
        assert!(up("a::low", "a") && !up("a::high", "a"));
        assert!(up("a::high", "a::high::x"), "the module's own file is below");
        assert!(!up("a::low::p", "a::low::q"), "nothing is said of these");
    }

    #[test]
    fn broken_lists_are_refused_with_their_line() {
        for (text, line) in [("x\n", 1), ("[a]\nx\nx\n", 3), ("[a]\n[a]\n", 2), ("a -> b\n", 1)] {
            let error = Order::parse(text).expect_err(text);
            assert!(error.starts_with(&format!("line {line}:")), "{error}");
        }
    }
}
