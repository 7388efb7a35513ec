//! The machine as a whole: names, clock, load, memory.

use crate::source::Prstatus;
use crate::{Error, ReadContext, VirtAddr, bytes};

use super::Linux;
use super::stacks::Stack;

/// Length of a field of struct new_utsname (__NEW_UTS_LEN + 1, include/uapi/linux/utsname.h).
const UTS_FIELD: usize = 65;

/// What `uname -a` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// Name of the machine in its network.
    pub node: String,
    /// The kernel's release.
    pub release: String,
    /// The kernel's version: build number and date.
    pub version: String,
    /// The architecture.
    pub machine: String,
}

/// The clock when the kernel died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Seconds since 1970, UTC.
    pub date: u64,
    /// Seconds since boot.
    pub uptime: u64,
}

impl Linux<'_, '_> {
    /// Reads `init_uts_ns`.
    ///
    /// # Errors
    /// [`Error::VmcoreinfoKey`], [`Error::NoMember`], [`Error::Read`].
    pub fn names(&self) -> Result<Names, Error> {
        let info = self.kernel.vmcoreinfo();
        let at = info.need_symbol("init_uts_ns")?;
        // Not in VMCOREINFO before 5.11.
        let offset = match info.offset("uts_namespace.name") {
            Some(offset) => offset as u64,
            None => self.kernel.offset("uts_namespace", "name")?,
        };
        let at = at.offset(offset);
        let raw = self.kernel.memory().bytes(at, 6 * UTS_FIELD).reading("init_uts_ns")?;
        // sysname, nodename, release, version, machine, domainname
        let field = |index: usize| bytes::c_string(&raw[index * UTS_FIELD..][..UTS_FIELD]);
        Ok(Names { node: field(1), release: field(2), version: field(3), machine: field(4) })
    }

    /// Reads the timekeeper (kernel/time/timekeeping.c, 6.1): wall time, and the time since boot.
    ///
    /// # Errors
    /// [`Error::NoSymbol`], [`Error::NoMember`], [`Error::Read`].
    pub fn clock(&self) -> Result<Clock, Error> {
        let kernel = self.kernel;
        let core = kernel.need_symbol("tk_core", "the clock cannot be read")?;
        // struct tk_data from 6.13 on; before, an anonymous structure of a sequence count and the
        // timekeeper, which is aligned to 8.
        let inside = kernel.field("tk_data", "timekeeper")?.map_or(8, |field| field.offset as u64);
        let keeper = core.offset(inside);
        let word = |path| {
            let at = keeper.offset(kernel.offset("timekeeper", path)?);
            kernel.memory().u64(at).reading("the clock")
        };
        let date = word("xtime_sec")?;
        let to_monotonic = word("wall_to_monotonic.tv_sec")?;
        let slept = word("offs_boot")? / 1_000_000_000;
        let uptime = date.wrapping_add(to_monotonic).wrapping_add(slept);
        Ok(Clock { date, uptime })
    }

    /// The load averages of 1, 5 and 15 minutes (`avenrun`, 11 bits of fraction).
    ///
    /// # Errors
    /// [`Error::NoSymbol`], [`Error::Read`].
    pub fn load(&self) -> Result<[f64; 3], Error> {
        let at = self.kernel.need_symbol("avenrun", "the load is unknown")?;
        let raw = self.kernel.memory().bytes(at, 24).reading("avenrun")?;
        let word = |index: usize| bytes::u64_at(&raw, index * 8).unwrap_or(0) as f64 / 2048.0;
        Ok([word(0), word(1), word(2)])
    }

    /// RAM in bytes: the pages present in all nodes. That is what crash calls MEMORY; the kernel's
    /// own `_totalram_pages` leaves out what it keeps for itself.
    ///
    /// # Errors
    /// [`Error::NoSymbol`], [`Error::NoMember`], [`Error::Read`].
    pub fn memory_size(&self) -> Result<u64, Error> {
        let (kernel, memory) = (self.kernel, self.kernel.memory());
        let present = kernel.offset("pglist_data", "node_present_pages")?;
        let mut pages = 0u64;
        for node in self.nodes()? {
            let there = memory.u64(node.offset(present)).reading("a node's size")?;
            pages = pages.saturating_add(there);
        }
        Ok(pages.saturating_mul(kernel.vmcoreinfo().page_size()))
    }

    /// The memory nodes: addresses of their struct pglist_data. x86 has the array and its length in
    /// VMCOREINFO, arm64 only the mask of the nodes that are there.
    fn nodes(&self) -> Result<Vec<VirtAddr>, Error> {
        const MAX_NODES: u64 = 4096;
        let (kernel, info) = (self.kernel, self.kernel.vmcoreinfo());
        if let Some(only) = info.symbol("contig_page_data") {
            return Ok(vec![only]);
        }
        let so = "the memory nodes cannot be found";
        let array =
            info.symbol("node_data").map_or_else(|| kernel.need_symbol("node_data", so), Ok)?;
        let mask = info.symbol("node_online_map").zip(info.size("nodemask_t"));
        let mask = mask.and_then(|(at, size)| kernel.memory().bytes(at, size.min(512)).ok());
        let online = |index: u64| {
            let byte = mask.as_ref().map(|mask| mask.get(index as usize / 8).copied().unwrap_or(0));
            byte.is_none_or(|byte| byte >> (index % 8) & 1 == 1)
        };
        let known = mask.as_ref().map(|mask| mask.len() as u64 * 8);
        let count = info.length("node_data").or(known).unwrap_or(1).min(MAX_NODES);
        let mut nodes = Vec::new();
        for index in (0..count).filter(|&index| online(index)) {
            let node = kernel.memory().pointer(array.offset(index * 8)).reading("node_data")?;
            nodes.extend(Some(node).filter(|node| !node.is_null()));
        }
        Ok(nodes)
    }

    /// The CPU's clock rate in MHz (`cpu_khz`, x86).
    #[must_use]
    pub fn cpu_mhz(&self) -> Option<u32> {
        let at = self.kernel.symbol("cpu_khz").ok()??;
        self.kernel.memory().u32(at).ok().map(|khz| khz / 1000).filter(|&mhz| mhz != 0)
    }

    /// How many CPUs ran: those online, or those that saved registers when stopping them took them
    /// out of the mask (arm64, 6.12).
    ///
    /// # Errors
    /// Those of [`Linux::percpu`].
    pub fn cpu_count(&self) -> Result<usize, Error> {
        let percpu = self.percpu()?;
        let saved = self.kernel.notes().prstatus.len().min(percpu.present.len());
        Ok(percpu.online.len().max(saved))
    }

    /// The registers that `cpu` saved, as the notes have them: from the kernel's own per-CPU buffer
    /// (`crash_notes`) when it can be found in the dump, else from the note that fits the CPU.
    #[must_use]
    pub fn saved_registers(&self, cpu: u32) -> Option<Vec<u8>> {
        self.crash_note(cpu).or_else(|| self.fitting_note(cpu))
    }

    /// The registers in the notes whose stack pointer lies on `stack`, if one CPU's do.
    #[must_use]
    pub fn registers_on(&self, stack: &Stack) -> Option<&[u8]> {
        let on_it = |status: &&Prstatus<'_>| {
            let stand = self.kernel.machine().stand(status.registers);
            stand.is_some_and(|stand| stack.holds(stand.sp))
        };
        self.kernel.notes().prstatus.iter().find(on_it).map(|status| status.registers)
    }

    fn crash_note(&self, cpu: u32) -> Option<Vec<u8>> {
        /// More than a note with struct elf_prstatus takes.
        const NOTE: usize = 512;
        let kernel = self.kernel;
        let buffers = kernel.memory().pointer(kernel.symbol("crash_notes").ok()??).ok()?;
        let at = self.percpu().ok()?.address(buffers, cpu)?;
        let raw = kernel.memory().bytes_up_to(at, NOTE);
        let note = crate::source::NoteBook::parse(std::iter::once(&raw[..]));
        note.prstatus.first().map(|status| status.registers.to_vec())
    }

    /// Notes do not say whose they are. QEMU writes one for each CPU; the kernel leaves out CPUs
    /// that saved nothing, so that order tells only when there are as many notes as CPUs. Else the
    /// PID tells (that of the task that ran), and for idle CPUs the stack they ran on.
    fn fitting_note(&self, cpu: u32) -> Option<Vec<u8>> {
        let notes = &self.kernel.notes().prstatus;
        let percpu = self.percpu().ok()?;
        let in_order = [&percpu.present, &percpu.online].into_iter().find_map(|cpus| {
            let index = cpus.iter().position(|&it| it == cpu)?;
            notes.get(index).filter(|_| notes.len() == cpus.len())
        });
        let status = in_order.or_else(|| {
            let task = self.current(cpu).ok()?;
            let stack = self.task_stack(&task);
            let fits = |status: &&Prstatus<'_>| {
                let sp = self.kernel.machine().stand(status.registers).map(|stand| stand.sp);
                let on_its_stack = sp.is_some_and(|sp| stack.holds(sp));
                status.pid == task.pid && (task.pid != 0 || on_its_stack)
            };
            notes.iter().find(fits)
        })?;
        Some(status.registers.to_vec())
    }
}
