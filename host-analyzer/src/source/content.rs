//! The bytes of a dump as its own headers count them: as they lie in the file, or put in order by the
//! records of a flattened one.

use std::borrow::Cow;

use super::flattened::Records;

/// Of what was never written, a structure may hold this much: the rest of a header's block.
const MAX_FILLER: usize = 64 << 10;

/// The bytes of a dump. Offsets are those that its headers give.
#[derive(Clone, Copy)]
pub(super) struct Content<'a> {
    bytes: &'a [u8],
    records: Option<&'a Records>,
}

impl<'a> Content<'a> {
    /// Those of a file that is read as it is.
    pub fn plain(bytes: &'a [u8]) -> Content<'a> {
        Content { bytes, records: None }
    }

    /// Those of the flattened file `bytes`, whose records are `records`.
    pub fn flattened(bytes: &'a [u8], records: &'a Records) -> Content<'a> {
        Content { bytes, records: Some(records) }
    }

    /// Where it ends.
    pub fn len(self) -> u64 {
        self.records.map_or(self.bytes.len() as u64, Records::end)
    }

    /// The bytes from `at` on, as far as they lie together in the file, at most `max` of them and at
    /// least one.
    pub fn run(self, at: u64, max: usize) -> Option<&'a [u8]> {
        let (at, max) = match self.records {
            None => (at, max),
            Some(records) => {
                let (start, length) = records.find(at)?;
                (start, max.min(usize::try_from(length).unwrap_or(usize::MAX)))
            }
        };
        let rest = self.bytes.get(usize::try_from(at).ok()?..)?;
        Some(&rest[..rest.len().min(max)]).filter(|run| !run.is_empty())
    }

    /// The `size` bytes at `at`; `None` when the dump ends before. What lies before the end and was
    /// never written is zeros, as it would be in a sparse file.
    pub fn read(self, at: u64, size: usize) -> Option<Cow<'a, [u8]>> {
        let run = self.run(at, size).unwrap_or_default();
        if run.len() == size {
            return Some(Cow::Borrowed(run));
        }
        let is_inside = at.checked_add(size as u64)? <= self.len();
        // Longer than all that was written: its size is wrong, and not worth the memory.
        if !is_inside || size > self.bytes.len().saturating_add(MAX_FILLER) {
            return None;
        }
        let mut out = Vec::with_capacity(size);
        while out.len() < size {
            let (here, left) = (at + out.len() as u64, size - out.len());
            match self.run(here, left) {
                Some(run) => out.extend_from_slice(run),
                None => {
                    let gap = self.records?.until_next(here).map_or(left as u64, |gap| gap.max(1));
                    out.resize(out.len() + left.min(usize::try_from(gap).unwrap_or(left)), 0);
                }
            }
        }
        Some(Cow::Owned(out))
    }

    /// The same, cut to where the dump ends.
    pub fn read_up_to(self, at: u64, size: u64) -> Cow<'a, [u8]> {
        let size = size.min(self.len().saturating_sub(at));
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        self.read(at, size).unwrap_or_default()
    }
}
