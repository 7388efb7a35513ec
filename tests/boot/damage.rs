//! Dumps in which bits are flipped, words wrong and pages zero, where it hurts most: whatever is read
//! then, no command panics, hangs or eats memory.
//!
//! Every seed damages the same dump in its own way. `TINYKDUMP_SEEDS=1000` for more of them.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use host_analyzer::commands::{
    bt, disassemble, files, list, log, modules, ps, read, structure, symbol, sys, task, vm, vtop,
    whatis,
};
use host_analyzer::kernel::Kernel;
use host_analyzer::linux::Linux;
use host_analyzer::source::Dump;
use host_analyzer::{Error, VirtAddr};
use tests::core_file::CoreFile;
use tests::crash::{Dumped, bench};
use tests::stories;

stories! {
    x86_64: damage_costs_rows_and_nothing_else;
    aarch64: damage_costs_rows_and_nothing_else;
}

/// How long all commands together may take on a machine that does other things too; whole, they take
/// less than a second.
const DEADLINE: Duration = Duration::from_secs(60);
/// Most memory that may be left behind, in KiB.
const MEMORY_KIB: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// A sequence of numbers that a seed decides (Knuth's MMIX generator; the upper half is good enough).
struct Dice(u64);

impl Dice {
    fn next(&mut self, below: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) % below.max(1)
    }
}

fn damage_costs_rows_and_nothing_else(arch: &'static str) -> Result<()> {
    let seeds = std::env::var("TINYKDUMP_SEEDS").ok().and_then(|it| it.parse().ok()).unwrap_or(60);
    let bench = bench(arch)?;
    let dumped = Dumped::new(bench, &format!("damage/{arch}"), bench.scenario())?;
    let pages = vital_pages(&dumped.dump)?;
    ensure!(pages.len() > 500, "only {} pages are vital", pages.len());
    let file = OpenOptions::new().read(true).write(true).open(&dumped.dump)?;
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let outcome = (0..seeds).try_for_each(|seed| one_seed(&dumped.dump, &file, &pages, seed));
    std::panic::set_hook(quiet);
    outcome
}

/// Damages the dump as `seed` says, runs all commands, and mends it again.
fn one_seed(dump: &Path, file: &File, pages: &[u64], seed: u64) -> Result<()> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut saved = Vec::new();
    for _ in 0..1 + dice.next(40) {
        let at = pages[dice.next(pages.len() as u64) as usize];
        let mut page = [0; PAGE as usize];
        file.read_exact_at(&mut page, at)?;
        saved.push((at, page));
        spoil(&mut page, &mut dice);
        file.write_all_at(&page, at)?;
    }
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| all_commands(dump)));
    let took = started.elapsed();
    for (at, page) in saved.into_iter().rev() {
        file.write_all_at(&page, at)?;
    }
    if let Err(panic) = outcome {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|it| (*it).to_owned()));
        bail!("seed {seed}: panicked: {}", text.unwrap_or_default());
    }
    ensure!(took < DEADLINE, "seed {seed}: took {took:?}");
    let memory = memory_kib()?;
    ensure!(memory < MEMORY_KIB, "seed {seed}: {memory} KiB of memory in use");
    Ok(())
}

/// One kind of damage to a page.
fn spoil(page: &mut [u8; PAGE as usize], dice: &mut Dice) {
    let word = |dice: &mut Dice| (dice.next(PAGE / 8) * 8) as usize;
    match dice.next(5) {
        0 => page.fill(0),
        1 => {
            let bit = dice.next(PAGE * 8) as usize;
            page[bit / 8] ^= 1 << (bit % 8);
        }
        // A pointer that leads somewhere, and to the wrong place.
        2 => {
            let (from, to) = (word(dice), word(dice));
            page.copy_within(from..from + 8, to);
        }
        3 => {
            let at = word(dice);
            page[at..at + 8].fill(0xff);
        }
        _ => {
            let (at, low, high) = (word(dice), dice.next(1 << 32), dice.next(1 << 32));
            page[at..at + 8].copy_from_slice(&(high << 32 | low).to_le_bytes());
        }
    }
}

/// Runs every command that reads structures. That they fail is allowed.
fn all_commands(dump: &Path) {
    let Ok(dump) = Dump::open(dump) else { return };
    let Ok(kernel) = Kernel::open(&dump, None) else { return };
    let kernel = &kernel;
    let mut out = Vec::new();
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let heard = |outcome: Result<(), Error>| match outcome {
        Ok(()) => {}
        // An error's text is part of what must not fail.
        Err(error) => drop(error.to_string()),
    };
    let options = bt::Options { all_cpus: true, frames: true, ..Default::default() };
    heard(bt::run(kernel, &options, &mut out));
    heard(bt::run(kernel, &bt::Options { all_tasks: true, ..Default::default() }, &mut out));
    let options = bt::Options { all_tasks: true, scan: true, json: true, ..Default::default() };
    heard(bt::run(kernel, &options, &mut out));
    heard(bt::run(kernel, &bt::Options { cpu_exceptions: true, ..Default::default() }, &mut out));
    heard(bt::run(kernel, &bt::Options { exceptions: true, ..Default::default() }, &mut out));
    heard(ps::run(kernel, &ps::Options { tree: true, ..Default::default() }, &mut out));
    heard(log::run(kernel, &Default::default(), &mut out));
    heard(modules::run(kernel, &Default::default(), &mut out));
    heard(sys::run(kernel, &Default::default(), &mut out));
    heard(files::run(kernel, &Default::default(), &words(&["1"]), &mut out));
    heard(vm::run(kernel, &Default::default(), &words(&["1"]), &mut out));
    heard(task::run(kernel, &Default::default(), &words(&["1"]), &mut out));
    heard(vtop::run(kernel, &Default::default(), &words(&["init_task"]), &mut out));
    heard(read::run(kernel, &Default::default(), &words(&["init_task", "100"]), &mut out));
    heard(disassemble::run(kernel, &Default::default(), &words(&["panic"]), &mut out));
    heard(symbol::run(kernel, &Default::default(), &words(&["panic"]), &mut out));
    let listed = symbol::Options { list: true, ..Default::default() };
    heard(symbol::run(kernel, &listed, &[], &mut out));
    let tasks = list::Options {
        offset: "task_struct.tasks".to_owned(),
        head: true,
        structure: Some("task_struct.pid,comm".to_owned()),
        ..Default::default()
    };
    heard(list::run(kernel, &tasks, &words(&["init_task+0x800"]), &mut out));
    for name in ["task_struct", "mm_struct", "rq", "module"] {
        heard(structure::run(kernel, &Default::default(), &words(&[name, "init_task"]), &mut out));
        heard(whatis::run(kernel, &Default::default(), &words(&[name]), &mut out));
    }
}

/// Offsets in the file of the pages that commands read: those of tasks, their stacks and memory, of
/// modules, run queues, symbols, types and unwind tables, page tables, the log and the notes.
fn vital_pages(path: &Path) -> Result<Vec<u64>> {
    let core = CoreFile::open(path)?;
    let dump = Dump::open(path)?;
    let kernel = Kernel::open(&dump, None)?;
    let linux = Linux::new(&kernel);
    let mut physical = BTreeSet::new();
    let mut note = |at: VirtAddr, size: u64| {
        for page in (at.0 & !(PAGE - 1)..at.0 + size).step_by(PAGE as usize) {
            let mut tables = Vec::new();
            let memory = kernel.memory();
            let found = memory.tables().walk(memory.physical(), VirtAddr(page), &mut |entry| {
                tables.push(entry.slot.0 & !(PAGE - 1));
            });
            physical.extend(tables);
            physical.extend(found.ok().map(|it| it.phys.0 & !(PAGE - 1)));
        }
    };
    for task in linux.all_tasks()?.tasks {
        note(task.address, 0x2000);
        note(task.stack, linux.thread_size());
        for member in ["mm", "files", "fs", "signal"] {
            let offset = kernel.offset("task_struct", member)?;
            let at = kernel.memory().pointer(task.address.offset(offset))?;
            if !at.is_null() {
                note(at, 0x400);
            }
        }
    }
    for module in &linux.modules().list {
        note(module.address, 0x400);
    }
    for (_, at) in kernel.vmcoreinfo().symbols() {
        note(at, 0x1000);
    }
    for (start, stop) in
        [("__start_BTF", "__stop_BTF"), ("__start_orc_unwind", "__stop_orc_unwind")]
    {
        if let (Some(start), Some(stop)) = (kernel.symbol(start)?, kernel.symbol(stop)?) {
            note(start, stop.0 - start.0);
        }
    }
    if let Some(queues) = kernel.symbol("runqueues")? {
        let percpu = linux.percpu()?;
        for &cpu in &percpu.present {
            note(percpu.address(queues, cpu).context("no such CPU")?, 0x1000);
        }
    }
    let offset = |phys: u64| {
        let load =
            core.loads().find(|it| (it.p_paddr..it.p_paddr + it.p_filesz).contains(&phys))?;
        Some(load.p_offset + phys - load.p_paddr)
    };
    // The first pages of the file are headers and notes.
    let head = (0..4).map(|page| page * PAGE);
    Ok(head.chain(physical.into_iter().filter_map(offset)).collect())
}

/// The memory that this process has and does not give back, without the pages of mapped files.
fn memory_kib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no RssAnon")?.parse()?)
}
