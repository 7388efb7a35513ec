//! In which order memory is sent: that of its use.
//!
//! Nothing here must be right for the dump to be: what a broken structure hides comes with the rest.
//! Every list is walked only so far, every area is only so large, and [`KernelMemory`] limits what all
//! reads of a stage cost. Page tables that lead to what is sent are sent before it.

use format::frame::Stage;
use heapless::Vec;

use crate::Machine;
use crate::card::Card;
use crate::card::cpus::Cpus;
use crate::card::facts::{Facts, Member};
use crate::card::memory::KernelMemory;
use crate::card::module::Module;
use crate::card::paging::{MAX_LEVELS, Mapping};
use crate::dump::Source;

use super::places::Places;

/// Bounds: tasks, threads of one, CPUs, modules.
const MAX_TASKS: usize = 1 << 16;
const MAX_THREADS: usize = 1 << 14;
const MAX_CPUS: u64 = 4096;
const MAX_MODULES: usize = 2048;
/// What is sent of a struct module: all that matters of it is in its first part.
const MODULE: u64 = 1 << 10;

/// THREAD_SIZE where pages are not larger (arch/x86/include/asm/page_64_types.h,
/// arch/arm64/include/asm/memory.h, 6.12).
const THREAD_SIZE: u64 = 16 << 10;
/// What is sent of a struct mm_struct: the counters are in its first part.
const MM: u64 = 2 << 10;
/// A pointer, a list head.
const WORD: u64 = 8;
const LIST: u64 = 16;

/// The area below or behind the image in which modules are, both sides of the image: 2 GiB at most.
const MODULES_REACH: u64 = 2 << 30;

/// Takes physical memory in the order in which it is to be sent.
pub trait Taker {
    /// Takes `size` bytes at `phys`. What was taken before does not count again.
    fn take(&mut self, machine: &mut dyn Machine, phys: u64, size: u64);

    /// There is no more of `stage`.
    fn end_of(&mut self, machine: &mut dyn Machine, stage: Stage);
}

/// A walk through the dead kernel.
struct Walk<'a, 't> {
    source: Source<'a>,
    memory: KernelMemory<'a>,
    places: &'a Places,
    notes: &'a mut [u8],
    taker: &'t mut dyn Taker,
}

/// Gives what belongs to `stage` to `taker`. `notes` takes the notes of a CPU.
pub fn walk(
    stage: Stage,
    machine: &mut dyn Machine,
    source: Source<'_>,
    card: &mut Card,
    places: &Places,
    notes: &mut [u8],
    taker: &mut dyn Taker,
) {
    let (memory, facts) = card.open(machine, source);
    let mut walk = Walk { source, memory, places, notes, taker };
    match stage {
        // No memory.
        Stage::Head => {}
        Stage::Running => walk.running(facts),
        Stage::Tasks => {
            walk.modules(facts);
            walk.tasks();
        }
        Stage::Log => facts.log.iter().flat_map(|log| log.areas()).for_each(|(at, size)| {
            walk.virt(at, size);
        }),
        Stage::PageTables => walk.page_tables(),
        Stage::PerCpu => walk.per_cpu(),
        Stage::Data => walk.data(),
        Stage::Text => walk.text(),
        Stage::Rest => walk.rest(),
    }
    walk.taker.end_of(walk.memory.machine(), stage);
}

impl Walk<'_, '_> {
    /// Takes `size` bytes of virtual memory, as far as they are mapped, and the tables that lead there.
    fn virt(&mut self, at: u64, size: u64) {
        let end = at.saturating_add(size);
        let mut at = at;
        while at < end {
            at = match self.step(at, end) {
                Ok(next) | Err(next) => next,
            };
        }
    }

    /// Takes virtual memory as far as it is mapped without a hole.
    fn virt_up_to_hole(&mut self, at: u64, size: u64) {
        let end = at.saturating_add(size);
        let mut at = at;
        while at < end {
            let Ok(next) = self.step(at, end) else { return };
            at = next;
        }
    }

    /// Takes what one entry of the page tables maps from `at` on, and the tables. Returns where it
    /// ends, or where the hole does that is there.
    fn step(&mut self, at: u64, end: u64) -> Result<u64, u64> {
        match self.look_up(at) {
            Ok(mapping) => {
                let (phys, left) = mapping.phys(at).unwrap_or((0, 1));
                let some = left.min(end - at);
                self.taker.take(self.memory.machine(), phys, some);
                Ok(at + some)
            }
            Err(hole) => Err((at | hole.max(1).wrapping_sub(1)).saturating_add(1)),
        }
    }

    /// Looks `at` up, and takes the tables that were read for it. `Err` has the size of a hole.
    fn look_up(&mut self, at: u64) -> Result<Mapping, u64> {
        let mut tables = Vec::<u64, MAX_LEVELS>::new();
        let found = self.memory.look_up(at, &mut |entry| {
            let _ = tables.push(entry);
        });
        let page = self.memory.page_size();
        for entry in tables {
            self.taker.take(self.memory.machine(), entry & !(page - 1), page);
        }
        found
    }

    /// Takes virtual memory, but for the image's part that was freed after boot.
    fn image(&mut self, (at, size): (u64, u64)) {
        let end = at.saturating_add(size);
        let (hole, hole_size) = self.places.freed.unwrap_or((end, 0));
        let hole_end = hole.saturating_add(hole_size);
        self.virt(at, hole.clamp(at, end) - at);
        let rest = hole_end.clamp(at, end);
        self.virt(rest, end - rest);
    }

    /// What leads to the tasks and stacks of the CPUs that ran: the one that panicked first.
    fn running(&mut self, facts: &Facts) {
        for (at, size) in self.places.small() {
            self.virt(at, size);
        }
        let crasher = facts.panic_cpu.and_then(|at| self.memory.u32(at)).map(u64::from);
        let architecture = self.source.headers.architecture();
        for first in [true, false] {
            let mut cpus = Cpus::default();
            while let Some(cpu) = cpus.next(self.source.headers, self.memory.machine(), self.notes)
            {
                if first == (Some(cpu.number) == crasher) {
                    self.cpu(facts, cpu.number, cpu.sp(architecture).unwrap_or(0));
                }
            }
        }
    }

    /// A CPU's own variables that lead on, its task, and the stack that it was on.
    fn cpu(&mut self, facts: &Facts, number: u64, sp: u64) {
        let mut task = None;
        if let Some(offset) = self.per_cpu_offset(number) {
            for variable in self.places.per_cpu.into_iter().flatten() {
                self.virt(variable.wrapping_add(offset), WORD);
            }
            let queue = self.places.run_queues.map(|queue| queue.wrapping_add(offset));
            let member = |member: Option<u64>| queue?.checked_add(member?);
            let current = member(facts.member(Member::QueueCurrent));
            for place in [current, member(self.places.idle)].into_iter().flatten() {
                self.virt(place, WORD);
            }
            task = current.and_then(|at| self.memory.u64(at));
        }
        let stack = task.and_then(|task| self.task(task, Some(sp)));
        let is_on_it = |(stack, size): (u64, u64)| sp.wrapping_sub(stack) <= size;
        if !stack.is_some_and(is_on_it) {
            self.virt_up_to_hole(sp, THREAD_SIZE);
        }
    }

    /// A task, and of its stack what is in use: all of it when `sp`, where it is running, is on another
    /// one. Returns where its stack is and how large.
    fn task(&mut self, task: u64, sp: Option<u64>) -> Option<(u64, u64)> {
        let layout = self.places.task;
        self.virt(task, layout.size?);
        let word = |walk: &mut Self, member: Option<u64>| {
            walk.memory.u64(task.checked_add(member?)?).filter(|&word| word >> 63 == 1)
        };
        if let Some(mm) = word(self, layout.mm) {
            self.virt(mm, MM);
        }
        if let Some((signal, head)) = word(self, layout.signal).zip(layout.thread_head) {
            self.virt(signal.saturating_add(head), LIST);
        }
        let stack = word(self, layout.stack)?;
        let size = THREAD_SIZE.max(self.memory.page_size());
        let sp = sp.or_else(|| word(self, layout.sp)).unwrap_or(stack);
        let used = sp.wrapping_sub(stack);
        let skip = if used < size { used } else { 0 };
        self.virt(stack.saturating_add(skip), size - skip);
        Some((stack, size))
    }

    /// What there is of the modules' structures, and what it takes to name and unwind the frames of those
    /// that are on a stack of a CPU that ran.
    fn modules(&mut self, facts: &Facts) {
        let Some((head, link)) = facts.modules.zip(facts.member(Member::ModuleList)) else {
            return;
        };
        self.list(head, MAX_MODULES, &mut |walk, node| {
            walk.virt(node.wrapping_sub(link), MODULE);
        });
        let architecture = self.source.headers.architecture();
        let image = self.image_area();
        let mut cpus = Cpus::default();
        let mut last: Option<Module> = None;
        while let Some(cpu) = cpus.next(self.source.headers, self.memory.machine(), self.notes) {
            let sp = cpu.sp(architecture).unwrap_or(0) & !(WORD - 1);
            for at in (0..THREAD_SIZE).step_by(WORD as usize) {
                let Some(word) = sp.checked_add(at).and_then(|at| self.memory.u64(at)) else {
                    break;
                };
                let is_near = word.abs_diff(image.0) < MODULES_REACH;
                let is_image = word.wrapping_sub(image.0) < image.1;
                if !is_near || is_image || last.is_some_and(|module| module.has(word)) {
                    continue;
                }
                last = Module::covering(&mut self.memory, facts, word);
                if let Some(module) = last {
                    for (at, size) in module.tables(&mut self.memory, facts) {
                        self.virt(at, size);
                    }
                }
            }
        }
    }

    /// All tasks: the idle ones, then the list that all others are in, each with its threads.
    fn tasks(&mut self) {
        let layout = self.places.task;
        for cpu in 0..self.cpu_count() {
            let Some(offset) = self.per_cpu_offset(cpu) else { break };
            let queue = self.places.run_queues.map(|queue| queue.wrapping_add(offset));
            let idle = queue
                .zip(self.places.idle)
                .and_then(|(queue, idle)| self.memory.u64(queue.checked_add(idle)?));
            idle.and_then(|task| self.task(task, None));
        }
        let Some((first, tasks)) = self.places.init_task.zip(layout.tasks) else { return };
        self.list(first.saturating_add(tasks), MAX_TASKS, &mut |walk, node| {
            let task = node.wrapping_sub(tasks);
            walk.task(task, None);
            let signal = layout.signal.and_then(|at| walk.memory.u64(task.checked_add(at)?));
            let head = signal.zip(layout.thread_head).and_then(|(at, head)| at.checked_add(head));
            if let Some((head, node)) = head.zip(layout.thread_node) {
                walk.list(head, MAX_THREADS, &mut |walk, thread| {
                    walk.task(thread.wrapping_sub(node), None);
                });
            }
        });
        self.task(first, None);
    }

    /// Gives each node of the list with the head at `head` to `with`, up to a broken one.
    fn list(&mut self, head: u64, most: usize, with: &mut dyn FnMut(&mut Self, u64)) {
        let mut node = self.memory.u64(head);
        for _ in 0..most {
            let Some(at) = node.filter(|&at| at != head && at >> 63 == 1) else { return };
            with(self, at);
            node = self.memory.u64(at);
        }
    }

    /// The tables of the kernel's half of all addresses.
    fn page_tables(&mut self) {
        /// More entries than a machine with a TiB of memory has above the last level.
        const MOST: usize = 1 << 20;
        let Some((mut at, last_level)) = self.memory.kernel_half() else { return };
        for _ in 0..MOST {
            // One entry of a table of the last level is enough to have all of it.
            let size = self.look_up(at).map_or_else(|hole| hole, |mapping| mapping.size);
            let Some(next) = (at | (size.max(last_level) - 1)).checked_add(1) else { return };
            at = next;
        }
    }

    fn per_cpu(&mut self) {
        let Some((start, size)) = self.places.per_cpu_area else { return };
        for cpu in 0..self.cpu_count() {
            let Some(offset) = self.per_cpu_offset(cpu) else { return };
            self.virt(start.wrapping_add(offset), size);
        }
    }

    /// The image's data, and everything near the image that is mapped: the modules, both their text and
    /// their data.
    fn data(&mut self) {
        if let Some(data) = self.places.data {
            self.image(data);
        }
        let Some(text) = self.source.old.vmcoreinfo.symbol("_stext") else { return };
        let image = self.image_area();
        let mut at = text.saturating_sub(MODULES_REACH);
        let end = text.saturating_add(MODULES_REACH);
        while at < end {
            let inside = at.checked_sub(image.0).filter(|&skip| skip < image.1);
            at = match inside {
                Some(skip) => at.saturating_add(image.1 - skip),
                None => match self.step(at, end) {
                    Ok(next) | Err(next) => next,
                },
            };
        }
    }

    /// The image: constants first, for names and types are among them.
    fn text(&mut self) {
        if let Some(constants) = self.places.constants {
            self.image(constants);
        }
        let image = self.image_area();
        self.image(image);
    }

    /// All memory.
    fn rest(&mut self) {
        for range in self.source.old.ranges() {
            self.taker.take(self.memory.machine(), range.phys, range.size);
        }
    }

    /// Where the image is, and how large: to its end, if that has a name.
    fn image_area(&self) -> (u64, u64) {
        let old = self.source.old;
        let first = old.image().first();
        let (start, size) = first.map_or((0, 0), |mapping| (mapping.virt, mapping.size));
        let end = self.places.data.map(|(data, size)| data.saturating_add(size));
        (start, end.and_then(|end| end.checked_sub(start)).unwrap_or(size))
    }

    fn cpu_count(&mut self) -> u64 {
        let count = self.places.cpu_count.and_then(|at| self.memory.u32(at));
        count.map_or(MAX_CPUS, u64::from).min(MAX_CPUS)
    }

    fn per_cpu_offset(&mut self, cpu: u64) -> Option<u64> {
        self.memory.u64(self.places.per_cpu_offsets?.checked_add(cpu.checked_mul(WORD)?)?)
    }
}
