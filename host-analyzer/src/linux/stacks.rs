//! Which stack an address lies on: a task's, or one of those that a CPU has besides, of which the
//! architectures know ([`crate::unwind::Unwinder::cpu_stacks`]).

use crate::VirtAddr;

use super::Linux;
use super::task::Task;

/// A stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// What it is called: `task`, `IRQ`, `NMI`, ...
    pub name: String,
    /// Its lowest address.
    pub start: VirtAddr,
    /// The first address after it.
    pub end: VirtAddr,
}

impl Stack {
    /// Its size in bytes; one that makes no sense is 0.
    #[must_use]
    pub fn size(&self) -> usize {
        self.end.0.checked_sub(self.start.0).filter(|&it| it <= MAX_THREAD_SIZE).unwrap_or(0)
            as usize
    }

    /// Whether `at` lies on it. The address after it counts: a stack pointer at the very bottom.
    #[must_use]
    pub fn holds(&self, at: VirtAddr) -> bool {
        self.start <= at && at <= self.end
    }
}

/// The stacks that an unwind may run on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stacks {
    /// Those that are known.
    pub list: Vec<Stack>,
    /// Whether there are no others. Where the dump lacks what leads to some, there may be.
    pub all: bool,
}

impl Stacks {
    /// These and no others.
    #[must_use]
    pub fn only(list: Vec<Stack>) -> Stacks {
        Stacks { list, all: true }
    }

    /// The stack with `at` on it.
    #[must_use]
    pub fn with(&self, at: VirtAddr) -> Option<&Stack> {
        self.list.iter().find(|stack| stack.holds(at))
    }
}

/// THREAD_SIZE without KASAN, where neither the kernel's own symbols nor the size of a page tell
/// more (arch/x86/include/asm/page_64_types.h, arch/arm64/include/asm/memory.h, 6.12).
const THREAD_SIZE: u64 = 16 << 10;
const MAX_THREAD_SIZE: u64 = 128 << 10;

impl Linux<'_, '_> {
    /// Size of a task's stack in bytes: that of init_task's.
    #[must_use]
    pub fn thread_size(&self) -> u64 {
        let symbol = |name| self.kernel.symbol(name).ok().flatten();
        let start = symbol("__start_init_task").or_else(|| symbol("__start_init_stack"));
        let end = symbol("__end_init_task").or_else(|| symbol("__end_init_stack"));
        let size = start.zip(end).map(|(start, end)| end.0.wrapping_sub(start.0));
        let size = size.filter(|&size| (4096..=MAX_THREAD_SIZE).contains(&size));
        // A stack is never smaller than a page.
        let least = || THREAD_SIZE.max(self.kernel.vmcoreinfo().page_size().min(MAX_THREAD_SIZE));
        size.unwrap_or_else(least)
    }

    /// The stack of `task`.
    #[must_use]
    pub fn task_stack(&self, task: &Task) -> Stack {
        let end = task.stack.offset(self.thread_size());
        Stack { name: "task".to_owned(), start: task.stack, end }
    }
}
