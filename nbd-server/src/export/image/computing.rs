//! Computations in a job that waits otherwise.

use std::any::Any;

use crate::pace::{self, Pace};

/// Has this thread compute until the returned value is dropped.
pub(super) fn begin() -> Box<dyn Any> {
    Box::new(Computing { former: pace::set(Pace::Computes) })
}

struct Computing {
    former: Pace,
}

impl Drop for Computing {
    fn drop(&mut self) {
        pace::set(self.former);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_computation_within_a_job_leaves_the_pace_of_the_job() {
        drop(begin());
        assert_eq!(pace::set(Pace::Computes), Pace::Waits);
        drop(begin());
        assert_eq!(pace::set(Pace::Waits), Pace::Computes);
        let computing = begin();
        assert_eq!(pace::set(Pace::Computes), Pace::Computes);
        drop(computing);
        assert_eq!(pace::set(Pace::Waits), Pace::Waits);
    }
}
