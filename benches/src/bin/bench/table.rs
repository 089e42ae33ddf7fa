//! The report as text.

use super::bars::BarReport;
use super::contest::{ContestReport, OURS};
use super::options::PageCache;
use super::report::{Report, RowReport};
use super::sample::Sample;
use super::servers::Server;

/// The table of ratios, the bars, and the omissions.
pub(crate) fn render(report: &Report) -> String {
    let machine = &report.machine;
    let mut text = format!(
        "\n{} cores ({}), Linux {}; {} rounds of {} s, {} MiB cached in {}, unix socket, medians\n\n",
        machine.cores,
        machine.processor,
        machine.kernel,
        report.rounds,
        report.seconds_per_block,
        report.size_bytes >> 20,
        match report.page_cache {
            PageCache::Pages => "single pages",
            PageCache::Readahead => "the folios of readahead",
        },
    );
    if !report.rows.is_empty() {
        let mut lines = vec![HEADINGS.map(str::to_owned).to_vec()];
        lines.extend(report.rows.iter().map(row_cells));
        text.push_str(&align(&lines));
        text.push_str(
            "\nCPU: the server's time per request, per MiB for nbdcopy. The best peer is chosen\n",
        );
        text.push_str(
            "separately for each measure. Memory: peak of all processes of the server. Client: the\n",
        );
        text.push_str(
            "share of a core that it uses; near 100 % a faster server can add little or nothing.\n",
        );
        text.push_str(
            "Cached: the share of the file that the page cache had when each block began and ended,\n",
        );
        text.push_str(
            "and how much of that in large folios. It is dropped and read before each.\n",
        );
        text.push_str(&bar_lines(&report.bars));
    }
    for group in &report.groups {
        text.push_str(&format!("\n{}\n", group.name));
        let mut lines = vec![GROUP_HEADINGS.map(str::to_owned).to_vec()];
        lines.extend(group.rows.iter().flat_map(contest_lines));
        text.push_str(&align(&lines));
        text.push_str(&bar_lines(&group.bars));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

/// The bars with an empty line in front, or nothing.
fn bar_lines(bars: &[BarReport]) -> String {
    if bars.is_empty() {
        return String::new();
    }
    let mut lines = vec![["row", "has to be", "is", "verdict"].map(str::to_owned).to_vec()];
    for bar in bars {
        let measured = bar.measured.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        let verdict = bar.verdict.word().to_owned();
        lines.push(vec![bar.row.clone(), bar.requirement.clone(), measured, verdict]);
    }
    format!("\n{}", align(&lines))
}

/// One line per contender.
fn contest_lines(row: &ContestReport) -> Vec<Vec<String>> {
    let ours = row.median_of(OURS).copied();
    let lines = row.contenders.iter().enumerate().map(|(index, contender)| {
        let median = contender.median;
        let ratio = ours.map(|ours| ours.throughput / median.throughput);
        vec![
            if index == 0 { row.name.clone() } else { String::new() },
            contender.name.clone(),
            format!("{:.0} {}", median.throughput, row.throughput_unit),
            ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            format!("{:.1} us/{}", median.cpu_us_per_work, row.work_name),
            percent(median.client_busy),
            median.p99_us.map_or_else(|| "-".to_owned(), |p99| format!("{p99:.0}")),
            format!("{:.1}", median.peak_memory_kib / 1024.0),
            median.page_cache.map_or_else(|| "-".to_owned(), |state| state.describe()),
        ]
    });
    lines.collect()
}

/// Our medians relative to those of an earlier report.
pub(crate) fn render_comparison(report: &Report, earlier: &Report) -> String {
    let mut lines =
        vec![["row", "throughput now/then", "CPU now/then"].map(str::to_owned).to_vec()];
    for row in &report.rows {
        let then = earlier.rows.iter().find(|other| other.name == row.name);
        let (Some(now), Some(then)) =
            (row.median_of(Server::Ours), then.and_then(|row| row.median_of(Server::Ours)))
        else {
            continue;
        };
        lines.push(vec![
            row.name.clone(),
            format!("{:.2}", now.throughput / then.throughput),
            format!("{:.2}", now.cpu_us_per_work / then.cpu_us_per_work),
        ]);
    }
    let rows_of = |report: &'_ Report| -> Vec<(String, Sample)> {
        let rows = report.groups.iter().flat_map(|group| &group.rows);
        rows.filter_map(|row| Some((row.name.clone(), *row.median_of(OURS)?))).collect()
    };
    let then = rows_of(earlier);
    for (name, now) in rows_of(report) {
        let Some((_, then)) = then.iter().find(|(other, _)| *other == name) else { continue };
        lines.push(vec![
            name,
            format!("{:.2}", now.throughput / then.throughput),
            format!("{:.2}", now.cpu_us_per_work / then.cpu_us_per_work),
        ]);
    }
    align(&lines)
}

const GROUP_HEADINGS: [&str; 9] =
    ["row", "who", "throughput", "ours/it", "CPU", "client", "p99 us", "peak MiB", "cached"];

const HEADINGS: [&str; 11] = [
    "row",
    "ours",
    "best peer",
    "ours/peer",
    "ours/floor",
    "CPU us ours",
    "best peer",
    "client ours : best peer",
    "p99 us ours : best peer",
    "MiB ours",
    "cached",
];

fn row_cells(row: &RowReport) -> Vec<String> {
    let ours = row.median_of(Server::Ours);
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let best = row.fastest_peer().map_or_else(
        || "-".to_owned(),
        |peer| format!("{:.0} {}", peer.median.throughput, peer.server.name()),
    );
    let cheapest = row.cheapest_peer().map_or_else(
        || "-".to_owned(),
        |peer| {
            let ratio = number(row.cpu_to_peer, 2);
            format!("{:.1} {} ({ratio})", peer.median.cpu_us_per_work, peer.server.name())
        },
    );
    let p99 = number(ours.and_then(|ours| ours.p99_us), 0);
    vec![
        row.name.clone(),
        format!("{} {}", number(ours.map(|ours| ours.throughput), 0), row.throughput_unit),
        best,
        number(row.throughput_to_peer, 2),
        number(row.throughput_to_floor, 2),
        number(ours.map(|ours| ours.cpu_us_per_work), 1),
        cheapest,
        format!(
            "{} : {}",
            percent(ours.and_then(|ours| ours.client_busy)),
            percent(row.fastest_peer().and_then(|peer| peer.median.client_busy)),
        ),
        format!("{p99} : {}", number(row.lowest_peer_p99_us(), 0)),
        number(ours.map(|ours| ours.peak_memory_kib / 1024.0), 1),
        ours.and_then(|ours| ours.page_cache)
            .map_or_else(|| "-".to_owned(), |state| state.describe()),
    ]
}

/// A share in percent.
fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0))
}

/// Lines of cells with every column as wide as its widest cell.
fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::example;
    use super::*;

    #[test]
    fn table_shows_ratios_bars_and_notes() {
        let text = render(&example());
        for part in [
            "200 qemu-nbd",
            "1.50",
            "0.50",
            "8.0 nbdkit (0.38)",
            "100 : 100",
            "90 % : 90 %",
            "PASS",
            "FAIL",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        assert!(text.contains("note: nbd-server"), "{text}");
    }

    #[test]
    fn comparison_with_itself_is_one() {
        let text = render_comparison(&example(), &example());
        assert!(text.contains("randread-4k-qd1  1.00"), "{text}");
    }

    #[test]
    fn columns_are_aligned_and_end_without_blanks() {
        let lines = [vec!["a".to_owned(), "b".to_owned()], vec!["ccc".to_owned(), "d".to_owned()]];
        assert_eq!(align(&lines), "a    b\nccc  d\n");
    }
}
