//! arm64 page tables: granules of 4, 16 and 64 KiB, 36 to 52 bits of address, LPA2.
//!
//! Source: Arm ARM (DDI 0487), D8.2 to D8.4 (VMSAv8-64). Where they begin and how wide addresses
//! are: arch/arm64/kernel/vmcore_info.c (6.12; crash_core.c before) and VMCOREINFO.

use crate::kernel::vmcoreinfo::Vmcoreinfo;
use crate::source::Memory;
use crate::{Error, PhysAddr, ReadError, VirtAddr};

use super::{Entry, Mapping, PageTables, read_entry};

/// The size of a page, and of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granule {
    /// 4 KiB: 9 bits of address a level.
    Size4K,
    /// 16 KiB: 11 bits a level.
    Size16K,
    /// 64 KiB: 13 bits a level.
    Size64K,
}

impl Granule {
    /// The granule of pages of `size` bytes.
    #[must_use]
    pub fn of_page_size(size: u64) -> Option<Granule> {
        match size {
            0x1000 => Some(Granule::Size4K),
            0x4000 => Some(Granule::Size16K),
            0x1_0000 => Some(Granule::Size64K),
            _ => None,
        }
    }

    /// Address bits within a page.
    const fn page_bits(self) -> u32 {
        match self {
            Granule::Size4K => 12,
            Granule::Size16K => 14,
            Granule::Size64K => 16,
        }
    }

    /// Address bits that one level of tables resolves: entries have 8 bytes.
    const fn level_bits(self) -> u32 {
        self.page_bits() - 3
    }

    /// Levels of tables for addresses of `bits` bits.
    const fn levels(self, bits: u32) -> u32 {
        (bits - self.page_bits()).div_ceil(self.level_bits())
    }

    /// The highest level, counted from the last one (0), that may map a block. With LPA2 there are
    /// blocks of 512 GiB (4 KiB granule) and of 64 GiB (16 KiB) too.
    const fn largest_block(self, lpa2: bool) -> u32 {
        match (self, lpa2) {
            (Granule::Size4K, true) => 3,
            (Granule::Size4K, false) | (Granule::Size16K, true) | (Granule::Size64K, _) => 2,
            (Granule::Size16K, false) => 1,
        }
    }
}

/// The page tables of an arm64 kernel (those of TTBR1_EL1).
#[derive(Clone, Copy, Debug)]
pub struct Arm64PageTables {
    root: PhysAddr,
    granule: Granule,
    /// Bits of an address that are translated: 64 - TCR_EL1.T1SZ.
    bits: u32,
    /// Bits that the top table has room for.
    root_bits: u32,
    /// Whether they are a process's (TTBR0_EL1).
    is_of_process: bool,
    /// Arithmetic for dumps that lost their tables.
    layout: Option<Layout>,
}

/// Bits of an entry that maps a page (Arm ARM, D8.3.2; asm/pgtable-hwdef.h and pgtable-prot.h, 6.12: what
/// Linux calls DIRTY is a bit that hardware ignores).
const ATTRIBUTES: [(u32, &str); 9] = [
    (0, "VALID"),
    (6, "USER"),
    (7, "RDONLY"),
    (9, "SHARED"),
    (10, "AF"),
    (11, "NG"),
    (53, "PXN"),
    (54, "UXN"),
    (55, "DIRTY"),
];

/// Where the kernel put things, as VMCOREINFO says.
#[derive(Clone, Copy, Debug)]
struct Layout {
    text: VirtAddr,
    /// Virtual minus physical address of the image.
    image_offset: u64,
    /// Lowest address of the direct map, and the (perhaps negative) physical address it stands for.
    direct_map: Option<(u64, u64)>,
}

const VALID: u64 = 1;
/// A table, or at the last level a page; else a block.
const TABLE: u64 = 2;

/// More than any kernel's image takes.
const IMAGE_SIZE: u64 = 512 << 20;
/// VMCOREINFO names `_stext`; the image begins a little before.
const IMAGE_HEAD: u64 = 64 << 10;

impl Arm64PageTables {
    /// Tables with the top one at `root`, for addresses of `bits` bits. `None` when that many bits
    /// cannot be.
    #[must_use]
    pub fn new(root: PhysAddr, granule: Granule, bits: u32) -> Option<Arm64PageTables> {
        let plausible = (25..=52).contains(&bits);
        let (root_bits, is_of_process, layout) = (bits, false, None);
        let tables = Arm64PageTables { root, granule, bits, root_bits, is_of_process, layout };
        plausible.then_some(tables)
    }

    /// The same tables of a kernel that was built for addresses of `built_for` bits. Where that takes
    /// no further level, its top table is as long as that many bits need, and a CPU that does not
    /// have them is given the end of it (TTBR1_BADDR_4852_OFFSET, arch/arm64/include/asm/assembler.h,
    /// 6.12: only the 64 KiB granule).
    #[must_use]
    pub fn built_for(self, built_for: u32) -> Arm64PageTables {
        let longer = (self.bits..=52).contains(&built_for)
            && self.granule.levels(built_for) == self.granule.levels(self.bits);
        Arm64PageTables { root_bits: if longer { built_for } else { self.bits }, ..self }
    }

    /// Finds the kernel's own tables. The width of addresses is what the CPU was told
    /// (TCR_EL1_T1SZ), not what the kernel was built for (VA_BITS): a kernel for 52 bits runs with
    /// 48 on a CPU that has no more.
    ///
    /// # Errors
    /// [`Error::VmcoreinfoKey`].
    pub fn from_vmcoreinfo(info: &Vmcoreinfo<'_>) -> Result<Arm64PageTables, Error> {
        let wrong = |key: &str, why| Error::VmcoreinfoKey(key.to_owned(), why);
        let top = info.need_symbol("swapper_pg_dir")?;
        let image_offset = info
            .number("kimage_voffset")
            .ok_or_else(|| wrong("NUMBER(kimage_voffset)", "it is missing"))?
            as u64;
        let page_size = info.page_size();
        let granule = Granule::of_page_size(page_size)
            .ok_or_else(|| wrong("PAGESIZE", "arm64 has pages of 4, 16 and 64 KiB only"))?;
        let built_for = info.number("VA_BITS").and_then(|bits| u32::try_from(bits).ok());
        // A size that cannot be gives 0 bits, which are refused below.
        let width = |size| 64i64.checked_sub(size).and_then(|bits| u32::try_from(bits).ok());
        let told = info.number("TCR_EL1_T1SZ").map(|size| width(size).unwrap_or(0));
        let bits = told
            .or(built_for)
            .ok_or_else(|| wrong("NUMBER(TCR_EL1_T1SZ)", "it and NUMBER(VA_BITS) are missing"))?;
        let root = PhysAddr(top.0.wrapping_sub(image_offset));
        let tables = Arm64PageTables::new(root, granule, bits)
            .ok_or_else(|| wrong("NUMBER(TCR_EL1_T1SZ)", "addresses have 25 to 52 bits"))?;
        let built_for = built_for.unwrap_or(bits);
        let direct_map = || {
            let phys = info.number("PHYS_OFFSET")? as u64;
            Some((u64::MAX.checked_shl(built_for)?, phys))
        };
        let text = info.symbol("_stext").unwrap_or(top);
        let layout = Some(Layout { text, image_offset, direct_map: direct_map() });
        Ok(Arm64PageTables { layout, ..tables.built_for(built_for) })
    }

    /// Whether physical addresses have bits 51:50 in bits 9:8 of an entry (LPA2, TCR_EL1.DS). With 4
    /// and 16 KiB granules, translating more than 48 bits demands it.
    const fn lpa2(&self) -> bool {
        self.bits > 48 && !matches!(self.granule, Granule::Size64K)
    }

    /// The physical address in an entry.
    const fn address(&self, entry: u64) -> u64 {
        const BITS_47: u64 = (1 << 48) - 1;
        let low = (1 << self.granule.page_bits()) - 1;
        match self.granule {
            // With 64 KiB granules bits 15:12 of an entry are bits 51:48 of the address (LPA).
            Granule::Size64K => entry & BITS_47 & !low | (entry >> 12 & 0xf) << 48,
            _ if self.lpa2() => entry & ((1 << 50) - 1) & !low | (entry >> 8 & 3) << 50,
            _ => entry & BITS_47 & !low,
        }
    }
}

impl PageTables for Arm64PageTables {
    fn walk(
        &self,
        memory: &dyn Memory,
        at: VirtAddr,
        each: &mut dyn FnMut(Entry),
    ) -> Result<Mapping, ReadError> {
        // The kernel's half: all bits above those that are translated are set; in that of processes
        // none is, but for the upper byte, which they may use for themselves (TCR_EL1.TBI0).
        let in_our_half = match self.is_of_process {
            false => at.0 >> self.bits == u64::MAX >> self.bits,
            true => (at.0 << 8) >> self.bits >> 8 == 0,
        };
        if !in_our_half {
            return Err(ReadError::NotMapped(at));
        }
        let (page_bits, level_bits) = (self.granule.page_bits(), self.granule.level_bits());
        let top = self.granule.levels(self.root_bits) - 1;
        let mut table = self.root;
        for level in (0..=top).rev() {
            let shift = page_bits + level_bits * level;
            let bits = if level == top { self.root_bits - shift } else { level_bits };
            let index = at.0 >> shift & ((1 << bits) - 1);
            let slot = table.offset(index * 8);
            let entry = read_entry(memory, slot).ok_or(ReadError::NoPageTable(at))?;
            each(Entry { level, slot, value: entry });
            // At the last level, what elsewhere marks a block is reserved.
            if entry & VALID == 0 || (level == 0 && entry & TABLE == 0) {
                return Err(ReadError::NotMapped(at));
            }
            if level == 0 || entry & TABLE == 0 {
                if level > self.granule.largest_block(self.lpa2()) {
                    return Err(ReadError::NotMapped(at));
                }
                let size = 1u64 << shift;
                let skip = at.0 % size;
                let phys = PhysAddr((self.address(entry) & !(size - 1)) + skip);
                return Ok(Mapping { phys, length: size - skip });
            }
            table = PhysAddr(self.address(entry));
        }
        Err(ReadError::NotMapped(at))
    }

    fn levels(&self) -> u32 {
        self.granule.levels(self.root_bits)
    }

    fn span(&self, level: u32) -> u64 {
        1 << (self.granule.page_bits() + self.granule.level_bits() * level)
    }

    fn next_possible(&self, at: VirtAddr) -> VirtAddr {
        let first = if self.is_of_process { 0 } else { u64::MAX << self.bits };
        VirtAddr(at.0.max(first))
    }

    fn target(&self, entry: u64) -> PhysAddr {
        PhysAddr(self.address(entry))
    }

    fn attributes(&self, entry: u64) -> Vec<&'static str> {
        let set = |&&(bit, _): &&(u32, _)| entry >> bit & 1 == 1;
        ATTRIBUTES.iter().filter(set).map(|&(_, name)| name).collect()
    }

    fn of_process(&self, root: PhysAddr) -> Box<dyn PageTables> {
        // Their top table is used from its start: the bits above those of an address are 0.
        Box::new(Arm64PageTables { root, is_of_process: true, layout: None, ..*self })
    }

    fn by_arithmetic(&self, at: VirtAddr) -> Option<PhysAddr> {
        let layout = self.layout?;
        let inside = at.0.wrapping_sub(layout.text.0.saturating_sub(IMAGE_HEAD));
        if inside < IMAGE_SIZE {
            return Some(PhysAddr(at.0.wrapping_sub(layout.image_offset)));
        }
        // The direct map lies below all else: the upper half of what 48 bits can address (or fewer,
        // where there are fewer) is not part of it (_PAGE_END, arch/arm64/include/asm/memory.h).
        let (start, phys) = layout.direct_map?;
        let end = u64::MAX << (self.bits.min(48) - 1);
        let mapped = at.0 >> self.bits == u64::MAX >> self.bits && at.0 < end;
        mapped.then(|| PhysAddr((at.0 & !start).wrapping_add(phys)))
    }
}

#[cfg(test)]
#[path = "aarch64_tests.rs"]
mod tests;
