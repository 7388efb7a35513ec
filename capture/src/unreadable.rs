//! What of old memory could not be read.

use format::record;

use crate::OldPhys;

/// What could not be read.
#[derive(Clone, Copy, Default)]
pub struct Unreadable {
    /// Pages, or parts of them.
    pub pages: u64,
    /// Where they are, as far as there is room.
    pub ranges: [record::Range; record::LISTED],
}

impl Unreadable {
    /// Adds a page, or `size` bytes of one. They come in the order of the core.
    pub fn add(&mut self, at: OldPhys, size: u64) {
        self.pages += 1;
        let used = self.ranges.iter().take_while(|range| range.size.get() > 0).count();
        if let Some(last) = used.checked_sub(1).map(|last| &mut self.ranges[last])
            && last.start.get() + last.size.get() == at.0
        {
            last.size += size;
        } else if let Some(free) = self.ranges.get_mut(used) {
            *free = record::Range { start: at.0.into(), size: size.into() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_pages_side_by_side_are_one_range_and_the_last_ones_are_only_counted() {
        let mut unreadable = Unreadable::default();
        for index in 0..40 {
            unreadable.add(OldPhys(index << 20), 4096);
            unreadable.add(OldPhys((index << 20) + 4096), 100);
        }
        assert_eq!(unreadable.pages, 80);
        let last = unreadable.ranges.last().unwrap();
        assert_eq!((last.start.get(), last.size.get()), (31 << 20, 4196));
    }
}
