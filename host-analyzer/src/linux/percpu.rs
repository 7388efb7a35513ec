//! Per-CPU variables and CPU masks.

use crate::kernel::Kernel;
use crate::{Error, ReadContext, VirtAddr, bytes};

/// More CPUs than any kernel is built for (NR_CPUS of x86_64 is at most 8192, of arm64 4096).
const MAX_CPUS: u32 = 8192;

/// The per-CPU areas and which CPUs there were.
#[derive(Clone, Debug)]
pub struct PerCpu {
    offsets: Vec<u64>,
    /// CPUs that ran. A panic without kdump takes all but its own out of this; on arm64 (6.12) one
    /// with kdump does so too.
    pub online: Vec<u32>,
    /// CPUs that the machine had.
    pub present: Vec<u32>,
}

impl PerCpu {
    /// Reads `__per_cpu_offset` and the CPU masks (include/linux/cpumask.h, 6.1).
    ///
    /// # Errors
    /// [`Error::NoSymbol`], [`Error::Read`].
    pub fn new(kernel: &Kernel<'_>) -> Result<PerCpu, Error> {
        let so = "per-CPU variables cannot be found";
        let memory = kernel.memory();
        let count = memory.u32(kernel.need_symbol("nr_cpu_ids", so)?).reading("nr_cpu_ids")?;
        let count = count.min(MAX_CPUS) as usize;
        let at = kernel.need_symbol("__per_cpu_offset", so)?;
        let table = memory.bytes(at, count * 8).reading("__per_cpu_offset")?;
        let offsets: Vec<u64> =
            (0..count).filter_map(|cpu| bytes::u64_at(&table, cpu * 8)).collect();
        // Without a mask every CPU that has an area counts.
        let all = || (0..offsets.len() as u32).collect();
        let online = mask(kernel, "__cpu_online_mask", count).unwrap_or_else(all);
        let present = mask(kernel, "__cpu_present_mask", count).unwrap_or_else(|| online.clone());
        Ok(PerCpu { offsets, online, present })
    }

    /// CPU `cpu`'s copy of the variable that the symbol table has at `symbol`.
    #[must_use]
    pub fn address(&self, symbol: VirtAddr, cpu: u32) -> Option<VirtAddr> {
        self.offsets.get(cpu as usize).map(|&offset| symbol.offset(offset))
    }
}

fn mask(kernel: &Kernel<'_>, symbol: &str, count: usize) -> Option<Vec<u32>> {
    let at = kernel.symbol(symbol).ok()??;
    let bits = kernel.memory().bytes(at, count.div_ceil(64) * 8).ok()?;
    let set = |cpu: &u32| bits[*cpu as usize / 8] >> (cpu % 8) & 1 == 1;
    let cpus: Vec<u32> = (0..count as u32).filter(set).collect();
    (!cpus.is_empty()).then_some(cpus)
}
