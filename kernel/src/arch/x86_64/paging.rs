//! The payload's own page tables, in constant memory.
//!
//! | virtual addresses | what |
//! |---|---|
//! | those of the payload, identity | its own image: code read-only, data writable and no-execute, guard page absent |
//! | [`OLD_WINDOW`] | old memory: 512 slots of 1 GiB, or of 2 MiB where the CPU lacks 1 GiB pages; read-only, no-execute |
//! | [`DEVICE_WINDOW`] | device registers: 512 pages of 4 KiB, uncached, no-execute |
//!
//! Both windows lie in the same place for 4- and 5-level page tables: the payload keeps the number
//! of levels that it was entered with, because that cannot be changed in 64-bit mode.

use core::arch::x86_64::__cpuid;
use core::cell::UnsafeCell;

use drivers::PhysAddr;
use x86_64::instructions::tlb;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::{Efer, EferFlags};
use x86_64::structures::paging::page_table::PageTableEntry;
use x86_64::structures::paging::{PageTable, PageTableFlags as Flags, PhysFrame};
use x86_64::{PhysAddr as TablePhys, VirtAddr};

use super::trap::STACKS;
use crate::image::{self, Content};
use crate::windows::PAGE;

/// Where the window of old memory begins: the first address of the upper half with 4 levels.
pub const OLD_WINDOW: u64 = 0xffff_8000_0000_0000;
/// Where the window of device registers begins.
pub const DEVICE_WINDOW: u64 = 0xffff_8080_0000_0000;

/// Tables of all levels but the windows' lowest. With 5 levels: the root, one below it for each half
/// of the address space, one for the window of old memory (with 2 MiB slots), two for that of
/// devices, and two of each of the three lowest levels, as the image may straddle a boundary.
const POOL: usize = 1 + 2 + 1 + 2 + 2 * 3;

/// The tables' memory. It holds nothing else, because everything in it is rounded up to a page.
#[repr(C)]
struct TableMemory {
    pool: [PageTable; POOL],
    /// The lowest table of each window.
    old: PageTable,
    device: PageTable,
}

/// The tables, and with them the right to change them.
pub struct Tables {
    memory: &'static mut TableMemory,
    /// Tables of the pool in use.
    used: usize,
    /// Size of a slot of old memory: 1 GiB or 2 MiB.
    old_slot: u64,
}

struct TableStatic(UnsafeCell<TableMemory>);

// SAFETY: taken once, by `init`; from then on it belongs to the `Tables` that it returned.
unsafe impl Sync for TableStatic {}

static MEMORY: TableStatic = TableStatic(UnsafeCell::new(TableMemory {
    pool: [const { PageTable::new() }; POOL],
    old: PageTable::new(),
    device: PageTable::new(),
}));

/// Makes the tables and switches to them. To be called once.
pub fn init() -> Tables {
    let huge = __cpuid(0x8000_0001).edx & 1 << 26 != 0;
    let mut tables = Tables {
        // SAFETY: this runs once, so the reference is the only one.
        memory: unsafe { &mut *MEMORY.0.get() },
        used: 1,
        old_slot: if huge { 1 << 30 } else { 2 << 20 },
    };
    map_image(&mut tables);
    map_windows(&mut tables);
    let root = TablePhys::new(&raw const tables.memory.pool[0] as u64);

    // SAFETY: the new tables map the running code, its data and its stack where they are now.
    // NXE and WP only take rights away that nothing here uses.
    unsafe {
        Efer::update(|flags| flags.insert(EferFlags::NO_EXECUTE_ENABLE));
        Cr4::update(|flags| flags.remove(Cr4Flags::PAGE_GLOBAL));
        Cr3::write(PhysFrame::containing_address(root), Cr3Flags::empty());
        Cr0::update(|flags| {
            flags.insert(Cr0Flags::WRITE_PROTECT);
            flags.remove(Cr0Flags::CACHE_DISABLE | Cr0Flags::NOT_WRITE_THROUGH);
        });
    }
    tables
}

impl Tables {
    /// Size of a slot of the window of old memory, in bytes.
    pub fn old_slot(&self) -> u64 {
        self.old_slot
    }

    /// Makes slot `slot` of the window of old memory show the memory at `at`, read-only.
    pub fn map_old(&mut self, slot: u64, at: PhysAddr) {
        let entry = &mut self.memory.old[slot as usize];
        let memory = TablePhys::new_truncate(at.0);
        if entry.is_unused() || entry.addr() != memory {
            entry.set_addr(memory, Flags::PRESENT | Flags::NO_EXECUTE | Flags::HUGE_PAGE);
            tlb::flush(VirtAddr::new(OLD_WINDOW + slot * self.old_slot));
        }
    }

    /// Takes everything out of the window of old memory, whatever the processor remembers of it.
    pub fn close_old(&mut self) {
        self.memory.old.zero();
        tlb::flush_all();
    }

    /// Makes page `page` of the window of device registers show the registers at `at`, uncached.
    pub fn map_device(&mut self, page: u64, at: PhysAddr) {
        // Both cache bits: entry 3 of the PAT, which is uncached after reset and under Linux.
        let flags = Flags::PRESENT
            | Flags::WRITABLE
            | Flags::NO_EXECUTE
            | Flags::NO_CACHE
            | Flags::WRITE_THROUGH;
        self.memory.device[page as usize].set_addr(TablePhys::new_truncate(at.0), flags);
        tlb::flush(VirtAddr::new(DEVICE_WINDOW + page * PAGE));
    }
}

fn map_image(tables: &mut Tables) {
    for (page, content) in image::pages(|page| STACKS.iter().any(|stack| page == stack.guard())) {
        let rights = match content {
            Content::Code => Flags::empty(),
            Content::Constants => Flags::NO_EXECUTE,
            Content::Data => Flags::NO_EXECUTE | Flags::WRITABLE,
        };
        entry(tables, page, 1).set_addr(TablePhys::new(page), Flags::PRESENT | rights);
    }
}

fn map_windows(tables: &mut Tables) {
    let links = Flags::PRESENT | Flags::WRITABLE;
    let old = TablePhys::new(&raw const tables.memory.old as u64);
    // The table of 1 GiB slots is the third level's, the one of 2 MiB slots the second's.
    let level = if tables.old_slot == 1 << 30 { 4 } else { 3 };
    entry(tables, OLD_WINDOW, level).set_addr(old, links);
    let device = TablePhys::new(&raw const tables.memory.device as u64);
    entry(tables, DEVICE_WINDOW, 2).set_addr(device, links);
}

/// The entry for `address` in the table of `level`, 1 being that of 4 KiB pages; tables above it
/// are taken from the pool as needed.
fn entry(tables: &mut Tables, address: u64, level: u32) -> &mut PageTableEntry {
    let five = Cr4::read().contains(Cr4Flags::L5_PAGING);
    let index = |level: u32| (address >> (12 + 9 * (level - 1)) & 511) as usize;
    let mut table = 0;
    for above in (level + 1..=if five { 5 } else { 4 }).rev() {
        let next = &tables.memory.pool[table][index(above)];
        table = if next.is_unused() {
            let fresh = tables.used;
            tables.used += 1;
            let at = TablePhys::new(&raw const tables.memory.pool[fresh] as u64);
            tables.memory.pool[table][index(above)].set_addr(at, Flags::PRESENT | Flags::WRITABLE);
            fresh
        } else {
            let base = &raw const tables.memory.pool[0] as u64;
            ((next.addr().as_u64() - base) / PAGE) as usize
        };
    }
    &mut tables.memory.pool[table][index(level)]
}
