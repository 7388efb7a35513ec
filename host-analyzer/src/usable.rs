//! Whether a dump is of use yet: what can be told of a crash while the dump is still arriving.

use crate::commands::bt::{Backtrace, Tracer};
use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::printk::Log;
use crate::unwind::End;

/// What of a dump can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usable {
    /// Whether the backtrace of the CPU that crashed is complete.
    pub crash: bool,
    /// Of how many tasks the stack unwinds to its end, and how many were found. There may be more
    /// while [`Usable::tasks`] is false.
    pub stacks: (usize, usize),
    /// Whether all tasks were found.
    pub tasks: bool,
    /// Whether the log is complete.
    pub log: bool,
}

/// Looks what of a dump can be used. Takes as long as `bt --all-tasks` without lines.
#[must_use]
pub fn check(kernel: &Kernel<'_>) -> Usable {
    let linux = Linux::new(kernel);
    let tracer = Tracer::without_lines(&linux);
    let (crashed, _) = tracer.crashed();
    let list = linux.all_tasks().ok();
    let traces = list.iter().flat_map(|list| &list.tasks).map(|task| tracer.trace(task.clone()));
    let (mut whole, mut found) = (0, 0);
    for trace in traces {
        found += 1;
        whole += usize::from(is_complete(&trace));
    }
    Usable {
        crash: crashed.len() == 1 && crashed.iter().all(is_complete),
        stacks: (whole, found),
        tasks: list.is_some_and(|list| list.problems.is_empty()),
        log: Log::read(kernel).is_ok_and(|log| log.is_whole()),
    }
}

fn is_complete(trace: &Backtrace) -> bool {
    !matches!(trace.end, End::Stuck(_))
}
