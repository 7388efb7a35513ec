//! The payload's own page tables, in constant memory.
//!
//! | virtual addresses | what |
//! |---|---|
//! | those of the payload, identity | its own image: code read-only, data writable and no-execute, guard page absent |
//! | [`OLD_WINDOW`] | old memory: 512 slots of 1 GiB, or of 2 MiB where the CPU lacks 1 GiB pages; read-only, no-execute |
//! | [`DEVICE_WINDOW`] | device registers: 512 pages of 4 KiB, uncached, no-execute |
//!
//! Slots are filled on demand, so the tables are as large for 512 MB as for 12 TB. Both windows lie
//! in the same place for 4- and 5-level page tables: the payload keeps the number of levels that it
//! was entered with, because that cannot be changed in 64-bit mode.

use core::arch::x86_64::__cpuid;
use core::cell::UnsafeCell;
use core::ptr::NonNull;

use drivers::PhysAddr;
use drivers::mmio::Mmio;
use spin::{Mutex, MutexGuard, Once};
use x86_64::instructions::tlb;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::{Efer, EferFlags};
use x86_64::structures::paging::page_table::PageTableEntry;
use x86_64::structures::paging::{PageTable, PageTableFlags as Flags, PhysFrame};
use x86_64::{PhysAddr as TablePhys, VirtAddr};

use super::entry::{__data_start, __image_end, __image_start, __rodata_start, STACK};
use super::trap::STACKS;

/// Where the window of old memory begins: the first address of the upper half with 4 levels.
const OLD_WINDOW: u64 = 0xffff_8000_0000_0000;
/// Where the window of device registers begins.
const DEVICE_WINDOW: u64 = 0xffff_8080_0000_0000;

const SLOTS: u64 = 512;
const PAGE: u64 = 4096;

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

struct Tables {
    memory: &'static mut TableMemory,
    /// Tables of the pool in use.
    used: usize,
    /// Size of a slot of old memory: 1 GiB or 2 MiB.
    old_slot: u64,
    /// Pages of the device window in use; the first is for [`with_device_page`].
    device_pages: u64,
}

struct TableStatic(UnsafeCell<TableMemory>);

// SAFETY: taken once, by `init`; from then on it is behind the lock of `TABLES`.
unsafe impl Sync for TableStatic {}

static MEMORY: TableStatic = TableStatic(UnsafeCell::new(TableMemory {
    pool: [const { PageTable::new() }; POOL],
    old: PageTable::new(),
    device: PageTable::new(),
}));

/// The tables in force.
static TABLES: Once<Mutex<Tables>> = Once::new();

/// Makes the tables and switches to them. To be called once.
pub fn init() {
    let huge = __cpuid(0x8000_0001).edx & 1 << 26 != 0;
    let tables = TABLES.call_once(|| {
        let mut tables = Tables {
            // SAFETY: this runs once, so the reference is the only one.
            memory: unsafe { &mut *MEMORY.0.get() },
            used: 1,
            old_slot: if huge { 1 << 30 } else { 2 << 20 },
            device_pages: 1,
        };
        map_image(&mut tables);
        map_windows(&mut tables);
        Mutex::new(tables)
    });
    let root = TablePhys::new(&raw const tables.lock().memory.pool[0] as u64);

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
}

/// A pointer to the old memory at `at`, and how many bytes from there on it is good for. Only until
/// the next call: the slot may be given to other memory then.
///
/// `None` when the tables are not in force, or in use by whoever was interrupted.
pub fn old_page(at: PhysAddr) -> Option<(*const u8, u64)> {
    let mut tables = active_tables()?;
    let size = tables.old_slot;
    let (slot, offset) = (at.0 / size % SLOTS, at.0 % size);
    let window = OLD_WINDOW + slot * size;
    let entry = &mut tables.memory.old[slot as usize];
    let memory = TablePhys::new_truncate(at.0 - offset);
    if entry.is_unused() || entry.addr() != memory {
        entry.set_addr(memory, Flags::PRESENT | Flags::NO_EXECUTE | Flags::HUGE_PAGE);
        tlb::flush(VirtAddr::new(window));
    }
    Some(((window + offset) as *const u8, size - offset))
}

/// Maps `size` bytes of device registers at `at` for good. `None` when the window is full.
pub fn device_pages(at: PhysAddr, size: u64) -> Option<Mmio> {
    let mut tables = active_tables()?;
    let offset = at.0 % PAGE;
    let pages = offset.checked_add(size)?.div_ceil(PAGE);
    let first = tables.device_pages;
    if size == 0 || pages > SLOTS - first {
        return None;
    }
    for page in 0..pages {
        let register = at.0.checked_sub(offset)?.checked_add(page * PAGE)?;
        map_device_page(&mut tables.memory.device[(first + page) as usize], register);
    }
    tables.device_pages += pages;
    drop(tables);
    let base = NonNull::new((DEVICE_WINDOW + first * PAGE + offset) as *mut u8)?;
    // SAFETY: just mapped, uncached, and the page is never given away again.
    Some(unsafe { Mmio::new(base, size) })
}

/// Maps the page of device registers at `at` for as long as `with` runs. Not to be nested.
pub fn with_device_page<T>(at: PhysAddr, with: impl FnOnce(&Mmio) -> T) -> Option<T> {
    let mut tables = active_tables()?;
    map_device_page(&mut tables.memory.device[0], at.0 & !(PAGE - 1));
    tlb::flush(VirtAddr::new(DEVICE_WINDOW));
    let base = NonNull::new(DEVICE_WINDOW as *mut u8)?;
    // SAFETY: just mapped, uncached; the lock is held, so nobody maps something else meanwhile.
    Some(with(&unsafe { Mmio::new(base, PAGE) }))
}

fn map_device_page(entry: &mut PageTableEntry, at: u64) {
    // Both cache bits: entry 3 of the PAT, which is uncached after reset and under Linux.
    let flags = Flags::PRESENT
        | Flags::WRITABLE
        | Flags::NO_EXECUTE
        | Flags::NO_CACHE
        | Flags::WRITE_THROUGH;
    entry.set_addr(TablePhys::new_truncate(at), flags);
}

/// The tables, unless they are not in force yet or a trap interrupted whoever holds them.
fn active_tables() -> Option<MutexGuard<'static, Tables>> {
    TABLES.get()?.try_lock()
}

fn map_image(tables: &mut Tables) {
    let start = &raw const __image_start as u64;
    let rodata = &raw const __rodata_start as u64;
    let data = &raw const __data_start as u64;
    let end = &raw const __image_end as u64;
    let is_guard = |page| page == STACK.guard() || STACKS.iter().any(|stack| page == stack.guard());
    for page in (start..end).step_by(PAGE as usize) {
        let flags = match page {
            _ if is_guard(page) => continue,
            _ if page < rodata => Flags::PRESENT,
            _ if page < data => Flags::PRESENT | Flags::NO_EXECUTE,
            _ => Flags::PRESENT | Flags::NO_EXECUTE | Flags::WRITABLE,
        };
        entry(tables, page, 1).set_addr(TablePhys::new(page), flags);
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
