//! Backtraces of tasks and CPUs.

use crate::VirtAddr;
use crate::kernel::dwarf::SourceFrame;
use crate::linux::stacks::{Stack, Stacks};
use crate::linux::task::Task;
use crate::linux::{Linux, Place};
use crate::source::Prstatus;
use crate::unwind::{self, CallerBy, End, Frame, FrameKind, Registers, Start, Trace, Unwinder};

use super::variables::{self, OfFunction, Wanted};

/// Whose backtrace it is.
#[derive(Clone, Debug)]
pub enum Owner {
    /// A task.
    Task(Task),
    /// A task that cannot be read.
    Torn {
        /// The address of its struct task_struct.
        address: VirtAddr,
        /// Why it cannot.
        why: String,
    },
    /// Whatever a CPU was running: only the registers that it saved are known.
    Registers {
        /// PID of what it was running, by the same note.
        pid: Option<u32>,
        /// Why its task is not known.
        why: String,
    },
}

/// A backtrace.
#[derive(Clone, Debug)]
pub struct Backtrace {
    /// Whose it is.
    pub owner: Owner,
    /// The CPU that it ran on, if it ran and that is known.
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
    /// The variables of each of the functions in `source`, if they are wanted; of the function alone where
    /// nothing is known of its source.
    pub variables: Vec<OfFunction>,
}

/// Backtraces, and what cannot be shown.
pub type Traces = (Vec<Backtrace>, Vec<String>);

/// Makes backtraces of a kernel's tasks.
pub struct Tracer<'k, 'd> {
    linux: &'k Linux<'k, 'd>,
    unwinder: Box<dyn Unwinder + 'k>,
    running: Vec<(u32, VirtAddr)>,
    /// Whether the tasks of some CPUs are not known.
    torn: bool,
    lines: bool,
    wanted: Wanted,
}

impl<'k, 'd> Tracer<'k, 'd> {
    /// A tracer for the tasks of `linux`.
    #[must_use]
    pub fn new(linux: &'k Linux<'k, 'd>) -> Tracer<'k, 'd> {
        let (running, missing) = linux.running();
        let (unwinder, torn) = (unwind::for_kernel(linux), !missing.is_empty());
        Tracer { linux, unwinder, running, torn, lines: true, wanted: Wanted::default() }
    }

    /// The same, for who needs neither lines nor inlined functions: those cost more than the rest.
    #[must_use]
    pub fn without_lines(linux: &'k Linux<'k, 'd>) -> Tracer<'k, 'd> {
        Tracer { lines: false, ..Tracer::new(linux) }
    }

    /// The same, with variables.
    #[must_use]
    pub fn with_variables(self, wanted: Wanted) -> Tracer<'k, 'd> {
        Tracer { wanted, ..self }
    }

    /// What the tasks are tasks of.
    #[must_use]
    pub fn linux(&self) -> &'k Linux<'k, 'd> {
        self.linux
    }

    /// What unwinds their stacks.
    #[must_use]
    pub fn unwinder(&self) -> &dyn Unwinder {
        &*self.unwinder
    }

    /// The stacks that a task may have been on, its own first.
    #[must_use]
    pub fn stacks_of(&self, task: &Task) -> Stacks {
        let mut stacks = self.unwinder.cpu_stacks(self.cpu_of(task.address).unwrap_or(task.cpu));
        stacks.list.insert(0, self.linux.task_stack(task));
        stacks
    }

    /// The backtrace of a task from where somebody chose to begin.
    #[must_use]
    pub fn trace_from(&self, task: Task, start: Start<'_>) -> Backtrace {
        let running_on = self.cpu_of(task.address);
        let stacks = self.stacks_of(&task);
        let trace = self.unwinder.unwind(start, &stacks);
        let rows = self.rows(trace.frames, &stacks);
        Backtrace { owner: Owner::Task(task), running_on, rows, end: trace.end }
    }

    /// The same backtrace by another way: its first frame, then every word up the same stack, and up the
    /// task's own one, that follows a call.
    #[must_use]
    pub fn scanned(&self, trace: Backtrace) -> Backtrace {
        let Owner::Task(task) = &trace.owner else { return trace };
        let Some(first) = trace.rows.into_iter().next() else {
            return Backtrace { rows: Vec::new(), ..trace };
        };
        let stacks = self.stacks_of(task);
        let mut ranges = Vec::new();
        if let Some(stack) = stacks.with(first.frame.at) {
            ranges.push((first.frame.at.offset(8), stack.end));
        }
        if let Some(own) = stacks.list.first().filter(|own| !own.holds(first.frame.at)) {
            ranges.push((own.start, own.end));
        }
        let words = ranges.into_iter().flat_map(|(start, end)| self.words(start, end));
        let frame = |(at, word): (VirtAddr, u64)| {
            let pc = self.unwinder.code_address(word);
            let known = self.linux.code(pc.back(1)).is_some();
            let (kind, exception) = (FrameKind::ReturnAddress, None);
            let caller = CallerBy::Scan;
            let registers = Registers::default();
            (known && self.unwinder.follows_a_call(pc)).then_some(Frame {
                pc,
                kind,
                at,
                exception,
                registers,
                caller,
            })
        };
        let frames = std::iter::once(first.frame).chain(words.filter_map(frame)).collect();
        let rows = self.rows(frames, &stacks);
        Backtrace { rows, ..trace }
    }

    /// The words from `start` to `end`, as far as they are in the dump, with their addresses.
    pub fn words(
        &self,
        start: VirtAddr,
        end: VirtAddr,
    ) -> impl Iterator<Item = (VirtAddr, u64)> + use<> {
        const MOST: u64 = 128 << 10;
        let length = end.0.saturating_sub(start.0).min(MOST) as usize;
        let bytes = self.linux.kernel().memory().bytes_up_to(start, length);
        let words: Vec<u64> =
            bytes.chunks_exact(8).filter_map(|raw| crate::bytes::u64_at(raw, 0)).collect();
        (0..).map(move |index| start.offset(index * 8)).zip(words)
    }

    /// The backtrace of a task.
    #[must_use]
    pub fn trace(&self, task: Task) -> Backtrace {
        let by_queue = self.cpu_of(task.address);
        // Where a run queue is lost, the task itself still tells.
        let running_on = by_queue.or(Some(task.cpu).filter(|_| task.on_cpu && self.torn));
        let mut stacks = self.unwinder.cpu_stacks(running_on.unwrap_or(task.cpu));
        let own = self.linux.task_stack(&task);
        stacks.list.insert(0, own.clone());
        let trace = self.unwind(task.address, running_on, Some(&own), &stacks);
        let rows = self.rows(trace.frames, &stacks);
        Backtrace { owner: Owner::Task(task), running_on, rows, end: trace.end }
    }

    /// The backtrace of a task of which only the address is known, and what it saved, perhaps.
    pub(super) fn trace_torn(&self, address: VirtAddr, why: String) -> Backtrace {
        let running_on = self.cpu_of(address);
        let stacks = Stacks::default();
        let trace = match running_on {
            None if self.torn => {
                let why = "whether it was running cannot be told".to_owned();
                Trace { frames: Vec::new(), end: End::Stuck(why) }
            }
            _ => self.unwind(address, running_on, None, &stacks),
        };
        let rows = self.rows(trace.frames, &stacks);
        Backtrace { owner: Owner::Torn { address, why }, running_on, rows, end: trace.end }
    }

    /// What can be told by the registers of a CPU alone.
    fn trace_registers(&self, cpu: Option<u32>, note: &Prstatus<'_>, why: &str) -> Backtrace {
        let known = cpu.map(|cpu| self.unwinder.cpu_stacks(cpu)).unwrap_or_default();
        let stacks = Stacks { all: false, ..known };
        let trace = self.unwinder.unwind(Start::Registers(note.registers), &stacks);
        let rows = self.rows(trace.frames, &stacks);
        // QEMU has the CPU's number there.
        let pid = Some(note.pid).filter(|_| !self.linux.kernel().notes().by_qemu);
        let owner = Owner::Registers { pid, why: why.to_owned() };
        Backtrace { owner, running_on: cpu, rows, end: trace.end }
    }

    /// The CPU that crashed; where its task is not known, by the registers that it saved; where not
    /// even the CPU is known, all that saved some.
    #[must_use]
    pub fn crashed(&self) -> Traces {
        let cpu = self.linux.crashed_cpu();
        let error = match cpu.as_ref().map(|&cpu| self.linux.current(cpu)) {
            Ok(Ok(task)) => return (vec![self.trace(task)], Vec::new()),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        let notes = &self.linux.kernel().notes().prstatus;
        let own = cpu.ok().and_then(|cpu| Some((cpu, self.linux.saved_registers(cpu)?)));
        if let Some((cpu, registers)) = own {
            let of_note = |note: &&Prstatus<'_>| same_registers(note.registers, &registers);
            let pid = notes.iter().find(of_note).map(|note| note.pid);
            if let Some(pid) = pid {
                let note = Prstatus { pid, registers: &registers };
                return (vec![self.trace_registers(Some(cpu), &note, &error)], Vec::new());
            }
        }
        let left = |note: &&Prstatus<'_>| self.linux.left_for_capture(note.registers);
        let crashed: Vec<&Prstatus<'_>> = notes.iter().filter(left).collect();
        let shown = if crashed.is_empty() { notes.iter().collect() } else { crashed };
        let traces = shown.into_iter().map(|note| self.trace_registers(None, note, &error));
        let traces: Vec<Backtrace> = traces.collect();
        let problem = format!("the task that crashed: {error}");
        let problems = if traces.is_empty() { vec![problem] } else { Vec::new() };
        (traces, problems)
    }

    /// What every CPU was running; where that is not known, by the registers that it saved.
    #[must_use]
    pub fn all_cpus(&self) -> Traces {
        let (mut traces, mut problems) = (Vec::new(), Vec::new());
        let mut notes: Vec<&Prstatus<'_>> = self.linux.kernel().notes().prstatus.iter().collect();
        let mut why = String::new();
        let cpus = match self.linux.percpu() {
            Ok(percpu) => percpu.present.clone(),
            Err(error) => {
                why = error.to_string();
                Vec::new()
            }
        };
        let mut nameless = Vec::new();
        for cpu in cpus {
            let registers = self.linux.saved_registers(cpu);
            let of_cpu = |note: &&Prstatus<'_>| {
                registers.as_ref().is_some_and(|it| same_registers(note.registers, it))
            };
            let index = notes.iter().position(of_cpu);
            let note = index.map(|index| notes.remove(index));
            match (self.linux.current(cpu), note) {
                (Ok(task), _) => traces.push(self.trace(task)),
                (Err(error), Some(note)) => {
                    traces.push(self.trace_registers(Some(cpu), note, &error.to_string()));
                }
                (Err(error), None) => nameless.push(format!("CPU {cpu}: {error}")),
            }
        }
        // Registers that are left belong to CPUs of which nothing else is known.
        if !nameless.is_empty() || !why.is_empty() {
            let why = nameless.first().unwrap_or(&why);
            traces.extend(notes.into_iter().map(|note| self.trace_registers(None, note, why)));
        }
        problems.extend(nameless);
        problems.extend(Some(why).filter(|why| !why.is_empty()));
        (traces, problems)
    }

    fn cpu_of(&self, task: VirtAddr) -> Option<u32> {
        self.running.iter().find(|(_, at)| *at == task).map(|&(cpu, _)| cpu)
    }

    fn unwind(
        &self,
        task: VirtAddr,
        running_on: Option<u32>,
        own: Option<&Stack>,
        stacks: &Stacks,
    ) -> Trace {
        let Some(cpu) = running_on else { return self.unwinder.unwind(Start::Task(task), stacks) };
        let saved = self.linux.saved_registers(cpu);
        let registers = saved.or_else(|| Some(self.linux.registers_on(own?)?.to_vec()));
        match registers {
            Some(registers) => self.unwinder.unwind(Start::Registers(&registers), stacks),
            None => {
                let why = format!("it was running, and no registers of CPU {cpu} are known");
                Trace { frames: Vec::new(), end: End::Stuck(why) }
            }
        }
    }

    fn rows(&self, frames: Vec<Frame>, stacks: &Stacks) -> Vec<Row> {
        let mut variables = match self.wanted.any() {
            true => variables::of_frames(self.linux, &*self.unwinder, &frames, self.wanted),
            false => Vec::new(),
        }
        .into_iter();
        let mut last = None;
        let mut row = |frame: Frame| {
            let lookup = frame.lookup_pc();
            let place = self.linux.place(lookup).map(|place| {
                // Looked up one byte back, shown as it is.
                let offset = place.offset + frame.pc.0.wrapping_sub(lookup.0);
                Place { offset, ..place }
            });
            let stack = stacks.with(frame.at);
            let changed = last.is_some_and(|last: &Stack| Some(last) != stack);
            let left_stack = last.filter(|_| changed).map(|last| last.name.clone());
            last = stack;
            let source = match self.lines {
                true => self.linux.kernel().source_frames(lookup),
                false => Vec::new(),
            };
            let variables = variables.next().unwrap_or_default();
            Row { frame, place, source, left_stack, variables }
        };
        frames.into_iter().map(&mut row).collect()
    }
}

/// Whether two notes hold the same registers, whatever follows them.
fn same_registers(one: &[u8], other: &[u8]) -> bool {
    /// Those that every architecture's note has at least.
    const COMMON: usize = 21 * 8;
    one.get(..COMMON).is_some_and(|it| other.get(..COMMON) == Some(it))
}
