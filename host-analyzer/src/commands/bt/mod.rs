//! `bt`: what [`Options`] says.

mod document;
mod stack;
mod tracer;
mod variables;

use std::io::Write;

use clap::Args;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::printk::Log;
use crate::linux::task::{Task, TaskList};
use crate::render::text;
use crate::unwind::Start;
use crate::{Error, VirtAddr};

pub use tracer::{Backtrace, Owner, Row, Tracer, Traces};
pub use variables::{OfFunction, Wanted, own_variables};

use super::place::{hexadecimal, place};
use stack::Symbolic;

/// Backtraces of kernel stacks
///
/// Without a task, that of the task that crashed. Real registers come first: what the crashing and
/// the stopped CPUs saved; for other tasks, what they saved when they stopped running. Frames are
/// followed across interrupt and exception stacks to user mode. The number in brackets is where on
/// the stack a frame's return address lies. With a vmlinux, functions that were inlined stand above
/// the one they were inlined into, and each has its line. The letters are those of crash.
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
    /// All threads of the tasks' processes
    #[arg(short, long)]
    pub group: bool,
    /// Source lines are a must: an error without a vmlinux that has them
    #[arg(short, long)]
    pub lines: bool,
    /// Offsets in functions; they are always shown
    #[arg(short = 's', long)]
    pub offsets: bool,
    /// The arguments of functions, and where each value is from; without a vmlinux, of those that an exception
    /// interrupted
    #[arg(long)]
    pub args: bool,
    /// The local variables of functions; needs a vmlinux
    #[arg(long)]
    pub locals: bool,
    /// The words of the stack that belong to each frame
    #[arg(short, long)]
    pub frames: bool,
    /// The same, with symbols instead of the addresses of code and data that have names, and the slab cache's
    /// name in brackets instead of an object's address. Twice: the object's address, too
    #[arg(short = 'F', long, action = clap::ArgAction::Count)]
    pub symbolic_frames: u8,
    /// Instead of frames: all words of the task's stack
    #[arg(short, long, conflicts_with_all = ["text", "all_text", "exceptions"])]
    pub raw: bool,
    /// Instead of frames: all addresses of code on the stack, from the stack pointer on
    #[arg(short, long, conflicts_with_all = ["all_text", "exceptions"])]
    pub text: bool,
    /// Instead of frames: all addresses of code on the whole stack, also those left over
    #[arg(short = 'T', long, conflicts_with = "exceptions")]
    pub all_text: bool,
    /// Instead of frames: what on the stack looks like registers saved by an exception
    #[arg(short, long)]
    pub exceptions: bool,
    /// The same for the interrupt and exception stacks of all CPUs
    #[arg(short = 'E', long, conflicts_with_all = ["raw", "text", "all_text", "exceptions"])]
    pub cpu_exceptions: bool,
    /// Take every word that follows a call for a frame, for stacks that unwind tables lead nowhere on
    #[arg(short = 'o', short_alias = 'O', long)]
    pub scan: bool,
    /// Only backtraces in which this symbol, or a word with this value on the stack, occurs
    #[arg(short = 'R', long, value_name = "SYMBOL | VALUE")]
    pub reference: Option<String>,
    /// Begin at this instruction
    #[arg(short = 'I', long, value_name = "ADDRESS", requires = "stack")]
    pub instruction: Option<String>,
    /// Begin with the return address at this place on the stack; or, with --instruction, with this stack
    /// pointer (arm64: this frame pointer)
    #[arg(short = 'S', long, value_name = "ADDRESS")]
    pub stack: Option<String>,
    /// Instead of frames: check the end of every task's stack
    #[arg(short = 'v', long)]
    pub verify: bool,
    /// Output as JSON
    #[arg(long, conflicts_with_all = ["raw", "text", "all_text", "exceptions", "cpu_exceptions", "verify"])]
    pub json: bool,
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

/// Runs the command.
///
/// # Errors
/// [`Error::NoTask`], [`Error::NothingToShow`], [`Error::NoPlace`], [`Error::Usage`], [`Error::Output`].
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    if !options.json {
        text::completeness(kernel.dump(), out)?;
    }
    let linux = Linux::new(kernel);
    let has_lines = kernel.vmlinux().is_some_and(|vmlinux| vmlinux.no_lines().is_none());
    if let Some(option) = [(options.lines, "-l"), (options.locals, "--locals")]
        .into_iter()
        .find_map(|(wanted, option)| (wanted && !has_lines).then_some(option))
    {
        let hint = "needs a vmlinux with debug information behind the dump";
        return Err(Error::Usage(format!("{option} {hint}")));
    }
    if options.verify {
        return stack::verify(&linux, out);
    }
    let wanted = Wanted { arguments: options.args, locals: options.locals };
    let tracer = Tracer::new(&linux).with_variables(wanted);
    if options.cpu_exceptions {
        return stack::cpu_exceptions(&tracer, out);
    }
    let one = !options.all_tasks && options.tasks.is_empty() && !options.all_cpus;
    let (mut traces, problems) = match &options.stack {
        Some(at) => (vec![from_stack(&tracer, options, at)?], Vec::new()),
        None if one && !options.group => tracer.crashed(),
        None => chosen(&tracer, options, one)?,
    };
    if traces.is_empty() {
        return Err(Error::NothingToShow(problems.join("; ")));
    }
    if options.scan {
        traces = traces.into_iter().map(|trace| tracer.scanned(trace)).collect();
    }
    if let Some(wanted) = &options.reference {
        let value = hexadecimal(wanted);
        traces.retain(|trace| stack::refers(&tracer, trace, wanted, value));
        if traces.is_empty() {
            return Err(Error::NothingToShow(format!("no backtrace refers to {wanted}")));
        }
    }
    let panic = || Log::read(kernel).ok().and_then(|log| log.panic_line());
    let panic = if one && !options.group { panic() } else { None };
    if options.json {
        return document::write(kernel, &traces, wanted, panic.as_deref(), &problems, out);
    }
    for trace in traces {
        show(&tracer, options, &trace, panic.as_deref(), out)?;
        if !one || options.group {
            writeln!(out)?;
        }
    }
    text::problems(&problems, out)
}

fn show(
    tracer: &Tracer<'_, '_>,
    options: &Options,
    trace: &Backtrace,
    panic: Option<&str>,
    out: &mut dyn Write,
) -> Result<(), Error> {
    if options.raw || options.text || options.all_text || options.exceptions {
        return stack::contents(tracer, options, trace, out);
    }
    if options.frames || options.symbolic_frames > 0 {
        let named = match options.symbolic_frames {
            0 => None,
            many => Some(Symbolic::new(tracer, many > 1)),
        };
        return text::backtrace_with(trace, panic, out, &mut |index, out| {
            stack::frame_data(tracer, trace, index, named.as_ref(), out)
        });
    }
    text::backtrace(trace, panic, out)
}

/// The backtrace that begins where the user says, on the stack of the task that was named, or of the one
/// that crashed.
fn from_stack(tracer: &Tracer<'_, '_>, options: &Options, at: &str) -> Result<Backtrace, Error> {
    let linux = tracer.linux();
    let task = match options.tasks.as_slice() {
        [] => linux.current(linux.crashed_cpu()?)?,
        [TaskId::Address(address)] => linux.task(*address)?,
        [TaskId::Pid(pid)] => linux.named_task(&pid.to_string())?,
        _ => return Err(Error::Usage("-S is about one task".to_owned())),
    };
    let at = place(linux, at)?;
    Ok(match &options.instruction {
        Some(text) => tracer.trace_from(task, Start::Instruction(place(linux, text)?, at)),
        None => tracer.trace_from(task, Start::ReturnAddress(at)),
    })
}

fn chosen(tracer: &Tracer<'_, '_>, options: &Options, one: bool) -> Result<Traces, Error> {
    let linux = tracer.linux();
    if options.all_tasks {
        let list = linux.all_tasks()?;
        return Ok((list.tasks.into_iter().map(|it| tracer.trace(it)).collect(), list.problems));
    }
    if options.group {
        return group(tracer, options, one);
    }
    let (mut traces, mut problems) = match options.all_cpus {
        true => tracer.all_cpus(),
        false => (Vec::new(), Vec::new()),
    };
    let pids = options.tasks.iter().any(|id| matches!(id, TaskId::Pid(_)));
    let list = if pids { linux.all_tasks()? } else { TaskList::default() };
    for &id in &options.tasks {
        match id {
            TaskId::Address(address) => traces.push(match linux.task(address) {
                Ok(task) => tracer.trace(task),
                Err(error) => tracer.trace_torn(address, error.to_string()),
            }),
            TaskId::Pid(pid) => {
                let named = list.tasks.iter().filter(|task| task.pid == pid);
                let before = traces.len();
                traces.extend(named.cloned().map(|task| tracer.trace(task)));
                if traces.len() == before && list.problems.is_empty() {
                    return Err(Error::NoTask(pid.to_string()));
                } else if traces.len() == before {
                    problems.push(format!("PID {pid}: it is not among the tasks that were found"));
                }
            }
        }
    }
    problems.extend(list.problems);
    Ok((traces, problems))
}

/// All threads of the processes that were named, or of the one that crashed.
fn group(tracer: &Tracer<'_, '_>, options: &Options, one: bool) -> Result<Traces, Error> {
    let linux = tracer.linux();
    let list = linux.all_tasks()?;
    let named = |id: &TaskId| {
        let is_it = |task: &&Task| match *id {
            TaskId::Pid(pid) => task.pid == pid,
            TaskId::Address(address) => task.address == address,
        };
        list.tasks.iter().find(is_it).cloned().ok_or_else(|| Error::NoTask(format!("{id:?}")))
    };
    let leaders: Vec<Task> = match one {
        true => vec![linux.current(linux.crashed_cpu()?)?],
        false => options.tasks.iter().map(named).collect::<Result<_, _>>()?,
    };
    let wanted = |task: &&Task| {
        // The idle tasks are not threads of one process, though they have one number.
        let same = |leader: &Task| match task.tgid {
            0 => leader.address == task.address,
            tgid => leader.tgid == tgid,
        };
        leaders.iter().any(same)
    };
    let traces = list.tasks.iter().filter(wanted).cloned().map(|task| tracer.trace(task));
    Ok((traces.collect(), list.problems.clone()))
}
