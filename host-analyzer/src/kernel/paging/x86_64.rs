//! x86_64 page tables of 4 or 5 levels, pages of 4 KiB, 2 MiB and 1 GiB.
//!
//! Source: Intel SDM volume 3A, 4.5; where they begin: arch/x86/kernel/machine_kexec_64.c and
//! crash_core (VMCOREINFO), 6.1.

use crate::kernel::vmcoreinfo::Vmcoreinfo;
use crate::source::Memory;
use crate::{Error, PhysAddr, ReadError, VirtAddr};

use super::{Entry, Mapping, PageTables, read_entry};

/// The page tables of an x86_64 kernel.
#[derive(Clone, Copy, Debug)]
pub struct X86PageTables {
    root: PhysAddr,
    levels: u32,
    /// Address bits of an entry, without the memory encryption bit.
    address: u64,
    phys_base: u64,
}

/// Bits of an entry that maps a page (Intel SDM volume 3A, table 4-20).
const ATTRIBUTES: [(u32, &str); 10] = [
    (0, "PRESENT"),
    (1, "RW"),
    (2, "USER"),
    (3, "PWT"),
    (4, "PCD"),
    (5, "ACCESSED"),
    (6, "DIRTY"),
    (7, "PSE"),
    (8, "GLOBAL"),
    (63, "NX"),
];

const ENTRIES: u64 = 512;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Start of the kernel's text mapping, __START_KERNEL_map.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

impl X86PageTables {
    /// Tables of `levels` levels with the top one at `root`. `encryption` is the bit that marks
    /// encrypted pages (sme_mask), 0 without memory encryption.
    #[must_use]
    pub fn new(root: PhysAddr, levels: u32, encryption: u64) -> X86PageTables {
        X86PageTables { root, levels, address: ADDRESS & !encryption, phys_base: 0 }
    }

    /// Finds the kernel's own tables.
    ///
    /// # Errors
    /// [`Error::VmcoreinfoKey`] when SYMBOL(swapper_pg_dir) is missing.
    pub fn from_vmcoreinfo(info: &Vmcoreinfo<'_>) -> Result<X86PageTables, Error> {
        let top =
            info.symbol("init_top_pgt").map_or_else(|| info.need_symbol("swapper_pg_dir"), Ok)?;
        let phys_base = info.number("phys_base").unwrap_or(0) as u64;
        let encryption = info.number("sme_mask").unwrap_or(0) as u64;
        let levels = if info.number("pgtable_l5_enabled") == Some(1) { 5 } else { 4 };
        let root = PhysAddr(top.0.wrapping_sub(KERNEL_MAP).wrapping_add(phys_base));
        Ok(X86PageTables { phys_base, ..X86PageTables::new(root, levels, encryption) })
    }
}

impl PageTables for X86PageTables {
    fn walk(
        &self,
        memory: &dyn Memory,
        at: VirtAddr,
        each: &mut dyn FnMut(Entry),
    ) -> Result<Mapping, ReadError> {
        let unused = 64 - (12 + 9 * self.levels);
        if (((at.0 << unused) as i64) >> unused) as u64 != at.0 {
            return Err(ReadError::NotMapped(at));
        }
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * level;
            let slot = table.offset((at.0 >> shift) % ENTRIES * 8);
            let entry = read_entry(memory, slot).ok_or(ReadError::NoPageTable(at))?;
            each(Entry { level, slot, value: entry });
            if entry & PRESENT == 0 {
                return Err(ReadError::NotMapped(at));
            }
            // 4 KiB, 2 MiB and 1 GiB pages end the walk at levels 0, 1 and 2.
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let size = 1u64 << shift;
                let skip = at.0 % size;
                let phys = PhysAddr((entry & self.address & !(size - 1)) + skip);
                return Ok(Mapping { phys, length: size - skip });
            }
            table = PhysAddr(entry & self.address);
        }
        Err(ReadError::NotMapped(at))
    }

    fn levels(&self) -> u32 {
        self.levels
    }

    fn span(&self, level: u32) -> u64 {
        1 << (12 + 9 * level)
    }

    fn next_possible(&self, at: VirtAddr) -> VirtAddr {
        // Both halves have all but one of the bits.
        let half = 1u64 << (11 + 9 * self.levels);
        let between = (half..half.wrapping_neg()).contains(&at.0);
        if between { VirtAddr(half.wrapping_neg()) } else { at }
    }

    fn target(&self, entry: u64) -> PhysAddr {
        PhysAddr(entry & self.address)
    }

    fn attributes(&self, entry: u64) -> Vec<&'static str> {
        let set = |&&(bit, _): &&(u32, _)| entry >> bit & 1 == 1;
        ATTRIBUTES.iter().filter(set).map(|&(_, name)| name).collect()
    }

    fn of_process(&self, root: PhysAddr) -> Box<dyn PageTables> {
        Box::new(X86PageTables { root, ..*self })
    }

    fn by_arithmetic(&self, at: VirtAddr) -> Option<PhysAddr> {
        let inside = at.0.checked_sub(KERNEL_MAP).filter(|&skip| skip < 1 << 30)?;
        Some(PhysAddr(inside.wrapping_add(self.phys_base)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::FakeMemory;

    /// A table at page `level` for each of five levels, linked for one virtual address.
    const VIRT: u64 = 0xff12_3456_789a_bcde;

    fn linked(levels: u32, leaf_level: u32, leaf: u64) -> (FakeMemory, X86PageTables) {
        let mut memory = FakeMemory::new(0x10000);
        for level in leaf_level..levels {
            let slot = (VIRT >> (12 + 9 * level)) % 512 * 8;
            let next = u64::from(level) * 0x1000;
            let entry = if level == leaf_level { leaf } else { next | 1 };
            memory.put_u64(u64::from(level + 1) * 0x1000 + slot, entry);
        }
        (memory, X86PageTables::new(PhysAddr(u64::from(levels) * 0x1000), levels, 0))
    }

    fn walk(levels: u32, leaf_level: u32, leaf: u64) -> Result<Mapping, ReadError> {
        let (memory, tables) = linked(levels, leaf_level, leaf);
        tables.translate(&memory, VirtAddr(VIRT))
    }

    #[test]
    fn five_levels_lead_to_a_4k_page() {
        let mapping = walk(5, 0, 0xabc_d000 | 1).unwrap();
        assert_eq!(mapping, Mapping { phys: PhysAddr(0xabc_dcde), length: 0x322 });
    }

    #[test]
    fn large_pages_end_the_walk_early() {
        let two_mib = walk(5, 1, 0x4000_0000 | 0x81).unwrap();
        assert_eq!(two_mib.phys, PhysAddr(0x4000_0000 + VIRT % (2 << 20)));
        let one_gib = walk(5, 2, 0x4000_0000 | 0x81).unwrap();
        assert_eq!(one_gib.phys, PhysAddr(0x4000_0000 + VIRT % (1 << 30)));
        assert_eq!(one_gib.length, (1 << 30) - VIRT % (1 << 30));
    }

    #[test]
    fn attribute_and_encryption_bits_are_no_address() {
        let (memory, mut tables) = linked(5, 0, 1 << 63 | 1 << 51 | 0x5000 | 0xe7f);
        tables.address &= !(1 << 51);
        assert_eq!(tables.translate(&memory, VirtAddr(VIRT)).unwrap().phys, PhysAddr(0x5cde));
    }

    #[test]
    fn what_no_table_can_map_lies_between_the_halves() {
        let next =
            |levels, at| X86PageTables::new(PhysAddr(0), levels, 0).next_possible(VirtAddr(at)).0;
        assert_eq!(next(4, 0x7fff_ffff_f000), 0x7fff_ffff_f000);
        assert_eq!(next(4, 0x8000_0000_0000), 0xffff_8000_0000_0000);
        assert_eq!(next(4, 0xffff_8000_0000_0000), 0xffff_8000_0000_0000);
        assert_eq!(next(5, 0x8000_0000_0000), 0x8000_0000_0000);
        assert_eq!(next(5, 0x0100_0000_0000_0000), 0xff00_0000_0000_0000);
        assert_eq!(X86PageTables::new(PhysAddr(0), 4, 0).span(1), 2 << 20);
    }

    #[test]
    fn address_that_four_levels_cannot_hold_is_not_mapped() {
        assert_eq!(walk(4, 0, 0x5001), Err(ReadError::NotMapped(VirtAddr(VIRT))));
    }

    #[test]
    fn absent_entry_and_absent_table_are_told_apart() {
        assert_eq!(walk(5, 0, 0x5000), Err(ReadError::NotMapped(VirtAddr(VIRT))));
        let gone = walk(5, 1, 0xffff_f000 | 1);
        assert_eq!(gone, Err(ReadError::NoPageTable(VirtAddr(VIRT))));
    }

    #[test]
    fn kernel_image_is_found_with_a_negative_phys_base() {
        let text = b"SYMBOL(swapper_pg_dir)=ffffffff92c10000\nNUMBER(phys_base)=-146800640\n\
                     NUMBER(pgtable_l5_enabled)=1\n";
        let tables = X86PageTables::from_vmcoreinfo(&Vmcoreinfo::new(text)).unwrap();
        assert_eq!((tables.root, tables.levels), (PhysAddr(0xa01_0000), 5));
        assert_eq!(
            tables.by_arithmetic(VirtAddr(0xffff_ffff_9120_0000)),
            Some(PhysAddr(0x860_0000))
        );
    }

    proptest! {
        #[test]
        fn garbage_tables_never_panic(entries in prop::collection::vec(any::<u64>(), 512), at: u64) {
            let mut memory = FakeMemory::new(0x10000);
            for page in 0..16 {
                for (index, entry) in entries.iter().enumerate() {
                    memory.put_u64(page * 4096 + index as u64 * 8, entry & 0x8000_0000_0000_ffff | 1);
                }
            }
            let _ = X86PageTables::new(PhysAddr(0), 5, 0).translate(&memory, VirtAddr(at));
        }
    }
}
