//! The locks of the image engine have ranks.

use super::lexer::{Source, line_at, word_offsets};

/// The file that defines the locks with ranks.
const ORDERED: &str = "imgfmt/src/ordered_lock.rs";
/// The storages for tests, whose locks are taken last.
const TESTING: &str = "imgfmt/src/testing/";

/// Finds locks of `imgfmt` whose order nothing checks, except in tests.
pub(crate) fn check(path: &str, source: &Source) -> Vec<String> {
    let is_test = path.contains("/tests/") || path.ends_with("/tests.rs");
    if !path.starts_with("imgfmt/src/") || path == ORDERED || path.starts_with(TESTING) || is_test {
        return Vec::new();
    }
    let code = source.code_without_tests();
    let offsets = ["Mutex", "RwLock"].into_iter().flat_map(|word| word_offsets(&code, word));
    offsets
        .map(|offset| {
            let line = line_at(&code, offset);
            format!("{path}:{line}: a lock without a rank: use a type of {ORDERED}")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_without_a_rank_is_found_in_the_image_engine_alone() {
        let code = "use std::sync::{Mutex, MutexGuard};\nstruct A { b: std::sync::RwLock<u8> }\n";
        let findings = check("imgfmt/src/raw.rs", &Source::new(code));
        assert_eq!(findings.len(), 2, "{findings:?}");
        assert!(findings[1].starts_with("imgfmt/src/raw.rs:2: a lock without a rank"));
        for path in ["nbd-server/src/queue.rs", ORDERED, "imgfmt/src/testing/failing.rs"] {
            assert_eq!(check(path, &Source::new(code)), Vec::<String>::new(), "{path}");
        }
    }

    #[test]
    fn ordered_locks_and_tests_pass() {
        let code = "struct A { b: OrderedMutex<{ rank::STRIPE }, ()>, c: MutexGuard<'static, ()> }\n\
                    #[cfg(test)]\nmod tests {\n    use std::sync::Mutex;\n}\n";
        assert!(check("imgfmt/src/raw.rs", &Source::new(code)).is_empty());
        let test = "use std::sync::Mutex;\n";
        assert!(check("imgfmt/src/sidecar/tests/store.rs", &Source::new(test)).is_empty());
    }
}
