//! Dumps that are still arriving: what the analyzer makes of part of the pages.
//!
//! The dump of one crash on each architecture, with and without what a test takes away.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};
use host_analyzer::commands::{bt, log, modules, ps, sys};
use host_analyzer::kernel::Kernel;
use host_analyzer::kernel::vmlinux::Vmlinux;
use host_analyzer::linux::Linux;
use host_analyzer::source::Dump;
use host_analyzer::usable;
use host_analyzer::{Error, VirtAddr};
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use tests::crash::{Dumped, bench, once};
use tests::incomplete::Incomplete;
use tests::stories;

stories! {
    x86_64:
        all_pages_give_what_the_dump_gives,
        backtrace_needs_no_tasks_and_no_per_cpu_data,
        what_vmlinux_has_need_not_be_in_the_dump,
        lost_log_text_is_counted_and_the_rest_is_shown,
        dump_without_any_page_is_no_dump_and_says_so,
        any_subset_of_the_pages_gives_true_frames_or_marked_ones;
    aarch64:
        all_pages_give_what_the_dump_gives,
        backtrace_needs_no_tasks_and_no_per_cpu_data,
        what_vmlinux_has_need_not_be_in_the_dump,
        lost_log_text_is_counted_and_the_rest_is_shown,
        any_subset_of_the_pages_gives_true_frames_or_marked_ones;
}

/// A crash, and the file in which its pages are chosen.
struct Bench {
    dump: PathBuf,
    vmlinux: PathBuf,
    chosen: Incomplete,
}

/// The bench of an architecture, for one test at a time.
fn on(arch: &'static str) -> Result<MutexGuard<'static, Bench>> {
    static X86_64: OnceLock<Result<Mutex<Bench>, String>> = OnceLock::new();
    static AARCH64: OnceLock<Result<Mutex<Bench>, String>> = OnceLock::new();
    let cell = if arch == "x86_64" { &X86_64 } else { &AARCH64 };
    let made = once(cell, || {
        let workbench = bench(arch)?;
        let name = format!("incomplete/{arch}");
        let dumped = Dumped::new(workbench, &name, workbench.scenario())?;
        let vmlinux = dumped.vmlinux()?.to_owned();
        let dump = dumped.dump;
        let chosen = Incomplete::new(&dump, &dump.with_file_name("incomplete.elf"))?;
        Ok(Mutex::new(Bench { dump, vmlinux, chosen }))
    })?;
    Ok(made.lock().unwrap_or_else(PoisonError::into_inner))
}

/// What a command wrote, and how it ended.
type Said = (String, Result<(), Error>);

fn said(run: impl FnOnce(&mut Vec<u8>) -> Result<(), Error>) -> Said {
    let mut out = Vec::new();
    let outcome = run(&mut out);
    (String::from_utf8_lossy(&out).into_owned(), outcome)
}

fn crashed(kernel: &Kernel<'_>) -> Said {
    said(|out| bt::run(kernel, &bt::Options::default(), out))
}

fn cpus(kernel: &Kernel<'_>) -> Said {
    said(|out| bt::run(kernel, &bt::Options { all_cpus: true, ..Default::default() }, out))
}

fn tasks(kernel: &Kernel<'_>) -> Said {
    said(|out| bt::run(kernel, &bt::Options { all_tasks: true, ..Default::default() }, out))
}

fn listed(kernel: &Kernel<'_>) -> Said {
    said(|out| ps::run(kernel, &ps::Options::default(), out))
}

fn logged(kernel: &Kernel<'_>) -> Said {
    said(|out| log::run(kernel, &log::Options::default(), out))
}

/// A frame in the output of `bt`: where on the stack, its address and its name.
type Frame = (u64, u64, String);

/// The frames in the output of `bt`, without those that follow a guess: those are marked.
fn frames(text: &str) -> Vec<Frame> {
    let (mut frames, mut guessed) = (Vec::new(), false);
    for line in text.lines() {
        guessed &= !line.starts_with("PID: ");
        let Some(frame) = line.trim_start().strip_prefix('#').filter(|_| !guessed) else {
            continue;
        };
        frames.extend(frame_in(frame));
        let marks = ["(no unwind tables", "(interrupted perhaps"];
        guessed = marks.iter().any(|mark| frame.contains(mark));
    }
    frames
}

/// `3 [ff5aeb20c0013d88] sysrq_handle_crash+0x16 at ffffffffb68a8a06`, in parts.
fn frame_in(line: &str) -> Option<Frame> {
    let (_, rest) = line.split_once('[')?;
    let (at, rest) = rest.split_once("] ")?;
    let (name, pc) = rest.split_once(" at ")?;
    let number = |text: &str| u64::from_str_radix(text.split_whitespace().next()?, 16).ok();
    Some((number(at)?, number(pc)?, name.to_owned()))
}

/// The physical pages of the objects that `wanted` names: symbols of variables, and how many bytes of
/// each.
fn pages_of(kernel: &Kernel<'_>, wanted: &[(VirtAddr, u64)]) -> BTreeSet<u64> {
    let pages = wanted.iter().flat_map(|&(at, size)| (at.0 & !0xfff..at.0 + size).step_by(4096));
    let leads = |page: u64| kernel.memory().translate(VirtAddr(page)).ok();
    pages.filter_map(leads).map(|mapping| mapping.phys.0 & !0xfff).collect()
}

fn all_pages_give_what_the_dump_gives(arch: &'static str) -> Result<()> {
    let bench = on(arch)?;
    let whole = Dump::open(&bench.dump)?;
    let whole = Kernel::open(&whole, None)?;
    bench.chosen.choose(&|_| true)?;
    let copy = Dump::open(bench.chosen.path())?;
    let copy = Kernel::open(&copy, None)?;
    for command in [crashed, cpus, tasks, listed, logged] {
        let ((ours, outcome), (theirs, _)) = (command(&copy), command(&whole));
        outcome?;
        let (mark, rest) = ours.split_once('\n').context("no output")?;
        ensure!(mark.starts_with("INCOMPLETE DUMP"), "{mark}");
        ensure!(rest == theirs, "all pages give\n{rest}\nthe dump gives\n{theirs}");
    }
    let found = usable::check(&copy);
    ensure!(found.crash && found.log && found.stacks.0 == found.stacks.1, "{found:?}");
    Ok(())
}

fn backtrace_needs_no_tasks_and_no_per_cpu_data(arch: &'static str) -> Result<()> {
    let bench = on(arch)?;
    let whole = Dump::open(&bench.dump)?;
    let whole = Kernel::open(&whole, None)?;
    let linux = Linux::new(&whole);
    let mut objects = Vec::new();
    let names = ["__per_cpu_offset", "nr_cpu_ids", "__cpu_present_mask", "__cpu_online_mask"];
    for name in names.into_iter().chain(["init_task", "modules", "panic_cpu"]) {
        objects.extend(whole.symbol(name)?.map(|at| (at, 8)));
    }
    objects.extend(linux.all_tasks()?.tasks.iter().map(|task| (task.address, 0x2000)));
    let lost = pages_of(&whole, &objects);
    bench.chosen.choose(&|page| !lost.contains(&page))?;
    let torn = Dump::open(bench.chosen.path())?;
    let torn = Kernel::open(&torn, None)?;

    let (text, outcome) = crashed(&torn);
    outcome.with_context(|| text.clone())?;
    let expected = frames(&crashed(&whole).0);
    ensure!(frames(&text) == expected, "{text}\ninstead of\n{expected:#x?}");
    ensure!(text.contains("its task is not known"), "{text}");
    ensure!(text.contains("PANIC: \"Kernel panic - not syncing"), "{text}");

    let (text, outcome) = cpus(&torn);
    outcome.with_context(|| text.clone())?;
    let notes = whole.notes().prstatus.len();
    ensure!(text.matches("PID: ").count() == notes, "{notes} notes:\n{text}");
    let expected: BTreeSet<Frame> = frames(&cpus(&whole).0).into_iter().collect();
    let found: BTreeSet<Frame> = frames(&text).into_iter().collect();
    ensure!(found == expected, "{text}\ninstead of\n{expected:#x?}");

    ensure!(listed(&torn).1.is_err(), "tasks out of nothing:\n{}", listed(&torn).0);
    logged(&torn).1?;
    let found = usable::check(&torn);
    ensure!(found.crash && found.log && !found.tasks, "{found:?}");
    Ok(())
}

fn what_vmlinux_has_need_not_be_in_the_dump(arch: &'static str) -> Result<()> {
    let bench = on(arch)?;
    let whole = Dump::open(&bench.dump)?;
    let whole = Kernel::open(&whole, None)?;
    let (start, end) = (whole.vmcoreinfo().need_symbol("_stext")?, whole.symbol("_etext")?);
    let mut constant = vec![(start, end.context("no _etext")?.0 - start.0)];
    let of_tables = whole.vmcoreinfo().symbols().filter(|(name, _)| name.starts_with("kallsyms_"));
    constant.extend(of_tables.map(|(_, at)| (at, 8)));
    for name in ["BTF", "orc_unwind_ip", "orc_unwind"] {
        let edges =
            (whole.symbol(&format!("__start_{name}"))?, whole.symbol(&format!("__stop_{name}"))?);
        if let (Some(start), Some(stop)) = edges {
            constant.push((start, stop.0 - start.0));
        }
    }
    let lost = pages_of(&whole, &constant);
    bench.chosen.choose(&|page| !lost.contains(&page))?;
    let torn = Dump::open(bench.chosen.path())?;
    let alone = Kernel::open(&torn, None)?;
    let (text, outcome) = crashed(&alone);
    ensure!(outcome.is_err() || frames(&text).len() < 3, "frames out of nothing:\n{text}");

    let vmlinux = Vmlinux::open(&bench.vmlinux)?;
    let helped = Kernel::open(&torn, Some(&vmlinux))?;
    for command in [crashed, cpus, tasks] {
        let (text, outcome) = command(&helped);
        outcome.with_context(|| text.clone())?;
        let expected: Vec<_> = places(&frames(&command(&whole).0));
        ensure!(places(&frames(&text)) == expected, "{text}\ninstead of\n{expected:#x?}");
    }
    ensure!(helped.borrowed().contains(&"symbols"), "{:?}", helped.borrowed());
    Ok(())
}

/// Frames without their names: where a kernel's table and vmlinux have several symbols at one address,
/// they need not agree on the first.
fn places(frames: &[Frame]) -> Vec<(u64, u64)> {
    frames.iter().map(|&(at, pc, _)| (at, pc)).collect()
}

fn lost_log_text_is_counted_and_the_rest_is_shown(arch: &'static str) -> Result<()> {
    let bench = on(arch)?;
    let whole = Dump::open(&bench.dump)?;
    let whole = Kernel::open(&whole, None)?;
    let info = whole.vmcoreinfo();
    let ring = whole.memory().pointer(info.need_symbol("prb")?)?;
    let data = info.need_offset("printk_ringbuffer.text_data_ring")?
        + info.need_offset("prb_data_ring.data")?;
    let text = whole.memory().pointer(ring.offset(data as u64))?;
    // The second page: every boot fills it.
    let lost = pages_of(&whole, &[(text.offset(0x1000 - text.0 % 0x1000), 8)]);
    ensure!(lost.len() == 1, "{lost:x?}");
    bench.chosen.choose(&|page| !lost.contains(&page))?;
    let torn = Dump::open(bench.chosen.path())?;
    let torn = Kernel::open(&torn, None)?;
    let (whole, torn) = (logged(&whole).0, logged(&torn).0);
    let all: HashSet<&str> = whole.lines().collect();
    let (records, others): (Vec<&str>, Vec<&str>) =
        torn.lines().partition(|line| line.starts_with('['));
    ensure!(records.iter().all(|record| all.contains(record)), "invented:\n{torn}");
    ensure!(records.len() < all.len() && records.len() > all.len() / 2, "{}", records.len());
    let lost = |line: &&str| line.contains("records are not in the dump");
    ensure!(others.iter().any(lost), "{others:#?}");
    ensure!(torn.contains("Kernel panic - not syncing"), "the end is lost:\n{torn}");
    Ok(())
}

fn dump_without_any_page_is_no_dump_and_says_so(arch: &'static str) -> Result<()> {
    let bench = on(arch)?;
    bench.chosen.choose(&|_| false)?;
    let error = Dump::open(bench.chosen.path()).err().context("opened")?;
    ensure!(error.to_string().contains("without any memory"), "{error}");
    Ok(())
}

/// How many subsets are tried.
const CASES: u32 = 24;

/// Pages are there or not by chance, in stretches of 2^`stretch` pages, `share` of 16 of them.
fn by_chance(seed: u64, stretch: u32, share: u64) -> impl Fn(u64) -> bool {
    move |page| {
        let block = (page >> 12 >> stretch).wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (block ^ block >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 60 < share
    }
}

fn any_subset_of_the_pages_gives_true_frames_or_marked_ones(arch: &'static str) -> Result<()> {
    let bench = on(arch)?;
    let dump = Dump::open(&bench.dump)?;
    let whole = Kernel::open(&dump, None)?;
    let mut known: BTreeMap<(u64, u64), HashSet<String>> = BTreeMap::new();
    for command in [crashed, cpus, tasks] {
        for (at, pc, name) in frames(&command(&whole).0) {
            known.entry((at, pc)).or_default().insert(name);
        }
    }
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let subsets = (proptest::num::u64::ANY, 0u32..14, 4u64..16);
    let seen = Cell::new(0);
    let outcome = TestRunner::new(config).run(&subsets, |(seed, stretch, share)| {
        let fail = |error: String| TestCaseError::fail(error);
        let has = by_chance(seed, stretch, share);
        bench.chosen.choose(&has).map_err(|error| fail(error.to_string()))?;
        let dump = Dump::open(bench.chosen.path()).map_err(|error| fail(error.to_string()))?;
        let torn = Kernel::open(&dump, None).map_err(|error| fail(error.to_string()))?;
        for command in [crashed, cpus, tasks] {
            let text = command(&torn).0;
            for frame in frames(&text) {
                seen.set(seen.get() + 1);
                let (at, pc, name) = &frame;
                let names = known.get(&(*at, *pc));
                let names =
                    names.ok_or_else(|| fail(format!("{frame:x?} is invented:\n{text}")))?;
                let right = name.starts_with('(') || names.contains(name);
                if !right {
                    return Err(fail(format!("{frame:x?} is called {names:?}:\n{text}")));
                }
            }
        }
        let _ = (listed(&torn), logged(&torn), usable::check(&torn));
        let _ = said(|out| modules::run(&torn, &modules::Options::default(), out));
        let _ = said(|out| sys::run(&torn, &sys::Options::default(), out));
        Ok(())
    });
    outcome.map_err(|error| anyhow::anyhow!("{error}"))?;
    println!("{} frames in {CASES} subsets", seen.get());
    ensure!(seen.get() > CASES, "only {} frames in all subsets", seen.get());
    Ok(())
}
