//! The direct map: where the kernel sees physical memory.

use crate::kernel::Kernel;
use crate::kernel::machine::Machine;
use crate::{PhysAddr, VirtAddr};

impl super::Linux<'_, '_> {
    /// The address in the direct map that leads to `phys`: page tables confirm it, or would if the dump
    /// had them. `None` for memory that the kernel did not map.
    #[must_use]
    pub fn direct_map(&self, phys: PhysAddr) -> Option<VirtAddr> {
        let at = candidate(self.kernel(), phys)?;
        let mapping = self.kernel().memory().translate(at).ok()?;
        (mapping.phys == phys).then_some(at)
    }
}

fn candidate(kernel: &Kernel<'_>, phys: PhysAddr) -> Option<VirtAddr> {
    let info = kernel.vmcoreinfo();
    match kernel.machine() {
        Machine::X86_64 => {
            // With CONFIG_RANDOMIZE_MEMORY a variable; else what follows from the levels of page tables
            // (__PAGE_OFFSET_BASE_L4 and L5, arch/x86/include/asm/page_64_types.h, 6.12).
            let variable = kernel.symbol("page_offset_base").ok().flatten();
            let start = variable.and_then(|at| kernel.memory().u64(at).ok()).unwrap_or(
                match kernel.memory().tables().levels() {
                    5 => 0xff11_0000_0000_0000,
                    _ => 0xffff_8880_0000_0000,
                },
            );
            Some(VirtAddr(start).offset(phys.0))
        }
        Machine::Aarch64 => {
            // PAGE_OFFSET and PHYS_OFFSET (arch/arm64/include/asm/memory.h, 6.12).
            let bits = u32::try_from(info.number("VA_BITS")?).ok()?;
            let start = u64::MAX.checked_shl(bits)?;
            let first = info.number("PHYS_OFFSET")? as u64;
            Some(VirtAddr(start).offset(phys.0.wrapping_sub(first)))
        }
    }
}
