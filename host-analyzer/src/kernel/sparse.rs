//! Objects that are only partly in the dump.
//!
//! What is missing is never taken for a value: readers of such an object get nothing where a hole
//! touches what they ask for.

use std::borrow::Cow;
use std::ops::Range;

/// What stands where bytes are missing, for searches that look at all of an object: no text, no type of
/// BTF and no length has it.
pub const FILLER: u8 = 0xff;

/// The bytes of an object, and where some are missing.
#[derive(Clone, Debug, Default)]
pub struct Sparse<'a> {
    bytes: Cow<'a, [u8]>,
    /// Sorted, not overlapping, not empty.
    holes: Vec<Range<usize>>,
}

impl<'a> Sparse<'a> {
    /// An object without holes.
    #[must_use]
    pub fn whole(bytes: impl Into<Cow<'a, [u8]>>) -> Sparse<'a> {
        Sparse { bytes: bytes.into(), holes: Vec::new() }
    }

    /// An object with holes, which must be sorted, apart from each other, and filled with [`FILLER`].
    pub(super) fn with_holes(bytes: Vec<u8>, holes: Vec<Range<usize>>) -> Sparse<'a> {
        Sparse { bytes: bytes.into(), holes }
    }

    /// Whether nothing is missing.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.holes.is_empty()
    }

    /// Size of the object in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the object has no bytes at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All bytes, [`FILLER`] for those that are missing.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        &self.bytes
    }

    /// As [`Sparse::filled`], to keep.
    #[must_use]
    pub fn into_filled(self) -> Cow<'a, [u8]> {
        self.bytes
    }

    /// The bytes of `range`; `None` when one of them is missing or beyond the end.
    #[must_use]
    pub fn get(&self, range: Range<usize>) -> Option<&[u8]> {
        let next = self.holes.partition_point(|hole| hole.end <= range.start);
        let torn = self.holes.get(next).is_some_and(|hole| hole.start < range.end);
        if torn { None } else { self.bytes.get(range) }
    }

    /// Of a table of `count` elements of `size` bytes in ascending order: how many, from the first on,
    /// are `below`. `None` when a hole hides where those end.
    #[must_use]
    pub fn partition(
        &self,
        count: usize,
        size: usize,
        below: impl Fn(usize) -> Option<bool>,
    ) -> Option<usize> {
        let parts = self.parts(count, size);
        let is_below = |index: usize| below(index).unwrap_or(false);
        let after = parts.partition_point(|part| is_below(part.start));
        let Some(part) = after.checked_sub(1).and_then(|index| parts.get(index)) else {
            let begins = parts.first().is_none_or(|part| part.start == 0);
            return (begins && (count == 0 || !parts.is_empty())).then_some(0);
        };
        let (mut low, mut high) = (part.start, part.end);
        while low < high {
            let middle = low + (high - low) / 2;
            if is_below(middle) { low = middle + 1 } else { high = middle }
        }
        (low < part.end || part.end == count).then_some(low)
    }

    /// The stretches of elements that are there, none of them empty.
    fn parts(&self, count: usize, size: usize) -> Vec<Range<usize>> {
        let count = count.min(self.len().checked_div(size).unwrap_or(0));
        let starts = std::iter::once(0).chain(self.holes.iter().map(|it| it.end.div_ceil(size)));
        let ends = self.holes.iter().map(|it| it.start / size).chain([count]);
        let parts = starts.zip(ends).map(|(start, end)| start..end.min(count));
        parts.filter(|part| !part.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements of two bytes, 0 to 9, of which those at 2, 3 and 6 are missing.
    fn torn() -> Sparse<'static> {
        let mut bytes: Vec<u8> = (0..10u16).flat_map(u16::to_le_bytes).collect();
        let holes = vec![4..8, 13..14];
        holes.iter().for_each(|hole: &Range<usize>| bytes[hole.clone()].fill(FILLER));
        Sparse::with_holes(bytes, holes)
    }

    fn below(table: &Sparse<'_>, limit: u16) -> Option<usize> {
        table.partition(10, 2, |index| {
            let raw = table.get(index * 2..index * 2 + 2)?;
            Some(u16::from_le_bytes([raw[0], raw[1]]) < limit)
        })
    }

    #[test]
    fn what_a_hole_touches_is_not_there() {
        let torn = torn();
        assert_eq!(torn.get(2..4), Some(&[1, 0][..]));
        assert_eq!((torn.get(3..5), torn.get(12..14), torn.get(18..21)), (None, None, None));
        assert_eq!(torn.get(8..8), Some(&[][..]));
    }

    #[test]
    fn place_in_a_table_is_known_only_where_its_neighbours_are() {
        let torn = torn();
        assert_eq!((below(&torn, 0), below(&torn, 1)), (Some(0), Some(1)));
        // 2 may or may not be below these.
        assert_eq!((below(&torn, 2), below(&torn, 4)), (None, None));
        assert_eq!((below(&torn, 5), below(&torn, 6)), (Some(5), None));
        assert_eq!((below(&torn, 8), below(&torn, 100)), (Some(8), Some(10)));
    }

    #[test]
    fn whole_table_and_lost_table() {
        let whole: Vec<u8> = (0..10u16).flat_map(u16::to_le_bytes).collect();
        assert_eq!(below(&Sparse::whole(whole), 4), Some(4));
        let lost = Sparse::with_holes(vec![FILLER; 20], std::iter::once(0..20).collect());
        assert_eq!(below(&lost, 4), None);
    }
}
