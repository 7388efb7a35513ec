//! Physical memory beyond the payload's own, through the windows of its page tables.

use drivers::mmio::Mmio;
use drivers::pci::MapPage;
use drivers::{PhysAddr, Physical};

use crate::arch;

/// All physical memory below `limit`: read-only, and every read may fail.
pub struct PhysicalMemory {
    /// The first address that the processor cannot address.
    pub limit: u64,
}

impl Physical for PhysicalMemory {
    fn read(&self, at: PhysAddr, mut into: &mut [u8]) -> bool {
        let mut address = at.0;
        while !into.is_empty() {
            let inside =
                address.checked_add(into.len() as u64).is_some_and(|end| end <= self.limit);
            let Some((from, contiguous)) =
                inside.then(|| arch::paging::old_page(PhysAddr(address))).flatten()
            else {
                return false;
            };
            let size = into.len().min(contiguous as usize);
            let (some, rest) = into.split_at_mut(size);
            // SAFETY: old_page mapped `contiguous` bytes at `from`, and nothing has been mapped
            // since.
            if !unsafe { arch::trap::copy_old(some, from) } {
                return false;
            }
            into = rest;
            address += size as u64;
        }
        true
    }

    fn map_device(&self, at: PhysAddr, size: u64) -> Option<Mmio> {
        let end = at.0.checked_add(size)?;
        (end <= self.limit).then(|| arch::paging::device_pages(at, size)).flatten()
    }
}

impl MapPage for PhysicalMemory {
    fn with_page<T>(&self, at: PhysAddr, with: impl FnOnce(&Mmio) -> T) -> Option<T> {
        (at.0 < self.limit).then(|| arch::paging::with_device_page(at, with)).flatten()
    }
}
