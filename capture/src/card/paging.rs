//! The dead kernel's page tables.
//!
//! x86_64: Intel SDM volume 3A, 4.5. arm64: Arm ARM (DDI 0487), D8.2 to D8.4. Where they begin and how
//! wide addresses are is in VMCOREINFO (arch/x86/kernel/machine_kexec_64.c,
//! arch/arm64/kernel/vmcore_info.c, kernels 6.1 to 6.12).

use crate::architecture::Architecture;
use crate::vmcoreinfo::Vmcoreinfo;

/// A stretch of virtual memory that one entry of a page table maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its first virtual address.
    pub virt: u64,
    /// The physical address that this stands for.
    pub phys: u64,
    /// Size in bytes.
    pub size: u64,
}

impl Mapping {
    /// Maps nothing.
    pub const NONE: Mapping = Mapping { virt: 0, phys: 0, size: 0 };

    /// The physical address of `at`, and how many bytes from there on are mapped too.
    pub fn phys(&self, at: u64) -> Option<(u64, u64)> {
        let skip = at.checked_sub(self.virt).filter(|&skip| skip < self.size)?;
        Some((self.phys.checked_add(skip)?, self.size - skip))
    }
}

/// Where the tables of the kernel's own addresses begin, and how they are read.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    architecture: Architecture,
    root: u64,
    /// Address bits within a page.
    page_bits: u32,
    /// Address bits that all tables together resolve.
    root_bits: u32,
    /// In the kernel's half all address bits from this one on are set.
    half_bits: u32,
}

/// Most levels of tables: x86_64 with 57 bits, arm64 with 52 bits and pages of 4 KiB.
pub const MAX_LEVELS: usize = 5;

const PRESENT: u64 = 1;
const X86_LARGE: u64 = 1 << 7;
const X86_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// On arm64: a table, or at the last level a page; else a block.
const ARM_TABLE: u64 = 2;

impl Tables {
    /// Finds the kernel's own tables by what VMCOREINFO says of them.
    pub fn find(architecture: Architecture, info: &Vmcoreinfo) -> Option<Tables> {
        let top = info.symbol("swapper_pg_dir").or_else(|| info.symbol("init_top_pgt"))?;
        let root = architecture.image_phys(info, top)?;
        match architecture {
            Architecture::X86_64 => {
                let levels = if info.number("pgtable_l5_enabled") == Some(1) { 5 } else { 4 };
                let root_bits = 12 + 9 * levels;
                let half_bits = root_bits - 1;
                Some(Tables { architecture, root, page_bits: 12, root_bits, half_bits })
            }
            Architecture::Aarch64 => Tables::arm64(root, info),
        }
    }

    fn arm64(root: u64, info: &Vmcoreinfo) -> Option<Tables> {
        let page_bits = match info.get("PAGESIZE")? {
            "4096" => 12,
            "16384" => 14,
            "65536" => 16,
            _ => return None,
        };
        // A kernel built for 52 bits runs with 48 on a CPU that has no more: what that CPU was told
        // counts.
        let built_for = info.number("VA_BITS");
        let told = info.number("TCR_EL1_T1SZ").and_then(|size| 64i64.checked_sub(size));
        let bits = told.or(built_for).and_then(|bits| u32::try_from(bits).ok())?;
        if !(25..=52).contains(&bits) {
            return None;
        }
        let levels = |bits: u32| (bits - page_bits).div_ceil(page_bits - 3);
        // Where that takes no further level, the top table is as long as the kernel was built for,
        // and its end is in use (TTBR1_BADDR_4852_OFFSET, arch/arm64/include/asm/assembler.h, 6.12).
        let built_for = built_for.and_then(|bits| u32::try_from(bits).ok()).unwrap_or(bits);
        let longer = (bits..=52).contains(&built_for) && levels(built_for) == levels(bits);
        let root_bits = if longer { built_for } else { bits };
        let architecture = Architecture::Aarch64;
        Some(Tables { architecture, root, page_bits, root_bits, half_bits: bits })
    }

    /// Size of a page in bytes.
    pub fn page_size(&self) -> u64 {
        1 << self.page_bits
    }

    /// The first address that is translated, and how many bytes a table of the last level maps.
    pub fn kernel_half(&self) -> (u64, u64) {
        (u64::MAX << self.half_bits, 1 << (2 * self.page_bits - 3))
    }

    /// Walks the tables for `at`; `entry` reads the 8 bytes at a physical address.
    pub fn walk(&self, at: u64, entry: &mut dyn FnMut(u64) -> Option<u64>) -> Option<Mapping> {
        self.look_up(at, entry).ok()
    }

    /// Walks the tables for `at`. Where nothing is mapped, `Err` has the size of the hole, which begins
    /// at a multiple of it: what one entry would map, a power of two.
    pub fn look_up(
        &self,
        at: u64,
        entry: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<Mapping, u64> {
        if at >> self.half_bits != u64::MAX >> self.half_bits {
            return Err(1 << self.half_bits);
        }
        let level_bits = self.page_bits - 3;
        let levels = (self.root_bits - self.page_bits).div_ceil(level_bits);
        let mut table = self.root;
        for level in (0..levels).rev() {
            let shift = self.page_bits + level_bits * level;
            let bits = if level == levels - 1 { self.root_bits - shift } else { level_bits };
            let index = at >> shift & ((1 << bits) - 1);
            let size = 1u64 << shift;
            let found = table.checked_add(index * 8).and_then(&mut *entry).ok_or(size)?;
            if found & PRESENT == 0 {
                return Err(size);
            }
            if self.is_leaf(level, found).ok_or(size)? {
                let (virt, phys) = (at & !(size - 1), self.address(found) & !(size - 1));
                return Ok(Mapping { virt, phys, size });
            }
            table = self.address(found);
        }
        Err(self.page_size())
    }

    /// Whether a present entry at `level`, counted from the last one (0), maps memory. `None` for an
    /// entry that cannot be.
    fn is_leaf(&self, level: u32, entry: u64) -> Option<bool> {
        match self.architecture {
            Architecture::X86_64 => Some(level == 0 || level <= 2 && entry & X86_LARGE != 0),
            Architecture::Aarch64 if level == 0 => (entry & ARM_TABLE != 0).then_some(true),
            Architecture::Aarch64 => {
                let largest_block = match (self.page_bits, self.lpa2()) {
                    (12, true) => 3,
                    (14, false) => 1,
                    _ => 2,
                };
                let is_block = entry & ARM_TABLE == 0;
                (!is_block || level <= largest_block).then_some(is_block)
            }
        }
    }

    /// Whether bits 51:50 of a physical address are in bits 9:8 of an entry (LPA2, TCR_EL1.DS): with
    /// pages of 4 and 16 KiB, translating more than 48 bits demands it.
    fn lpa2(&self) -> bool {
        self.half_bits > 48 && self.page_bits != 16
    }

    /// The physical address in an entry.
    fn address(&self, entry: u64) -> u64 {
        const BITS_47: u64 = (1 << 48) - 1;
        const BITS_49: u64 = (1 << 50) - 1;
        let page = !((1u64 << self.page_bits) - 1);
        match self.architecture {
            Architecture::X86_64 => entry & X86_ADDRESS,
            // With pages of 64 KiB bits 15:12 of an entry are bits 51:48 of the address (LPA).
            Architecture::Aarch64 if self.page_bits == 16 => {
                entry & BITS_47 & page | (entry >> 12 & 0xf) << 48
            }
            Architecture::Aarch64 if self.lpa2() => entry & BITS_49 & page | (entry >> 8 & 3) << 50,
            Architecture::Aarch64 => entry & BITS_47 & page,
        }
    }
}

#[cfg(test)]
#[path = "paging_tests.rs"]
mod tests;
