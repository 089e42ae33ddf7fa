//! Medians.

use super::cache_state::CacheState;
use super::sample::Sample;

/// The middle value, or the mean of the two in the middle; `None` for no values.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    Some(f64::midpoint(values[middle - 1], upper))
}

/// The separate medians of all numbers; `None` for no samples.
pub(crate) fn median_sample(samples: &[Sample]) -> Option<Sample> {
    Some(Sample {
        throughput: median(samples.iter().map(|sample| sample.throughput))?,
        p99_us: median(samples.iter().filter_map(|sample| sample.p99_us)),
        client_busy: median(samples.iter().filter_map(|sample| sample.client_busy)),
        cpu_us_per_work: median(samples.iter().map(|sample| sample.cpu_us_per_work))?,
        peak_memory_kib: median(samples.iter().map(|sample| sample.peak_memory_kib))?,
        page_cache: median_state(samples),
    })
}

fn median_state(samples: &[Sample]) -> Option<CacheState> {
    let states = || samples.iter().filter_map(|sample| sample.page_cache);
    let cached = median(states().map(|state| state.cached))?;
    Some(CacheState { cached, large: median(states().filter_map(|state| state.large)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_whatever_the_order() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([7.0]), Some(7.0));
        assert_eq!(median([]), None);
    }

    #[test]
    fn medians_are_taken_per_number() {
        let sample = |throughput, p99_us| Sample {
            throughput,
            p99_us,
            client_busy: None,
            cpu_us_per_work: 1.0,
            peak_memory_kib: 2.0,
            page_cache: None,
        };
        let samples = [sample(1.0, Some(30.0)), sample(2.0, Some(10.0)), sample(3.0, None)];
        assert_eq!(median_sample(&samples), Some(sample(2.0, Some(20.0))));
        assert_eq!(median_sample(&[]), None);
    }
}
