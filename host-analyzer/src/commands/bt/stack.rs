//! What is on a stack besides frames.

use std::io::Write;

use crate::linux::slab::Slabs;
use crate::linux::stacks::Stack;
use crate::linux::{Linux, Place};
use crate::render::text;
use crate::unwind::ExceptionFrame;
use crate::{Error, VirtAddr};

use super::{Backtrace, Options, Owner, Tracer};

/// What the kernel writes to the lowest word of a task's stack (STACK_END_MAGIC,
/// include/uapi/linux/magic.h).
const END_OF_STACK: u64 = 0x57ac_6e9d;

/// The words of a stack, or what looks like something in them.
///
/// # Errors
/// [`Error::Output`].
pub fn contents(
    tracer: &Tracer<'_, '_>,
    options: &Options,
    trace: &Backtrace,
    out: &mut dyn Write,
) -> Result<(), Error> {
    text::owner(trace, out)?;
    let Owner::Task(task) = &trace.owner else {
        writeln!(out, "    (its stack is not known)")?;
        return Ok(());
    };
    let stacks = tracer.stacks_of(task);
    let Some(own) = stacks.list.first() else { return Ok(()) };
    if options.exceptions {
        return exceptions(tracer, own, out);
    }
    let top = trace.rows.first().map(|row| row.frame.at);
    let here = top.and_then(|at| stacks.with(at)).unwrap_or(own);
    if options.raw {
        return raw(tracer, own, out);
    }
    if let Some(top) = top.filter(|_| options.text) {
        return code(tracer, top, here.end, out);
    }
    code(tracer, own.start, own.end, out)
}

fn raw(tracer: &Tracer<'_, '_>, stack: &Stack, out: &mut dyn Write) -> Result<(), Error> {
    let named = Symbolic { tracer, slabs: None, addresses: false };
    let words: Vec<_> = tracer.words(stack.start, stack.end).collect();
    for row in words.chunks(2) {
        let shown = row.iter().map(|&(_, word)| named.word(word)).collect::<Vec<_>>();
        writeln!(out, "{:016x}:  {}", row[0].0, shown.join(" ").trim_end())?;
    }
    missing(stack, words.len(), out)
}

/// Says how much of a stack is not in the dump.
fn missing(stack: &Stack, words: usize, out: &mut dyn Write) -> Result<(), Error> {
    match stack.size().saturating_sub(words * 8) {
        0 => Ok(()),
        bytes => text::problems(&[format!("{bytes} bytes of the stack are not in the dump")], out),
    }
}

fn code(
    tracer: &Tracer<'_, '_>,
    start: VirtAddr,
    end: VirtAddr,
    out: &mut dyn Write,
) -> Result<(), Error> {
    for (at, word) in tracer.words(start, end) {
        let pc = tracer.unwinder().code_address(word);
        // A return address may belong to the next function already.
        let back = u64::from(tracer.unwinder().follows_a_call(pc));
        if let Some(place) = tracer.linux().code(pc.back(back)) {
            let place = Place { offset: place.offset + back, ..place };
            writeln!(out, "    [{at:016x}] {} at {pc:016x}", called(&place))?;
        }
    }
    Ok(())
}

fn exceptions(tracer: &Tracer<'_, '_>, stack: &Stack, out: &mut dyn Write) -> Result<(), Error> {
    let found = tracer.unwinder().exception_frames(stack);
    if found.is_empty() {
        writeln!(out, "    (nothing on the {} stack looks like saved registers)", stack.name)?;
    }
    found.iter().try_for_each(|frame| exception(tracer, frame, out))
}

fn exception(
    tracer: &Tracer<'_, '_>,
    frame: &ExceptionFrame,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let mode = if frame.user { "USER" } else { "KERNEL" };
    writeln!(out, "  {mode}-MODE EXCEPTION FRAME AT: {:016x}", frame.at)?;
    let counter = frame.registers.first();
    let place = counter.and_then(|it| tracer.linux().place(VirtAddr(it.value)));
    if let (Some(counter), Some(place)) = (counter, place) {
        writeln!(out, "    [exception {}: {}]", counter.name, called(&place))?;
    }
    text::registers(frame, out)?;
    writeln!(out)?;
    Ok(())
}

/// What looks like saved registers on the stacks that CPUs have besides those of tasks.
///
/// # Errors
/// [`Error::NoSymbol`] when the CPUs are not known, [`Error::Output`].
pub fn cpu_exceptions(tracer: &Tracer<'_, '_>, out: &mut dyn Write) -> Result<(), Error> {
    for &cpu in &tracer.linux().percpu()?.present {
        let stacks = tracer.unwinder().cpu_stacks(cpu).list;
        if stacks.is_empty() {
            writeln!(out, "CPU {cpu}: its stacks are not known")?;
        }
        for stack in stacks {
            writeln!(out, "CPU {cpu} {} STACK:", stack.name)?;
            exceptions(tracer, &stack, out)?;
        }
    }
    Ok(())
}

/// The words of the stack that belong to frame `index`: from its own place up to that of the next frame
/// on the same stack; the last frame has the rest.
///
/// # Errors
/// [`Error::Output`].
pub fn frame_data(
    tracer: &Tracer<'_, '_>,
    trace: &Backtrace,
    index: usize,
    named: Option<&Symbolic<'_, '_, '_>>,
    out: &mut dyn Write,
) -> Result<(), Error> {
    for row in data_of(tracer, trace, index).chunks(2) {
        let shown = row.iter().map(|&(_, word)| match named {
            Some(named) => named.word(word),
            None => format!("{word:016x}"),
        });
        let shown = shown.collect::<Vec<_>>().join(" ");
        writeln!(out, "    {:016x}: {}", row[0].0, shown.trim_end())?;
    }
    Ok(())
}

fn data_of(tracer: &Tracer<'_, '_>, trace: &Backtrace, index: usize) -> Vec<(VirtAddr, u64)> {
    /// Words of a frame whose end is not known.
    const FEW: u64 = 64 * 8;
    let Some(start) = trace.rows.get(index).map(|row| row.frame.at) else { return Vec::new() };
    let stacks = match &trace.owner {
        Owner::Task(task) => tracer.stacks_of(task),
        _ => Default::default(),
    };
    let limit = stacks.with(start).map_or(start.offset(FEW), |stack| stack.end);
    let next = trace.rows.get(index + 1).map(|row| row.frame.at);
    let is_inside = |next: &VirtAddr| start <= *next && *next <= limit;
    let end = match next {
        Some(next) if is_inside(&next) => next.offset(8).min(limit),
        // The next frame is on another stack: this one goes on to the end of its own.
        Some(_) => limit.min(start.offset(FEW)),
        None => limit,
    };
    tracer.words(start, end).collect()
}

/// Words of stacks by name: code and data that have one, objects of slab caches.
pub struct Symbolic<'t, 'k, 'd> {
    tracer: &'t Tracer<'k, 'd>,
    slabs: Option<Slabs<'t, 'k, 'd>>,
    /// Whether the addresses of objects are shown, too.
    addresses: bool,
}

impl<'t, 'k, 'd> Symbolic<'t, 'k, 'd> {
    /// Names for the words of `tracer`'s stacks.
    #[must_use]
    pub fn new(tracer: &'t Tracer<'k, 'd>, addresses: bool) -> Symbolic<'t, 'k, 'd> {
        Symbolic { tracer, slabs: Some(Slabs::new(tracer.linux())), addresses }
    }

    fn word(&self, word: u64) -> String {
        let name = symbol(self.tracer, word).or_else(|| {
            let cache = self.slabs.as_ref()?.cache_of(VirtAddr(word))?;
            Some(if self.addresses { format!("[{word:x}:{cache}]") } else { format!("[{cache}]") })
        });
        format!("{:<24}", name.unwrap_or_else(|| format!("{word:016x}")))
    }
}

fn symbol(tracer: &Tracer<'_, '_>, word: u64) -> Option<String> {
    let place = tracer.linux().place(tracer.unwinder().code_address(word))?;
    Some(match place.offset {
        0 => place.name,
        offset => format!("{}+{offset}", place.name),
    })
}

fn called(place: &Place) -> String {
    let module = place.module.as_ref().map(|name| format!(" [{name}]")).unwrap_or_default();
    format!("{}+{:#x}{module}", place.name, place.offset)
}

/// Whether a function of this name is among the frames, or a word of them has this value.
#[must_use]
pub fn refers(
    tracer: &Tracer<'_, '_>,
    trace: &Backtrace,
    wanted: &str,
    value: Option<u64>,
) -> bool {
    let named = trace.rows.iter().any(|row| {
        let inlined = row.source.iter().any(|it| it.function.as_deref() == Some(wanted));
        inlined || row.place.as_ref().is_some_and(|place| place.name == wanted)
    });
    let has = |value: u64| {
        let frames = 0..trace.rows.len();
        frames.into_iter().flat_map(|index| data_of(tracer, trace, index)).any(|it| it.1 == value)
    };
    named || value.is_some_and(has)
}

/// Checks the lowest word of every task's stack, which stays what it is unless the stack was too small.
///
/// # Errors
/// [`Error::Read`] when there are no tasks, [`Error::Output`].
pub fn verify(linux: &Linux<'_, '_>, out: &mut dyn Write) -> Result<(), Error> {
    let list = linux.all_tasks()?;
    let (mut overflown, mut problems) = (0, list.problems);
    for task in &list.tasks {
        match linux.kernel().memory().u64(task.stack) {
            Ok(END_OF_STACK) => {}
            Ok(word) => {
                overflown += 1;
                text::task(task, out)?;
                let at = task.stack;
                writeln!(out, "  possible stack overflow: {at:016x}: {word:x} != STACK_END_MAGIC")?;
            }
            Err(error) => problems.push(format!("the stack of PID {}: {error}", task.pid)),
        }
    }
    if overflown == 0 {
        writeln!(out, "No stack overflows detected in {} tasks", list.tasks.len())?;
    }
    text::problems(&problems, out)
}
