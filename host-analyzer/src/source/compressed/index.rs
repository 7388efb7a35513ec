//! Which page has which descriptor: they come in the order of the set bits in a bitmap.

use std::ops::Range;

use crate::source::content::Content;

use super::header::Header;

/// How many bytes of the bitmap one counter stands for.
const STEP: usize = 512;

/// The bitmap with a counter every [`STEP`] bytes: all that is kept in memory.
pub(super) struct Index {
    bitmap: u64,
    /// The pages that this file has descriptors of.
    pages: Range<u64>,
    /// How many bits are set before each step.
    before: Vec<u64>,
    /// The number of the first page's descriptor if all pages had theirs here.
    first: u64,
    count: u64,
    total: u64,
}

impl Index {
    /// Counts the bits.
    pub fn new(header: &Header, content: Content<'_>) -> Index {
        let bits = content.read_up_to(header.bitmap, header.pages.div_ceil(8));
        let mut total = 0;
        let mut before = Vec::with_capacity(bits.len() / STEP + 1);
        for step in bits.chunks(STEP) {
            before.push(total);
            total += ones(step);
        }
        let there = header.pages.min(bits.len() as u64 * 8);
        let part = header.part.clone().unwrap_or(0..there);
        let pages = part.start.min(there)..part.end.min(there);
        let mut index =
            Index { bitmap: header.bitmap, pages, before, first: 0, count: 0, total: 0 };
        index.first = index.rank(index.pages.start, content);
        index.count = index.rank(index.pages.end, content).saturating_sub(index.first);
        index.total = index.rank(there, content);
        index
    }

    /// How many pages have their descriptors in other files.
    pub fn elsewhere(&self) -> u64 {
        self.total.saturating_sub(self.count)
    }

    /// How many pages have a descriptor.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The number of the descriptor of `page`, if it has one.
    pub fn number(&self, page: u64, content: Content<'_>) -> Option<u64> {
        let is_set = self.pages.contains(&page) && bit(self.bitmap, page, content) == Some(true);
        is_set.then(|| self.rank(page, content).saturating_sub(self.first))
    }

    /// How many bits before that of `page` are set.
    fn rank(&self, page: u64, content: Content<'_>) -> u64 {
        let step = page / 8 / STEP as u64;
        let start = self.bitmap + step * STEP as u64;
        let bits = content.read_up_to(start, page / 8 % STEP as u64 + 1);
        let (whole, last) = bits.split_at(bits.len().min((page / 8 % STEP as u64) as usize));
        let last = last.first().map_or(0, |byte| byte & ((1 << (page % 8)) - 1));
        let before = usize::try_from(step).ok().and_then(|step| self.before.get(step));
        // Right behind the last step there is none any more.
        let Some(before) = before else { return self.all(content) };
        before + ones(whole) + u64::from(last.count_ones())
    }

    fn all(&self, content: Content<'_>) -> u64 {
        let Some((last, before)) = self.before.iter().enumerate().next_back() else { return 0 };
        let start = self.bitmap + (last * STEP) as u64;
        before + ones(&content.read_up_to(start, STEP as u64))
    }

    /// The pages with a descriptor, in their order, which is that of the descriptors.
    pub fn pages(&self, content: Content<'_>, mut each: impl FnMut(u64)) {
        let start = self.pages.start / 8;
        let size = self.pages.end.div_ceil(8) - start;
        let bits = content.read_up_to(self.bitmap + start, size);
        for (at, &byte) in bits.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            let first = (start + at as u64) * 8;
            let set = (0..8).filter(|bit| byte >> bit & 1 == 1).map(|bit| first + bit);
            set.filter(|page| self.pages.contains(page)).for_each(&mut each);
        }
    }
}

/// The bit of `page` in the bitmap at `bitmap`, if that was written and is in the file.
pub(super) fn bit(bitmap: u64, page: u64, content: Content<'_>) -> Option<bool> {
    let byte = content.run(bitmap.checked_add(page / 8)?, 1)?;
    Some(byte.first()? >> (page % 8) & 1 == 1)
}

fn ones(bits: &[u8]) -> u64 {
    let (words, rest) = bits.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from(u64::from_le_bytes(*word).count_ones()));
    words.sum::<u64>() + rest.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>()
}
