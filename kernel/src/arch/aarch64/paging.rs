//! The payload's own page tables, in constant memory, and the switch to cached memory.
//!
//! | virtual addresses | what |
//! |---|---|
//! | those of the payload, identity | its own image: code read-only, data writable and execute-never, guard pages absent |
//! | [`OLD_WINDOW`] | old memory: 512 slots of 2 MiB; read-only, execute-never, cached |
//! | [`DEVICE_WINDOW`] | device registers: 512 pages of 4 KiB, nGnRE, execute-never |
//!
//! The image is in the lower half of the address space (TTBR0, 48 bits), the windows are in the
//! upper half (TTBR1, 39 bits). Pages are of 4 KiB, whatever the dead kernel's are. Slots are not of
//! 1 GiB, because a processor may read ahead anywhere in cached memory: what is mapped beside the
//! page that is wanted should be little.
//!
//! Source: Arm Architecture Reference Manual (DDI 0487), D8.3 (descriptors) and D17.2 (registers).

use core::arch::asm;
use core::cell::UnsafeCell;

use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{
    ID_AA64MMFR0_EL1, MAIR_EL1, Readable, SCTLR_EL1, TCR_EL1, TTBR0_EL1, TTBR1_EL1, Writeable,
};
use drivers::PhysAddr;

use super::trap;
use crate::image::{self, Content};
use crate::windows::{PAGE, SLOTS};

/// Where the window of old memory begins: the first address of the upper half.
pub const OLD_WINDOW: u64 = 0xffff_ff80_0000_0000;
/// Where the window of device registers begins: 1 GiB further.
pub const DEVICE_WINDOW: u64 = OLD_WINDOW + (1 << 30);

/// Size of a slot of the window of old memory, in bytes.
const OLD_SLOT: u64 = 2 << 20;

/// SCTLR_EL1 with MMU, caches and alignment checks off: nothing but the bits that are one where
/// their feature is missing (Linux: INIT_SCTLR_EL1_MMU_OFF, arch/arm64/include/asm/sysreg.h, 6.12).
pub(super) const SCTLR_OFF: u64 = 0x30d0_0800;

/// The same of SCTLR_EL2 (INIT_SCTLR_EL2_MMU_OFF).
pub(super) const SCTLR_EL2_OFF: u64 = 0x30c5_0830;

/// Bits of a descriptor.
mod bit {
    pub const VALID: u64 = 1;
    /// A table, or at the lowest level a page; without it a block.
    pub const TABLE: u64 = 1 << 1;
    /// Index 1 of MAIR_EL1; index 0 is cached memory.
    pub const DEVICE: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 7;
    pub const INNER_SHAREABLE: u64 = 3 << 8;
    pub const ACCESSED: u64 = 1 << 10;
    pub const EXECUTE_NEVER: u64 = 3 << 53;
    pub const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
}

/// Own code, own data and old memory: cached.
const NORMAL: u64 = bit::VALID | bit::INNER_SHAREABLE | bit::ACCESSED;

#[repr(C, align(4096))]
struct Table([u64; 512]);

impl Table {
    const fn new() -> Table {
        Table([0; 512])
    }

    fn address(&self) -> u64 {
        &raw const self.0 as u64
    }

    /// Writes an entry that the processor may look at any time.
    fn set(&mut self, index: usize, descriptor: u64) {
        // SAFETY: a reference into the table is valid for a write.
        unsafe { (&raw mut self.0[index]).write_volatile(descriptor) }
    }
}

/// Tables of the lower half: the root and two of each level below it, as the image may straddle a
/// boundary.
const POOL: usize = 1 + 2 * 3;

/// The tables' memory.
#[repr(C)]
struct TableMemory {
    pool: [Table; POOL],
    /// The root of the upper half, and below it the tables of the windows.
    upper: Table,
    old: Table,
    device_blocks: Table,
    device: Table,
}

/// The tables, and with them the right to change them.
pub struct Tables {
    memory: &'static mut TableMemory,
    /// Tables of the pool in use.
    used: usize,
}

struct TableStatic(UnsafeCell<TableMemory>);

// SAFETY: taken once, by `init`; from then on it belongs to the `Tables` that it returned.
unsafe impl Sync for TableStatic {}

static MEMORY: TableStatic = TableStatic(UnsafeCell::new(TableMemory {
    pool: [const { Table::new() }; POOL],
    upper: Table::new(),
    old: Table::new(),
    device_blocks: Table::new(),
    device: Table::new(),
}));

/// Makes the tables, switches to them and turns the caches on. To be called once, with MMU and
/// caches off.
pub fn init() -> Tables {
    // SAFETY: this runs once, so the reference is the only one.
    let mut tables = Tables { memory: unsafe { &mut *MEMORY.0.get() }, used: 1 };
    map_image(&mut tables);
    let TableMemory { upper, old, device_blocks, device, .. } = &mut *tables.memory;
    upper.set(0, old.address() | bit::VALID | bit::TABLE);
    upper.set(1, device_blocks.address() | bit::VALID | bit::TABLE);
    device_blocks.set(0, device.address() | bit::VALID | bit::TABLE);
    // SAFETY: the tables map the running code, its data and its stack where they are now.
    unsafe { switch(tables.memory.pool[0].address(), tables.memory.upper.address()) }
    tables
}

/// The code for the size of physical addresses: the processor's (ID_AA64MMFR0_EL1.PARange), but at
/// most that of 48 bits, as more need descriptors of another form.
fn physical_size() -> u64 {
    ID_AA64MMFR0_EL1.read(ID_AA64MMFR0_EL1::PARange).min(5)
}

/// The number of bits of a physical address that these tables can hold and the processor has.
pub(super) fn physical_bits() -> u32 {
    match physical_size() {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        _ => 48,
    }
}

/// # Safety
/// The tables at `lower` and `upper` must map everything in use where it is. MMU and caches must be
/// off.
unsafe fn switch(lower: u64, upper: u64) {
    // What was written up to here went past the caches. Lines that are left in them, from when the
    // dead kernel had this memory mapped, would hide it.
    let cache_type: u64;
    // SAFETY: CTR_EL0 can always be read.
    unsafe {
        asm!("mrs {}, ctr_el0", out(reg) cache_type, options(nomem, nostack, preserves_flags));
    }
    // DminLine: the smallest line of all data caches, as a power of two of words of four bytes.
    let line = 4u64 << (cache_type >> 16 & 0xf);
    // Without a barrier the stores may arrive after the lines are gone (DDI 0487, D7.5.9).
    barrier::dmb(barrier::SY);
    let image = image::range();
    for at in (image.start..image.end).step_by(line as usize) {
        // SAFETY: kexec cleaned this memory from the caches when it loaded the image
        // (kexec_segment_flush, arch/arm64/kernel/machine_kexec.c, 6.1), so no line of it is dirty.
        unsafe { asm!("dc ivac, {}", in(reg) at, options(nostack, preserves_flags)) };
    }
    barrier::dsb(barrier::SY);

    MAIR_EL1.write(
        MAIR_EL1::Attr0_Normal_Outer::WriteBack_NonTransient_ReadWriteAlloc
            + MAIR_EL1::Attr0_Normal_Inner::WriteBack_NonTransient_ReadWriteAlloc
            + MAIR_EL1::Attr1_Device::nonGathering_nonReordering_EarlyWriteAck,
    );
    TCR_EL1.write(
        TCR_EL1::T0SZ.val(64 - 48)
            + TCR_EL1::TG0::KiB_4
            + TCR_EL1::SH0::Inner
            + TCR_EL1::ORGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable
            + TCR_EL1::IRGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable
            + TCR_EL1::T1SZ.val(64 - 39)
            + TCR_EL1::TG1::KiB_4
            + TCR_EL1::SH1::Inner
            + TCR_EL1::ORGN1::WriteBack_ReadAlloc_WriteAlloc_Cacheable
            + TCR_EL1::IRGN1::WriteBack_ReadAlloc_WriteAlloc_Cacheable
            + TCR_EL1::IPS.val(physical_size()),
    );
    TTBR0_EL1.set(lower);
    TTBR1_EL1.set(upper);
    forget_extensions();
    // SAFETY: no translation is in force, so none can be missed; then the caller's promise.
    unsafe {
        asm!("isb", "tlbi vmalle1", "dsb sy", "isb", options(nostack, preserves_flags));
        SCTLR_EL1.set(SCTLR_OFF);
        SCTLR_EL1.set(
            SCTLR_OFF
                | (SCTLR_EL1::M::Enable + SCTLR_EL1::C::Cacheable + SCTLR_EL1::I::Cacheable).value,
        );
    }
    barrier::isb(barrier::SY);
}

/// Clears what newer processors read besides SCTLR_EL1 and TCR_EL1: with permission indirection
/// (FEAT_S1PIE), which the dead kernel may have used, our descriptors would mean something else.
fn forget_extensions() {
    let features: u64;
    // SAFETY: ID_AA64MMFR3_EL1 reads as zero where it does not exist; the registers behind its
    // fields TCRX and SCTLRX are only written where they do.
    unsafe {
        asm!("mrs {}, S3_0_C0_C7_3", out(reg) features, options(nomem, nostack, preserves_flags));
        if features & 0xf != 0 {
            asm!("msr S3_0_C2_C0_3, xzr", options(nomem, nostack, preserves_flags));
        }
        if features >> 4 & 0xf != 0 {
            asm!("msr S3_0_C1_C0_3, xzr", options(nomem, nostack, preserves_flags));
        }
    }
}

impl Tables {
    /// Size of a slot of the window of old memory, in bytes.
    pub fn old_slot(&self) -> u64 {
        OLD_SLOT
    }

    /// Makes slot `slot` of the window of old memory show the memory at `at`, read-only.
    pub fn map_old(&mut self, slot: u64, at: PhysAddr) {
        let descriptor = at.0 & bit::ADDRESS | NORMAL | bit::READ_ONLY | bit::EXECUTE_NEVER;
        replace(&mut self.memory.old, slot, descriptor, OLD_WINDOW + slot * OLD_SLOT);
    }

    /// Takes everything out of the window of old memory, whatever the processor remembers of it.
    pub fn close_old(&mut self) {
        for index in 0..SLOTS as usize {
            self.memory.old.set(index, 0);
        }
        // SAFETY: forgets translations that nobody uses meanwhile; the other CPUs do not use these
        // tables.
        unsafe {
            asm!("dsb nshst", "tlbi vmalle1", "dsb nsh", "isb", options(nostack, preserves_flags));
        }
    }

    /// Makes page `page` of the window of device registers show the registers at `at`, nGnRE.
    pub fn map_device(&mut self, page: u64, at: PhysAddr) {
        let descriptor = at.0 & bit::ADDRESS
            | bit::VALID
            | bit::TABLE
            | bit::DEVICE
            | bit::ACCESSED
            | bit::EXECUTE_NEVER;
        replace(&mut self.memory.device, page, descriptor, DEVICE_WINDOW + page * PAGE);
    }
}

/// Replaces the entry `index` of a window's table, which maps `virt`. The old entry is taken out
/// and forgotten first, or the processor might see two (break-before-make, D8.16.1).
fn replace(table: &mut Table, index: u64, descriptor: u64, virt: u64) {
    let index = index as usize;
    if table.0[index] == descriptor {
        return;
    }
    if table.0[index] != 0 {
        table.set(index, 0);
        // SAFETY: forgets a translation that nobody uses meanwhile; the other CPUs do not use
        // these tables.
        unsafe {
            asm!(
                "dsb nshst", "tlbi vaae1, {}", "dsb nsh", "isb",
                in(reg) virt >> 12 & ((1 << 44) - 1),
                options(nostack, preserves_flags),
            );
        }
    }
    table.set(index, descriptor);
    barrier::dsb(barrier::NSHST);
    barrier::isb(barrier::SY);
}

fn map_image(tables: &mut Tables) {
    for (page, content) in image::pages(|page| page == trap::STACK.guard()) {
        let rights = match content {
            Content::Code => bit::READ_ONLY,
            Content::Constants => bit::READ_ONLY | bit::EXECUTE_NEVER,
            Content::Data => bit::EXECUTE_NEVER,
        };
        set_page(tables, page, page | NORMAL | bit::TABLE | rights);
    }
}

/// Sets the descriptor for the page at `address` in the lower half; tables above it are taken from
/// the pool as needed.
fn set_page(tables: &mut Tables, address: u64, descriptor: u64) {
    let pool = &mut tables.memory.pool;
    let index = |level: u32| (address >> (39 - 9 * level) & 511) as usize;
    let mut table = 0;
    for level in 0..3 {
        let next = pool[table].0[index(level)] & bit::ADDRESS;
        table = if next == 0 {
            let fresh = tables.used;
            tables.used += 1;
            let link = pool[fresh].address() | bit::VALID | bit::TABLE;
            pool[table].set(index(level), link);
            fresh
        } else {
            ((next - pool[0].address()) / PAGE) as usize
        };
    }
    pool[table].set(index(3), descriptor);
}
