//! Physical memory beyond the payload's own, through the windows of its page tables.

use core::ops;

use capture::old::{OldMemory, Range};
use drivers::mmio::Mmio;
use drivers::pci::MapPage;
use drivers::{PhysAddr, Physical};

use crate::arch::trap;
use crate::windows::{self, PAGE};

/// All physical memory: readable, and every read may fail; never written. Device registers are
/// mapped only where no memory is, whatever firmware tables and BARs claim.
pub struct PhysicalMemory<'a> {
    /// The first address that the processor cannot address.
    pub limit: u64,
    /// The memory that was reserved for the payload, as far as that is known; at least its image.
    pub own: ops::Range<u64>,
    /// The dead kernel's memory; while it is not known, no device is mapped at all.
    pub old: Option<&'a OldMemory>,
}

impl PhysicalMemory<'_> {
    /// Memory before the dead kernel's part of it is known.
    pub const fn without_devices(limit: u64, own: ops::Range<u64>) -> PhysicalMemory<'static> {
        PhysicalMemory { limit, own, old: None }
    }

    /// The same, now that the dead kernel's part of it is known.
    pub fn with_devices<'a>(&self, old: &'a OldMemory) -> PhysicalMemory<'a> {
        PhysicalMemory { limit: self.limit, own: self.own.clone(), old: Some(old) }
    }

    /// Reads the bytes at `at`, if they can be read.
    pub fn read_bytes<const N: usize>(&self, at: PhysAddr) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes).then_some(bytes)
    }

    /// Maps `size` bytes of registers at `at`, within one page, for as long as `with` runs. Not to be
    /// nested.
    pub fn with_registers<T>(
        &self,
        at: PhysAddr,
        size: u64,
        with: impl FnOnce(&Mmio) -> T,
    ) -> Option<T> {
        self.with_page(at, |page| page.part(at.0 % PAGE, size).map(|part| with(&part))).flatten()
    }

    /// Maps registers before it is known where memory is, those of the console and the clock: only
    /// here is firmware believed that there is none. Without them a dump that fails has no reason.
    pub fn map_early(&self, at: PhysAddr, size: u64) -> Option<Mmio> {
        self.is_elsewhere(at, size).then(|| windows::device_pages(at, size)).flatten()
    }

    /// Whether `size` bytes at `at` exist and are not the payload's own.
    fn is_elsewhere(&self, at: PhysAddr, size: u64) -> bool {
        let end = at.0.checked_add(size).filter(|&end| end <= self.limit);
        end.is_some_and(|end| end <= self.own.start || self.own.end <= at.0)
    }

    /// Whether device registers may be at `at`.
    fn may_be_device(&self, at: PhysAddr, size: u64) -> bool {
        self.is_elsewhere(at, size)
            && self.old.is_some_and(|old| {
                old.ranges().iter().all(|&Range { source, size: memory, .. }| {
                    at.0 + size <= source.0 || source.0 + memory <= at.0
                })
            })
    }
}

impl Physical for PhysicalMemory<'_> {
    fn read(&self, at: PhysAddr, mut into: &mut [u8]) -> bool {
        let mut address = at.0;
        while !into.is_empty() {
            let inside =
                address.checked_add(into.len() as u64).is_some_and(|end| end <= self.limit);
            let Some((from, contiguous)) =
                inside.then(|| windows::old_page(PhysAddr(address))).flatten()
            else {
                return false;
            };
            let size = into.len().min(contiguous as usize);
            let (some, rest) = into.split_at_mut(size);
            // SAFETY: old_page mapped `contiguous` bytes at `from`, and nothing has been mapped
            // since.
            if !unsafe { trap::copy_old(some, from) } {
                return false;
            }
            into = rest;
            address += size as u64;
        }
        true
    }

    fn map_device(&self, at: PhysAddr, size: u64) -> Option<Mmio> {
        self.may_be_device(at, size).then(|| windows::device_pages(at, size)).flatten()
    }
}

impl MapPage for PhysicalMemory<'_> {
    fn with_page<T>(&self, at: PhysAddr, with: impl FnOnce(&Mmio) -> T) -> Option<T> {
        let page = PhysAddr(at.0 & !(PAGE - 1));
        self.may_be_device(page, PAGE).then(|| windows::with_device_page(page, with)).flatten()
    }
}
