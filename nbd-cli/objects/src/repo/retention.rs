//! Which backups are kept.

use super::head::Head;
use super::id::Id;
use super::listing::BackupInfo;

/// How many backups of each disk are kept. A backup is kept if any rule keeps it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest.
    pub last: u32,
    /// The newest of each of so many hours that have one.
    pub hourly: u32,
    /// The newest of each of so many days, in UTC.
    pub daily: u32,
    /// The newest of each of so many weeks, from Monday.
    pub weekly: u32,
    /// The newest of each of so many months.
    pub monthly: u32,
    /// The newest of each of so many years.
    pub yearly: u32,
}

/// The number of the period of a backup, by its time and its place in the list.
type Period = fn(u64, usize) -> u64;

const HOUR: u64 = 3_600_000;

impl Retention {
    /// Returns whether no rule is given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the backups that are not kept. Those whose object is damaged, and those that are
    /// forgotten already, are none of them.
    pub fn expired(&self, backups: &[BackupInfo]) -> Vec<(Id, Head)> {
        let live = backups.iter().filter(|info| !info.is_forgotten);
        let mut live: Vec<_> =
            live.filter_map(|info| Some((info.id, info.head.as_ref().ok()?.clone()))).collect();
        live.sort_by(|one, other| {
            (&one.1.name, other.1.time, other.0).cmp(&(&other.1.name, one.1.time, one.0))
        });
        let mut expired = Vec::new();
        for disk in live.chunk_by(|one, other| one.1.name == other.1.name) {
            let mut kept = vec![false; disk.len()];
            let rules: [(u32, Period); 6] = [
                (self.last, |_, number| number as u64),
                (self.hourly, |time, _| time / HOUR),
                (self.daily, |time, _| time / (24 * HOUR)),
                // 1970 began on a Thursday.
                (self.weekly, |time, _| (time / (24 * HOUR) + 3) / 7),
                (self.monthly, |time, _| month(time)),
                (self.yearly, |time, _| month(time) / 12),
            ];
            for (count, period) in rules {
                let (mut left, mut last) = (count, None);
                for (number, (_, head)) in disk.iter().enumerate() {
                    let period = period(head.time, number);
                    if left > 0 && last != Some(period) {
                        kept[number] = true;
                        last = Some(period);
                        left -= 1;
                    }
                }
            }
            let dropped = disk.iter().zip(kept).filter(|(_, is_kept)| !is_kept);
            expired.extend(dropped.map(|(backup, _)| backup.clone()));
        }
        expired
    }
}

/// The months from the year 0 to a time in milliseconds since 1970.
fn month(time: u64) -> u64 {
    // Years are counted from March, so that the day of a leap year comes last; an era has 400.
    let days = time / (24 * HOUR) + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let month = (5 * (day - (365 * year + year / 4 - year / 100)) + 2) / 153;
    (era * 400 + year) * 12 + month + 2
}

#[cfg(test)]
mod tests {
    use super::super::disks::DiskOrigin;
    use super::*;

    fn backup(name: &str, day: u64, number: u8) -> BackupInfo {
        let head = Head {
            name: name.to_owned(),
            size: 0,
            time: day * 24 * HOUR + u64::from(number),
            origin: DiskOrigin::default(),
            imported: None,
            disks: Vec::new(),
            data: 0,
            added: 0,
            body_length: 0,
            body_hash: String::new(),
            id: None,
        };
        BackupInfo {
            id: Id::from_bytes([number; 16]),
            head: Ok(head),
            is_forgotten: false,
            bytes: 0,
        }
    }

    fn kept(retention: Retention, days: &[u64]) -> Vec<u64> {
        let backups: Vec<_> = days.iter().zip(1..).map(|(&day, n)| backup("a", day, n)).collect();
        let expired = retention.expired(&backups);
        let is_kept = |info: &&BackupInfo| !expired.iter().any(|(id, _)| *id == info.id);
        let times = backups.iter().filter(is_kept).map(|info| info.head.clone().unwrap().time);
        times.map(|time| time / (24 * HOUR)).collect()
    }

    #[test]
    fn newest_of_each_period_is_kept() {
        let all = Retention::default();
        // 20000 is Friday, 2024-10-04. There are three backups of the day after it, and one of each
        // of the three Saturdays before that.
        let days = [19_900, 19_980, 19_987, 19_994, 20_000, 20_001, 20_001, 20_001];
        assert_eq!(kept(Retention { last: 2, ..all }, &days), [20_001, 20_001]);
        assert_eq!(kept(Retention { daily: 2, ..all }, &days), [20_000, 20_001]);
        assert_eq!(kept(Retention { daily: 100, ..all }, &days).len(), 6);
        assert_eq!(kept(Retention { yearly: 9, ..all }, &days), [20_001]);
        assert_eq!(kept(Retention { weekly: 2, ..all }, &days), [19_994, 20_001]);
        assert_eq!(kept(Retention { daily: 2, weekly: 2, ..all }, &days), [19_994, 20_000, 20_001]);
        assert_eq!(kept(Retention { monthly: 2, ..all }, &days), [19_994, 20_001]);
        assert!(Retention::default().is_empty() && kept(all, &days).is_empty());
    }

    #[test]
    fn months_begin_where_the_calendar_says() {
        // 2000-02-29, 2000-03-01, 2000-12-31, 2001-01-01.
        let months = [11_016, 11_017, 11_322, 11_323].map(|day| month(day * 24 * HOUR));
        assert_eq!(months, [24_001, 24_002, 24_011, 24_012]);
    }

    #[test]
    fn disks_are_kept_apart() {
        let backups = [backup("a", 1, 1), backup("b", 2, 2), backup("a", 3, 3)];
        let expired = Retention { last: 1, ..Retention::default() }.expired(&backups);
        assert_eq!(expired.len(), 1);
        assert_eq!(expired[0].0, Id::from_bytes([1; 16]));
    }
}
