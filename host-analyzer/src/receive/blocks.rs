//! Sets of blocks of the core, kept as runs: what a set takes follows how scattered it is, not how large.

use std::ops::Range;

use rangemap::RangeSet;

/// Most runs in one set. A stream that scatters its blocks more is no dump; what would be one run too
/// many is not taken.
const MAX_RUNS: usize = 1 << 21;

/// A set of block numbers.
#[derive(Clone, Debug, Default)]
pub struct BlockSet {
    runs: RangeSet<u64>,
    count: u64,
}

impl BlockSet {
    /// Adds blocks. Returns whether there was room for them.
    pub fn insert(&mut self, blocks: Range<u64>) -> bool {
        if blocks.is_empty() {
            return true;
        }
        if self.runs.len() >= MAX_RUNS && !self.runs.overlaps(&blocks) {
            return false;
        }
        self.count += self.lacking(blocks.clone()).map(|gap| gap.end - gap.start).sum::<u64>();
        self.runs.insert(blocks);
        true
    }

    /// Takes blocks out.
    pub fn remove(&mut self, blocks: Range<u64>) {
        if !blocks.is_empty() {
            self.count -= self.within(blocks.clone()).map(|run| run.end - run.start).sum::<u64>();
            self.runs.remove(blocks);
        }
    }

    /// How many blocks are in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether all of these blocks are in it.
    #[must_use]
    pub fn has_all(&self, blocks: Range<u64>) -> bool {
        self.lacking(blocks).next().is_none()
    }

    /// Its runs, in ascending order; none touches another.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().cloned()
    }

    /// The runs in it of these blocks.
    pub fn within(&self, blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (start, end) = (blocks.start, blocks.end.max(blocks.start));
        // Of an empty range the map below makes no sense.
        let some = (start < end).then(|| self.runs.overlapping(start..end));
        some.into_iter().flatten().map(move |run| run.start.max(start)..run.end.min(end))
    }

    /// The runs of these blocks that are not in it.
    pub fn lacking(&self, blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let Range { start, end } = blocks;
        let mut at = start;
        let mut present = self.within(blocks).chain(std::iter::once(end..end)).fuse();
        std::iter::from_fn(move || {
            loop {
                let run = present.next()?;
                let gap = at..run.start;
                at = run.end;
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(runs: &[Range<u64>]) -> BlockSet {
        let mut set = BlockSet::default();
        runs.iter().for_each(|run| assert!(set.insert(run.clone())));
        set
    }

    #[test]
    fn blocks_are_counted_once_however_often_they_come() {
        let mut blocks = set(&[4..8, 6..10, 4..10, 20..21]);
        assert_eq!(blocks.count(), 7);
        assert_eq!(blocks.runs().collect::<Vec<_>>(), [4..10, 20..21]);
        blocks.remove(5..25);
        assert_eq!((blocks.count(), blocks.runs().next()), (1, Some(4..5)));
    }

    #[test]
    fn gaps_and_runs_are_cut_to_what_is_asked() {
        let blocks = set(&[4..8, 12..14]);
        assert_eq!(blocks.lacking(0..20).collect::<Vec<_>>(), [0..4, 8..12, 14..20]);
        assert_eq!(blocks.lacking(5..15).collect::<Vec<_>>(), [8..12, 14..15]);
        assert_eq!(blocks.within(5..13).collect::<Vec<_>>(), [5..8, 12..13]);
        assert_eq!(blocks.lacking(3..3).count(), 0);
        assert!(blocks.has_all(12..14) && !blocks.has_all(11..14));
    }
}
