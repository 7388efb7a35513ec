//! kdump-compressed files: what makedumpfile writes unless told otherwise, and QEMU's dump-guest-memory.
//!
//! Headers, a bitmap of the pages that exist, one of those that were dumped, a descriptor for each of
//! these (struct page_desc: offset, size and flags of its packed bytes), the packed pages.
//!
//! A page that exists and was not dumped was left out on purpose. Which kind of page it was nobody wrote
//! down, so it is unreadable; only where nothing but pages of zeros was left out (`-d 1`) it is zeros.

mod cache;
mod codec;
mod header;
mod index;
mod lzo;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::cell::OnceCell;
use std::ops::Range;

use crate::{PhysAddr, ReadError, VirtAddr, bytes};

use super::Form;
use super::content::Content;
use super::ranges::without_all;
use cache::Cache;
use header::Header;
use index::Index;

/// Size of a page's descriptor.
const DESCRIPTOR: u64 = 24;

/// A kdump-compressed file.
pub(super) struct Compressed {
    header: Header,
    index: Index,
    cache: Cache,
    /// Memory that is in the dump and that nobody could read.
    gaps: Vec<Range<u64>>,
    ranges: OnceCell<Vec<Range<u64>>>,
    lost: OnceCell<u64>,
}

/// Where the packed bytes of a page are.
struct Descriptor {
    offset: u64,
    size: u32,
    flags: u32,
}

impl Compressed {
    /// Whether `content` begins as such a file does.
    pub fn is_in(content: Content<'_>) -> bool {
        header::is_kdump(content)
    }

    /// Reads the headers of the dump in `content`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn parse(content: Content<'_>) -> Result<Compressed, String> {
        let header = Header::parse(content)?;
        let index = Index::new(&header, content);
        if index.count() == 0 {
            return Err("a kdump-compressed file without any memory in it".to_owned());
        }
        Ok(Compressed {
            cache: Cache::new(header.page_size),
            header,
            index,
            gaps: Vec::new(),
            ranges: OnceCell::new(),
            lost: OnceCell::new(),
        })
    }

    /// The page's descriptor, if its bytes are in the file.
    fn descriptor(&self, number: u64, content: Content<'_>) -> Option<Descriptor> {
        let at = number.checked_mul(DESCRIPTOR)?.checked_add(self.header.descriptors)?;
        let raw = content.read(at, DESCRIPTOR as usize)?;
        let found = Descriptor {
            offset: bytes::u64_at(&raw, 0)?,
            size: bytes::u32_at(&raw, 8)?,
            flags: bytes::u32_at(&raw, 12)?,
        };
        let end = found.offset.checked_add(u64::from(found.size))?;
        (found.size != 0 && end <= content.len() && content.run(found.offset, 1).is_some())
            .then_some(found)
    }

    fn unpack(&self, page: u64, at: PhysAddr, content: Content<'_>) -> Result<Vec<u8>, ReadError> {
        let size = self.header.page_size as usize;
        let Some(number) = self.index.number(page, content) else {
            return match self.was_left_out(page, content) {
                true if self.header.leaves_out_only_zeros() => Ok(vec![0; size]),
                true => Err(ReadError::LeftOut(at)),
                false => Err(ReadError::NotInDump(at)),
            };
        };
        let found = self.descriptor(number, content).ok_or(ReadError::NotInDump(at))?;
        // No packer makes a page much longer than it was.
        let packed = usize::try_from(found.size).ok().filter(|&packed| packed <= 2 * size);
        let packed = packed.and_then(|packed| content.read(found.offset, packed));
        let page = packed.and_then(|packed| codec::unpack(found.flags, &packed, size));
        page.ok_or(ReadError::Damaged(at))
    }

    /// Whether the page exists and was not dumped: both bitmaps must be there to tell.
    fn was_left_out(&self, page: u64, content: Content<'_>) -> bool {
        let dumped = self.header.bitmap;
        let existing = dumped - self.header.bitmap_size;
        page < self.header.pages
            && index::bit(existing, page, content) == Some(true)
            && index::bit(dumped, page, content) == Some(false)
    }

    /// Whether pages may be missing: looks at the end of the file only, as long as that is whole.
    fn is_cut(&self, content: Content<'_>) -> bool {
        // Packed pages lie in the order of their descriptors, but all pages of zeros share one place.
        let mut last = None;
        for number in (0..self.index.count()).rev() {
            let Some(found) = self.descriptor(number, content) else { return true };
            if last.is_some_and(|last| last != found.offset) {
                break;
            }
            last = Some(found.offset);
        }
        self.header.is_incomplete
    }

    /// How many pages should be in the file, and are not.
    fn lost(&self, content: Content<'_>) -> u64 {
        *self.lost.get_or_init(|| match self.is_cut(content) {
            true => {
                let there = |number: &u64| self.descriptor(*number, content).is_some();
                self.index.count() - (0..self.index.count()).filter(there).count() as u64
            }
            false => 0,
        })
    }

    /// The physical ranges whose pages are in the file.
    fn find_ranges(&self, content: Content<'_>) -> Vec<Range<u64>> {
        let is_whole = self.lost(content) == 0;
        let size = self.header.page_size;
        let (mut ranges, mut number) = (Vec::<Range<u64>>::new(), 0);
        self.index.pages(content, |page| {
            let is_there = is_whole || self.descriptor(number, content).is_some();
            number += 1;
            let Some(start) = page.checked_mul(size).filter(|_| is_there) else { return };
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = start.saturating_add(size),
                _ => ranges.push(start..start.saturating_add(size)),
            }
        });
        without_all(ranges, &self.gaps)
    }
}

impl Form for Compressed {
    fn machine(&self) -> u16 {
        self.header.machine
    }

    fn notes(&self) -> Vec<&[u8]> {
        vec![&self.header.notes]
    }

    fn vmcoreinfo(&self) -> Option<&[u8]> {
        Some(&self.header.vmcoreinfo[..]).filter(|text| !text.is_empty())
    }

    fn leave_out(&mut self, gaps: &[Range<u64>]) {
        self.gaps = gaps.to_vec();
    }

    fn run<'a>(
        &'a self,
        content: Content<'a>,
        at: PhysAddr,
        max: usize,
    ) -> Result<Cow<'a, [u8]>, ReadError> {
        let page = at.0 / self.header.page_size;
        let bytes = self.cache.get(page, || self.unpack(page, at, content))?;
        let skip = (at.0 % self.header.page_size) as usize;
        let mut end = bytes.len().min(skip.saturating_add(max));
        for gap in &self.gaps {
            if gap.contains(&at.0) {
                return Err(ReadError::NotInDump(at));
            }
            if gap.start > at.0 {
                let before = usize::try_from(gap.start - at.0).unwrap_or(usize::MAX);
                end = end.min(skip.saturating_add(before));
            }
        }
        Ok(Cow::Owned(bytes[skip..end].to_vec()))
    }

    fn ranges(&self, content: Content<'_>) -> &[Range<u64>] {
        self.ranges.get_or_init(|| self.find_ranges(content))
    }

    /// The page tables are all there is: no header says where the kernel's image lies.
    fn linear(&self, _: VirtAddr) -> Option<PhysAddr> {
        None
    }

    fn problem(&self, content: Content<'_>) -> Option<String> {
        let mut reasons = Vec::new();
        let elsewhere = self.index.elsewhere();
        if elsewhere != 0 {
            reasons.push(format!(
                "it is one of several files (makedumpfile --split), and {elsewhere} pages are in the others"
            ));
        }
        if self.header.is_incomplete {
            reasons.push("whoever wrote it marked it so (status in the header)".to_owned());
        }
        let (lost, count) = (self.lost(content), self.index.count());
        if lost != 0 {
            reasons.push(format!("{lost} of {count} pages are cut off or were never written"));
        }
        (!reasons.is_empty()).then(|| reasons.join(", "))
    }
}
