//! A kernel's memory for fuzz targets: 64 KiB at [`VIRT`], with what a target puts there and then patches.

use std::borrow::Cow;
use std::ops::Range;

use host_analyzer::kernel::paging::X86PageTables;
use host_analyzer::kernel::virt::VirtualMemory;
use host_analyzer::source::Memory;
use host_analyzer::{PhysAddr, ReadError, VirtAddr};

/// Where physical address 0 is mapped, 2 MiB of it.
pub const VIRT: u64 = 0xffff_8880_0000_0000;
const SIZE: usize = 0x10000;
/// Four pages of page tables.
const TABLES: u64 = 0xc000;

/// All of it is in the dump, up to an end that a patch may move.
pub struct World {
    bytes: Vec<u8>,
    range: [Range<u64>; 1],
}

impl Default for World {
    fn default() -> World {
        let mut world = World { bytes: vec![0; SIZE], range: [0..SIZE as u64] };
        let slot = |level: u32| (VIRT >> (12 + 9 * level)) % 512 * 8;
        world.put_u64(TABLES + slot(3), (TABLES + 0x1000) | 1);
        world.put_u64(TABLES + 0x1000 + slot(2), (TABLES + 0x2000) | 1);
        world.put_u64(TABLES + 0x2000 + slot(1), 0x81);
        world
    }
}

impl World {
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize % SIZE;
        let length = bytes.len().min(SIZE - at);
        self.bytes[at..at + length].copy_from_slice(&bytes[..length]);
    }

    pub fn put_u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Patches: where from `base` on (two bytes), how many bytes (one), those bytes. Returns what is left.
    pub fn patch<'b>(&mut self, base: u64, mut patches: &'b [u8]) -> &'b [u8] {
        while let [low, high, size, rest @ ..] = patches
            && let Some((bytes, rest)) = rest.split_at_checked(usize::from(*size))
        {
            self.put(base + u64::from(u16::from_le_bytes([*low, *high])), bytes);
            patches = rest;
        }
        patches
    }

    pub fn memory(&self) -> VirtualMemory<'_> {
        VirtualMemory::new(self, Box::new(X86PageTables::new(PhysAddr(TABLES), 4, 0)))
    }
}

impl Memory for World {
    fn run(&self, at: PhysAddr, max: usize) -> Result<Cow<'_, [u8]>, ReadError> {
        let rest = usize::try_from(at.0).ok().and_then(|at| self.bytes.get(at..));
        let rest = rest.filter(|rest| !rest.is_empty()).ok_or(ReadError::NotInDump(at))?;
        Ok(Cow::Borrowed(&rest[..rest.len().min(max)]))
    }

    fn ranges(&self) -> &[Range<u64>] {
        &self.range
    }

    fn linear(&self, _: VirtAddr) -> Option<PhysAddr> {
        None
    }
}
