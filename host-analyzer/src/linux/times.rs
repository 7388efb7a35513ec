//! When tasks ran and for how long.

use crate::kernel::Kernel;
use crate::{Error, ReadContext, ReadError, VirtAddr};

use super::Linux;

/// Where the members of task_struct lie, in bytes (include/linux/sched.h, 5.10 to 6.12).
pub struct TimesLayout {
    started: u64,
    user: u64,
    system: u64,
    last_run: u64,
}

/// The times of a task in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// When it was made, since boot; the time that the machine slept counts.
    pub started: u64,
    /// In user mode; with tick-based accounting as many ticks as found it there.
    pub user: u64,
    /// In the kernel, by the same measure.
    pub system: u64,
    /// When it was last given a CPU, by that CPU's clock of the scheduler.
    pub last_run: u64,
}

impl TimesLayout {
    /// Looks the members up in the kernel's types.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn new(kernel: &Kernel<'_>) -> Result<TimesLayout, Error> {
        let offset = |member| kernel.offset("task_struct", member);
        Ok(TimesLayout {
            started: offset("start_boottime")?,
            user: offset("utime")?,
            system: offset("stime")?,
            last_run: offset("sched_info.last_arrival")?,
        })
    }

    /// Reads the times of the task at `task`.
    ///
    /// # Errors
    /// [`ReadError`] of the first member that could not be read.
    pub fn read(&self, kernel: &Kernel<'_>, task: VirtAddr) -> Result<Times, ReadError> {
        let word = |offset| kernel.memory().u64(task.offset(offset));
        Ok(Times {
            started: word(self.started)?,
            user: word(self.user)?,
            system: word(self.system)?,
            last_run: word(self.last_run)?,
        })
    }
}

impl Linux<'_, '_> {
    /// What the scheduler's clock of `cpu` last showed, in nanoseconds (`rq.clock`, kernel/sched/sched.h, 6.1).
    ///
    /// # Errors
    /// [`Error::NoSymbol`], [`Error::NoMember`], [`Error::Read`].
    pub fn scheduler_clock(&self, cpu: u32) -> Result<u64, Error> {
        let kernel = self.kernel();
        let at = self.run_queue(cpu)?.offset(kernel.offset("rq", "clock")?);
        kernel.memory().u64(at).reading("a run queue")
    }
}
