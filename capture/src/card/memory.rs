//! The dead kernel's virtual memory, read a little at a time.
//!
//! Everything that the card reads but the notes goes through [`KernelMemory`]: its addresses are the dead kernel's
//! allegations, so they are translated by its page tables, and the outcome must lie in a range of
//! [`OldMemory`]. What all reads together may cost is limited, so that no structure in old memory,
//! however broken, can keep the dump waiting.

use crate::old::OldMemory;
use crate::{Machine, OldPhys};

use super::paging::{Mapping, Tables};

/// Bytes of a line of the cache.
const LINE: usize = 512;
/// Lines of the cache.
const LINES: usize = 4;
/// Lines begin at multiples of their size, so the lowest bit of where they do is free.
const READ: u64 = 1;
/// Mappings that are remembered.
const MAPPINGS: usize = 8;

/// What everything that is read for one print of the card may cost: about a byte each. A kernel's
/// types and the names of its symbols, read once, are below 8 MiB.
pub(super) const BUDGET: u64 = 32 << 20;
/// What a read costs besides its bytes; one that the cache answers costs 1.
pub(super) const COST: u64 = 64;

/// What was read last.
pub struct Cache {
    lines: [[u8; LINE]; LINES],
    /// Where each line was read, with [`READ`] set; 0 for none.
    at: [u64; LINES],
    mappings: [Mapping; MAPPINGS],
    next: usize,
}

impl Cache {
    /// Nothing was read yet.
    pub const fn new() -> Cache {
        Cache {
            lines: [[0; LINE]; LINES],
            at: [0; LINES],
            mappings: [Mapping::NONE; MAPPINGS],
            next: 0,
        }
    }
}

/// The dead kernel's virtual memory.
pub struct KernelMemory<'a> {
    machine: &'a mut dyn Machine,
    old: &'a OldMemory,
    tables: Option<Tables>,
    cache: &'a mut Cache,
    budget: u64,
    /// Whether something was not read because of that.
    is_spent: bool,
}

impl<'a> KernelMemory<'a> {
    /// The memory that `tables` map; without them nothing can be read.
    pub fn new(
        machine: &'a mut dyn Machine,
        old: &'a OldMemory,
        tables: Option<Tables>,
        cache: &'a mut Cache,
    ) -> KernelMemory<'a> {
        KernelMemory { machine, old, tables, cache, budget: BUDGET, is_spent: false }
    }

    /// The machine below.
    pub fn machine(&mut self) -> &mut dyn Machine {
        self.machine
    }

    /// Allows as many bytes more to be read as are asked for, within what is allowed for all.
    pub fn allow(&mut self, bytes: u64) {
        self.budget = self.budget.saturating_add(bytes.min(BUDGET));
    }

    /// Whether something was not read because more was asked for than is allowed.
    pub fn is_spent(&self) -> bool {
        self.is_spent
    }

    fn spend(&mut self, cost: u64) -> Option<()> {
        let left = self.budget.checked_sub(cost);
        self.is_spent |= left.is_none();
        self.budget = left?;
        Some(())
    }

    /// Whether page tables are known.
    pub fn is_mapped(&self) -> bool {
        self.tables.is_some()
    }

    /// Reads `into.len()` bytes at `at`; `None` when any of them cannot be read.
    pub fn read(&mut self, at: u64, into: &mut [u8]) -> Option<()> {
        let mut done = 0;
        while done < into.len() {
            let (phys, size) = self.translate(at.checked_add(done as u64)?)?;
            let some = (into.len() - done).min(usize::try_from(size).unwrap_or(usize::MAX));
            self.read_phys(phys, into.get_mut(done..done + some)?)?;
            done += some;
        }
        Some(())
    }

    /// The `N` bytes at `at`.
    pub fn bytes<const N: usize>(&mut self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let (start, skip) = (at - at % LINE as u64, (at % LINE as u64) as usize);
        match self.line(start).and_then(|line| line.get(skip..skip.checked_add(N)?)) {
            Some(found) => bytes.copy_from_slice(found),
            // Across two lines, or near the end of memory.
            None => self.read(at, &mut bytes)?,
        }
        Some(bytes)
    }

    /// The byte at `at`.
    pub fn u8(&mut self, at: u64) -> Option<u8> {
        self.bytes(at).map(u8::from_le_bytes)
    }

    /// The 16-bit word at `at`.
    pub fn u16(&mut self, at: u64) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    /// The 32-bit word at `at`.
    pub fn u32(&mut self, at: u64) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    /// The 64-bit word at `at`.
    pub fn u64(&mut self, at: u64) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }

    /// Fills `into` with the text at `at` up to its zero, and returns how long it is: as much of it as
    /// fits and can be read.
    pub fn text(&mut self, at: u64, into: &mut [u8]) -> usize {
        for (index, slot) in into.iter_mut().enumerate() {
            let byte = at.checked_add(index as u64).and_then(|at| self.u8(at));
            match byte {
                None | Some(0) => return index,
                Some(byte) => *slot = byte,
            }
        }
        into.len()
    }

    /// Whether there is memory at `at`.
    pub fn has(&mut self, at: u64) -> bool {
        self.translate(at).is_some()
    }

    /// The cached line at `start`, a multiple of its size.
    fn line(&mut self, start: u64) -> Option<&[u8; LINE]> {
        self.spend(1)?;
        let slot = (start / LINE as u64) as usize % LINES;
        if self.cache.at[slot] != start | READ {
            let mut line = [0; LINE];
            self.read(start, &mut line)?;
            self.cache.at[slot] = start | READ;
            self.cache.lines[slot] = line;
        }
        Some(&self.cache.lines[slot])
    }

    /// Walks the page tables for `at`, past what is remembered of them; `entry` sees where each entry is
    /// that is read. `Err` has the size of the hole that is there instead.
    pub fn look_up(&mut self, at: u64, entry: &mut dyn FnMut(u64)) -> Result<Mapping, u64> {
        let Some(tables) = self.tables else { return Err(u64::MAX) };
        tables.look_up(at, &mut |phys| {
            entry(phys);
            let mut bytes = [0; 8];
            self.read_phys(phys, &mut bytes)?;
            Some(u64::from_le_bytes(bytes))
        })
    }

    /// Size of a page in bytes.
    pub fn page_size(&self) -> u64 {
        self.tables.map_or(4096, |tables| tables.page_size())
    }

    /// The first of the kernel's own addresses, and how many bytes a table of the last level maps.
    pub fn kernel_half(&self) -> Option<(u64, u64)> {
        self.tables.map(|tables| tables.kernel_half())
    }

    fn translate(&mut self, at: u64) -> Option<(u64, u64)> {
        if let Some(found) = self.cache.mappings.iter().find_map(|mapping| mapping.phys(at)) {
            return Some(found);
        }
        let tables = self.tables?;
        let mapping = tables.walk(at, &mut |entry| {
            let mut bytes = [0; 8];
            self.read_phys(entry, &mut bytes)?;
            Some(u64::from_le_bytes(bytes))
        })?;
        self.cache.mappings[self.cache.next % MAPPINGS] = mapping;
        self.cache.next = (self.cache.next + 1) % MAPPINGS;
        mapping.phys(at)
    }

    /// Reads physical memory, all of it in known ranges.
    fn read_phys(&mut self, phys: u64, into: &mut [u8]) -> Option<()> {
        self.spend(into.len() as u64 + COST)?;
        let mut done = 0;
        while done < into.len() {
            let at = phys.checked_add(done as u64)?;
            let (source, left) = self.old.ranges().iter().find_map(|range| {
                let skip = at.checked_sub(range.phys).filter(|&skip| skip < range.size)?;
                Some((range.source.0.checked_add(skip)?, range.size - skip))
            })?;
            let some = (into.len() - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            let part = into.get_mut(done..done + some)?;
            self.machine.read_old(OldPhys(source), part).ok()?;
            done += some;
        }
        Some(())
    }
}
