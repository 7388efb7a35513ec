//! What `ps` tells of a task besides its name: its parent, its memory, whether it is the kernel's own.

use crate::kernel::Kernel;
use crate::kernel::types::Types;
use crate::kernel::virt::VirtualMemory;
use crate::{Error, ReadContext, ReadError, VirtAddr, bytes};

use super::task::Task;

/// Bit of task_struct.flags: a kernel thread (include/linux/sched.h, 5.10 to 6.12).
const PF_KTHREAD: u32 = 0x0020_0000;

/// The counters of mm_struct.rss_stat that make up the resident set: MM_FILEPAGES, MM_ANONPAGES and
/// MM_SHMEMPAGES (include/linux/mm_types_task.h, 6.1 and 6.12; get_mm_rss in include/linux/mm.h).
const RESIDENT: [u64; 3] = [0, 1, 3];

/// Where the members lie, in bytes; `None` where this kernel's types have no such member.
pub struct ProcessLayout {
    flags: u64,
    parent: u64,
    tgid: u64,
    memory: u64,
    total: u64,
    /// The first of the counters, and the distance to the next.
    resident: Option<(u64, u64)>,
    page_size: u64,
}

/// The memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Of its address space.
    pub mapped: u64,
    /// What of that was in memory; `None` when this kernel counts in a way that is not known. Like
    /// /proc/PID/status, without what a CPU or a thread had counted and not yet handed in.
    pub resident: Option<u64>,
}

/// A task, as `ps` shows it. What could not be read is an error of its own.
#[derive(Clone, Debug)]
pub struct Process {
    /// The task.
    pub task: Task,
    /// PID of the parent process, as getppid() gives it (kernel/sys.c, 6.1).
    pub parent: Result<u32, ReadError>,
    /// Whether it is a kernel thread.
    pub kernel_thread: Result<bool, ReadError>,
    /// Its memory; `None` for a task without any.
    pub size: Result<Option<Size>, ReadError>,
}

impl ProcessLayout {
    /// Looks the members up in the kernel's types.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn new(kernel: &Kernel<'_>) -> Result<ProcessLayout, Error> {
        Ok(ProcessLayout {
            flags: kernel.offset("task_struct", "flags")?,
            parent: kernel.offset("task_struct", "real_parent")?,
            tgid: kernel.offset("task_struct", "tgid")?,
            memory: kernel.offset("task_struct", "mm")?,
            total: kernel.offset("mm_struct", "total_vm")?,
            resident: resident(kernel)?,
            page_size: kernel.vmcoreinfo().page_size(),
        })
    }

    /// Reads what there is to tell of `task`.
    #[must_use]
    pub fn read(&self, kernel: &Kernel<'_>, task: Task) -> Process {
        let memory = kernel.memory();
        let parent = memory.pointer(task.address.offset(self.parent));
        let flags = memory.u32(task.address.offset(self.flags));
        Process {
            parent: parent.and_then(|parent| memory.u32(parent.offset(self.tgid))),
            kernel_thread: flags.map(|flags| flags & PF_KTHREAD != 0),
            size: self.size(kernel, task.address),
            task,
        }
    }

    fn size(&self, kernel: &Kernel<'_>, task: VirtAddr) -> Result<Option<Size>, ReadError> {
        let memory = kernel.memory();
        let space = memory.pointer(task.offset(self.memory))?;
        if space.is_null() {
            return Ok(None);
        }
        let bytes = |pages: u64| pages.saturating_mul(self.page_size);
        let mapped = bytes(memory.u64(space.offset(self.total))?);
        let Some((first, distance)) = self.resident else {
            return Ok(Some(Size { mapped, resident: None }));
        };
        let mut pages = 0u64;
        for index in RESIDENT {
            // A counter may be below zero for a while, and then counts as zero.
            let count = memory.u64(space.offset(first + index * distance))? as i64;
            pages = pages.saturating_add(count.max(0) as u64);
        }
        Ok(Some(Size { mapped, resident: Some(bytes(pages)) }))
    }
}

impl<'d> super::Linux<'_, 'd> {
    /// The address space of a process, which `text` names by PID or by the address of one of its tasks.
    ///
    /// # Errors
    /// [`Error::NoTask`], [`Error::NoMemory`] for a kernel thread, [`Error::Read`].
    pub fn memory_of(&self, text: &str) -> Result<VirtualMemory<'d>, Error> {
        let kernel = self.kernel();
        let task = self.named_task(text)?;
        let at = task.address.offset(kernel.offset("task_struct", "mm")?);
        let space = kernel.memory().pointer(at).reading("a task's memory")?;
        if space.is_null() {
            return Err(Error::NoMemory(format!("{} (PID {})", task.comm, task.pid)));
        }
        let at = space.offset(kernel.offset("mm_struct", "pgd")?);
        let top = kernel.memory().pointer(at).reading("a process's page table")?;
        let root = kernel.memory().translate(top).reading("a process's page table")?;
        Ok(kernel.memory().of_process(root.phys))
    }
}

/// An array of atomic_long_t in a structure to 6.1, of struct percpu_counter from 6.2 on.
fn resident(kernel: &Kernel<'_>) -> Result<Option<(u64, u64)>, Error> {
    let Some(stat) = kernel.field("mm_struct", "rss_stat")? else { return Ok(None) };
    let types = kernel.types()?;
    let place = match types.array_of(stat.kind) {
        Some((counter, _)) => types.size_of(counter).zip(types.member_of(counter, "count")),
        None => types.member_of(stat.kind, "count").map(|count| (bytes::WORD, count)),
    };
    Ok(place.map(|(distance, count)| ((stat.offset + count.offset) as u64, distance as u64)))
}
