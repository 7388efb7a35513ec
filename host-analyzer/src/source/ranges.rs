//! Ranges of addresses, sorted and not overlapping.

use std::ops::Range;

/// What is left of `range` on both sides of `gap`.
pub(super) fn without(
    range: Range<u64>,
    gap: &Range<u64>,
) -> impl Iterator<Item = Range<u64>> + use<> {
    let before = range.start..range.end.min(gap.start);
    let after = range.start.max(gap.end)..range.end;
    [before, after].into_iter().filter(|part| !part.is_empty())
}

/// What is left of all `ranges` without `gaps`.
pub(super) fn without_all(mut ranges: Vec<Range<u64>>, gaps: &[Range<u64>]) -> Vec<Range<u64>> {
    for gap in gaps {
        ranges = ranges.into_iter().flat_map(|range| without(range, gap)).collect();
    }
    ranges
}

/// Merges ranges that are sorted by their start.
pub(super) fn merge(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}
