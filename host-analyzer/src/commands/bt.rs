//! `bt`: what [`Options`] says.

use std::io::Write;

use clap::Args;

use crate::kernel::Kernel;
use crate::kernel::dwarf::SourceFrame;
use crate::linux::printk::Log;
use crate::linux::stacks::Stack;
use crate::linux::task::Task;
use crate::linux::{Linux, Place};
use crate::render::text;
use crate::unwind::{self, End, Frame, Start, Trace, Unwinder};
use crate::{Error, VirtAddr};

/// Backtraces of kernel stacks
///
/// Without a task, that of the task that crashed. Real registers come first: what the crashing and
/// the stopped CPUs saved; for other tasks, what they saved when they stopped running. Frames are
/// followed across interrupt and exception stacks to user mode. The number in brackets is where on
/// the stack a frame's return address lies. With a vmlinux, functions that were inlined stand above
/// the one they were inlined into, and each has its line.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The tasks to show, by PID or address; none means the one that crashed.
    #[arg(skip)]
    pub tasks: Vec<TaskId>,
    /// The tasks that were running, one per CPU
    #[arg(short, long)]
    pub all_cpus: bool,
    /// Every task
    #[arg(long, conflicts_with = "all_cpus")]
    pub all_tasks: bool,
}

/// How a user names a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskId {
    /// By PID; 0 names the idle tasks.
    Pid(u32),
    /// By the address of its struct task_struct.
    Address(VirtAddr),
}

impl std::str::FromStr for TaskId {
    type Err = String;

    fn from_str(text: &str) -> Result<TaskId, String> {
        let hexadecimal = text.strip_prefix("0x").unwrap_or(text);
        if let Ok(pid) = text.parse() {
            return Ok(TaskId::Pid(pid));
        }
        match u64::from_str_radix(hexadecimal, 16) {
            Ok(address) if address >> 63 == 1 => Ok(TaskId::Address(VirtAddr(address))),
            _ => Err(format!("{text} is neither a PID nor the address of a task")),
        }
    }
}

/// The backtrace of a task.
#[derive(Clone, Debug)]
pub struct Backtrace {
    /// The task.
    pub task: Task,
    /// The CPU that it ran on, if it ran.
    pub running_on: Option<u32>,
    /// Its frames, innermost first.
    pub rows: Vec<Row>,
    /// Why they ended.
    pub end: End,
}

/// One frame, with all that is known of it.
#[derive(Clone, Debug)]
pub struct Row {
    /// The frame.
    pub frame: Frame,
    /// The function it is in.
    pub place: Option<Place>,
    /// Functions inlined there, innermost first, and the line in each; then the function itself.
    pub source: Vec<SourceFrame>,
    /// The name of the stack that was left just before this frame, if one was.
    pub left_stack: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// [`Error::NoTask`], [`Error::Output`], and whatever makes all tasks unreadable.
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    text::completeness(kernel.dump(), out)?;
    let linux = Linux::new(kernel);
    let tracer = Tracer::new(&linux);
    if !options.all_tasks && options.tasks.is_empty() && !options.all_cpus {
        return crashed(&tracer, out);
    }
    let mut problems = Vec::new();
    for task in chosen(&tracer, options, &mut problems)? {
        text::backtrace(&tracer.trace(task), None, out)?;
        writeln!(out)?;
    }
    text::problems(&problems, out)
}

fn crashed(tracer: &Tracer<'_, '_>, out: &mut dyn Write) -> Result<(), Error> {
    let kernel = tracer.linux.kernel();
    let panic = Log::read(kernel).ok().and_then(|log| log.panic_line());
    let cpu = tracer.linux.crashed_cpu();
    match cpu.and_then(|cpu| tracer.linux.current(cpu)) {
        Ok(task) => text::backtrace(&tracer.trace(task), panic.as_deref(), out),
        // The task is lost; what the CPUs saved may still tell the story.
        Err(error) if kernel.notes().prstatus.is_empty() => Err(error),
        Err(error) => {
            text::problems(&[format!("the task that crashed: {error}")], out)?;
            for note in &kernel.notes().prstatus {
                let trace = tracer.unwinder.unwind(Start::Registers(note.registers), &[]);
                let rows = tracer.rows(trace.frames, &[]);
                text::note_backtrace(note.pid, &rows, &trace.end, out)?;
            }
            Ok(())
        }
    }
}

fn chosen(
    tracer: &Tracer<'_, '_>,
    options: &Options,
    problems: &mut Vec<String>,
) -> Result<Vec<Task>, Error> {
    let linux = tracer.linux;
    if options.all_tasks {
        let list = linux.all_tasks()?;
        problems.extend(list.problems);
        return Ok(list.tasks);
    }
    let mut tasks = Vec::new();
    if options.all_cpus {
        for &cpu in &linux.percpu()?.present {
            match linux.current(cpu) {
                Ok(task) => tasks.push(task),
                Err(error) => problems.push(format!("CPU {cpu}: {error}")),
            }
        }
    }
    for &id in &options.tasks {
        match id {
            TaskId::Address(address) => tasks.push(linux.task(address)?),
            TaskId::Pid(pid) => {
                let list = linux.all_tasks()?;
                problems.extend(list.problems);
                let before = tasks.len();
                tasks.extend(list.tasks.into_iter().filter(|task| task.pid == pid));
                if tasks.len() == before {
                    return Err(Error::NoTask(pid.to_string()));
                }
            }
        }
    }
    Ok(tasks)
}

/// Makes backtraces of a kernel's tasks.
pub struct Tracer<'k, 'd> {
    linux: &'k Linux<'k, 'd>,
    unwinder: Box<dyn Unwinder + 'k>,
    running: Vec<(u32, VirtAddr)>,
}

impl<'k, 'd> Tracer<'k, 'd> {
    /// A tracer for the tasks of `linux`.
    #[must_use]
    pub fn new(linux: &'k Linux<'k, 'd>) -> Tracer<'k, 'd> {
        let cpus = linux.percpu().map(|percpu| percpu.present.clone()).unwrap_or_default();
        let running = |cpu| linux.current(cpu).ok().map(|task| (cpu, task.address));
        let running = cpus.into_iter().filter_map(running).collect();
        Tracer { linux, unwinder: unwind::for_kernel(linux), running }
    }

    /// The backtrace of a task.
    #[must_use]
    pub fn trace(&self, task: Task) -> Backtrace {
        let running_on =
            self.running.iter().find(|(_, at)| *at == task.address).map(|&(cpu, _)| cpu);
        let mut stacks = vec![self.linux.task_stack(&task)];
        stacks.extend(self.unwinder.cpu_stacks(running_on.unwrap_or(task.cpu)));
        let trace = self.unwind(&task, running_on, &stacks);
        let rows = self.rows(trace.frames, &stacks);
        Backtrace { task, running_on, rows, end: trace.end }
    }

    fn unwind(&self, task: &Task, running_on: Option<u32>, stacks: &[Stack]) -> Trace {
        match running_on {
            Some(cpu) => match self.linux.saved_registers(cpu) {
                Some(registers) => self.unwinder.unwind(Start::Registers(&registers), stacks),
                None => {
                    let why = format!("it was running, and CPU {cpu} saved no registers");
                    Trace { frames: Vec::new(), end: End::Stuck(why) }
                }
            },
            None => self.unwinder.unwind(Start::Task(task.address), stacks),
        }
    }

    fn rows(&self, frames: Vec<Frame>, stacks: &[Stack]) -> Vec<Row> {
        let mut last = None;
        let mut row = |frame: Frame| {
            let lookup = frame.lookup_pc();
            let place = self.linux.place(lookup).map(|place| {
                // Looked up one byte back, shown as it is.
                let offset = place.offset + frame.pc.0.wrapping_sub(lookup.0);
                Place { offset, ..place }
            });
            let stack = stacks.iter().find(|stack| stack.holds(frame.at));
            let changed = last.is_some_and(|last: &Stack| Some(last) != stack);
            let left_stack = last.filter(|_| changed).map(|last| last.name.clone());
            last = stack;
            let source = self.linux.kernel().source_frames(lookup);
            Row { frame, place, source, left_stack }
        };
        frames.into_iter().map(&mut row).collect()
    }
}
