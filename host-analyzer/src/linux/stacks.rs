//! Which stack an address lies on: a task's, or one of the stacks that a CPU has besides.

use crate::{Error, VirtAddr};

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
    /// Whether `at` lies on it. The address after it counts: a stack pointer at the very bottom.
    #[must_use]
    pub fn holds(&self, at: VirtAddr) -> bool {
        self.start <= at && at <= self.end
    }
}

/// THREAD_SIZE of x86_64 without KASAN, where the kernel's own symbols do not tell.
const THREAD_SIZE: u64 = 16 << 10;
const MAX_THREAD_SIZE: u64 = 128 << 10;
/// IRQ_STACK_SIZE (arch/x86/include/asm/page_64_types.h, 6.1), without KASAN.
const IRQ_STACK_SIZE: u64 = 16 << 10;
/// The exception stacks of struct cea_exception_stacks (arch/x86/include/asm/cpu_entry_area.h).
const EXCEPTION_STACKS: [&str; 5] = ["DF", "NMI", "DB", "MCE", "VC"];

impl Linux<'_, '_> {
    /// Size of a task's stack in bytes: that of init_task's.
    #[must_use]
    pub fn thread_size(&self) -> u64 {
        let symbol = |name| self.kernel.symbol(name).ok().flatten();
        let start = symbol("__start_init_task").or_else(|| symbol("__start_init_stack"));
        let end = symbol("__end_init_task").or_else(|| symbol("__end_init_stack"));
        let size = start.zip(end).map(|(start, end)| end.0.wrapping_sub(start.0));
        size.filter(|&size| (4096..=MAX_THREAD_SIZE).contains(&size)).unwrap_or(THREAD_SIZE)
    }

    /// The stacks that `task` could be found on: its own, and those of `cpu`.
    #[must_use]
    pub fn stacks(&self, task: &Task, cpu: u32) -> Vec<Stack> {
        let end = task.stack.offset(self.thread_size());
        let mut stacks = vec![Stack { name: "task".to_owned(), start: task.stack, end }];
        stacks.extend(self.irq_stack(cpu).ok().flatten());
        stacks.extend(self.exception_stacks(cpu).unwrap_or_default());
        stacks
    }

    /// The stack of hard interrupts: `hardirq_stack_ptr`, from 6.2 to 6.14 in `pcpu_hot`.
    fn irq_stack(&self, cpu: u32) -> Result<Option<Stack>, Error> {
        let symbol = match self.kernel.symbol("hardirq_stack_ptr")? {
            Some(at) => at,
            None => {
                let Some(hot) = self.kernel.symbol("pcpu_hot")? else { return Ok(None) };
                hot.offset(self.kernel.offset("pcpu_hot", "hardirq_stack_ptr")?)
            }
        };
        let Some(at) = self.percpu()?.address(symbol, cpu) else { return Ok(None) };
        let top = self.kernel.memory().pointer(at).ok().filter(|top| !top.is_null());
        Ok(top.map(|top| {
            // The pointer is the top itself or the last word below it (5.13 on).
            let end = VirtAddr(top.0.saturating_add(8) & !0xfff);
            Stack { name: "IRQ".to_owned(), start: end.back(IRQ_STACK_SIZE), end }
        }))
    }

    fn exception_stacks(&self, cpu: u32) -> Result<Vec<Stack>, Error> {
        let Some(symbol) = self.kernel.symbol("cea_exception_stacks")? else {
            return Ok(Vec::new());
        };
        let pointer = self.percpu()?.address(symbol, cpu);
        let base = pointer.and_then(|at| self.kernel.memory().pointer(at).ok());
        let Some(base) = base.filter(|base| !base.is_null()) else { return Ok(Vec::new()) };
        let types = self.kernel.types()?;
        let stack = |name: &str| {
            let field = types.member("cea_exception_stacks", &format!("{name}_stack"))?;
            let start = base.offset(field.offset as u64);
            let end = start.offset(types.size_of(field.kind)? as u64);
            Some(Stack { name: format!("{name} exception"), start, end })
        };
        Ok(EXCEPTION_STACKS.into_iter().filter_map(stack).collect())
    }
}
