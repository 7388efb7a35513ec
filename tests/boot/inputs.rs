//! Dumps in the forms of other programs: what the analyzer says of each is what it says of the ELF core.
//!
//! makedumpfile knows no architecture but its own, so its files are those of x86_64; QEMU's are of both.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use host_analyzer::PhysAddr;
use host_analyzer::source::{Dump, Memory};
use serde_json::json;
use tests::crash::{Crashed, analyzer, bench, directory, once};
use tests::{peers, stories};
use xtask::fixtures::Fixtures;
use xtask::guest::{Scenario, Trigger};
use xtask::qemu::Vm;

stories! {
    x86_64:
        every_form_by_makedumpfile_says_what_the_core_says,
        dump_that_was_cut_off_says_so_first,
        memory_that_qemu_dumped_says_what_the_payloads_dump_says,
        every_form_by_qemu_says_the_same;
    aarch64:
        memory_that_qemu_dumped_says_what_the_payloads_dump_says,
        every_form_by_qemu_says_the_same;
}

/// What is asked about every dump. Those after the first two do not depend on the CPUs' registers.
const QUESTIONS: [&[&str]; 6] =
    [&["bt", "-a"], &["bt", "--all-tasks"], &["ps"], &["mod"], &["log"], &["sys"]];
const ABOUT_MEMORY: std::ops::Range<usize> = 2..5;

/// One crash, dumped twice.
struct Crash {
    directory: PathBuf,
    fixtures: Fixtures,
    /// By the payload, saved.
    dump: PathBuf,
    /// By QEMU when the machine was reset, compressed.
    by_qemu: PathBuf,
}

fn crash(arch: &'static str) -> Result<&'static Crash> {
    static X86_64: OnceLock<Result<Crash, String>> = OnceLock::new();
    static AARCH64: OnceLock<Result<Crash, String>> = OnceLock::new();
    once(if arch == "x86_64" { &X86_64 } else { &AARCH64 }, || {
        let bench = bench(arch)?;
        let directory = directory(&format!("inputs/{arch}"))?;
        let scenario = Scenario { memory_mib: 256, ..bench.scenario() };
        let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
        let by_qemu = directory.join("qemu.kdump");
        let crashed = Crashed::new(bench, &scenario, vec![disk.clone()], &directory, |vm| {
            dump_guest_memory(vm, "kdump-zlib", false, &by_qemu)
        })?;
        crashed.expect_payload_line("complete after")?;
        let dump = bench.loader.save(&disk.image, &directory)?;
        std::fs::remove_file(&disk.image)?;
        Ok(Crash { directory, fixtures: Fixtures::open()?, dump, by_qemu })
    })
}

fn dump_guest_memory(vm: &mut Vm, format: &str, paging: bool, path: &Path) -> Result<()> {
    let file = format!("file:{}", path.display());
    let arguments = json!({ "paging": paging, "protocol": file, "format": format });
    vm.qmp("dump-guest-memory", arguments).map(drop)
}

/// What is answered to every question, without the line that names the file.
fn answers(dump: &Path) -> Result<Vec<String>> {
    let answers = QUESTIONS.iter().map(|question| {
        let answer = analyzer()?.run(question, dump, None)?;
        let lines = answer.lines().filter(|line| !line.contains("DUMPFILE: "));
        Ok(lines.flat_map(|line| [line, "\n"]).collect())
    });
    answers.collect()
}

fn ensure_same(form: &str, ours: &[String], theirs: &[String]) -> Result<()> {
    for ((ours, theirs), question) in ours.iter().zip(theirs).zip(QUESTIONS) {
        let question = question.join(" ");
        let first = ours.lines().zip(theirs.lines()).find(|(ours, theirs)| ours != theirs);
        ensure!(ours == theirs, "{form}, {question}: {first:#?}\n{ours}\ninstead of\n{theirs}");
    }
    Ok(())
}

/// Fails unless all that `ours` has of the memory is as in `theirs`; says how many bytes that is.
fn ensure_same_memory(form: &str, ours: &Path, theirs: &Path) -> Result<u64> {
    let (ours, theirs) = (Dump::open(ours)?, Dump::open(theirs)?);
    let mut size = 0;
    for range in ours.ranges() {
        let mut at = range.start;
        while at < range.end {
            let run = ours.run(PhysAddr(at), (range.end - at).min(1 << 20) as usize)?;
            let expected = theirs.run(PhysAddr(at), run.len())?;
            let same = run[..expected.len()] == expected[..];
            ensure!(same, "{form}: memory from {at:#x} on differs");
            at += expected.len() as u64;
            size += expected.len() as u64;
        }
    }
    Ok(size)
}

fn every_form_by_makedumpfile_says_what_the_core_says(arch: &'static str) -> Result<()> {
    let crash = crash(arch)?;
    let expected = answers(&crash.dump)?;
    ensure!(expected[0].contains("sysrq_handle_crash"), "{}", expected[0]);
    let card = analyzer()?.run(&["card"], &crash.dump, None)?;
    // Debian's is built with zlib and LZO; asked for others (-p, -z) it does not compress.
    let forms: [&[&str]; 10] = [
        &["-c"],
        &["-l"],
        &["-p"],
        &["-z"],
        &["-c", "-d", "31"],
        &["-l", "-d", "1"],
        &["-E", "-d", "31"],
        &["-F", "-c"],
        &["-F", "-l", "-d", "31"],
        &["-F", "-E", "-d", "31"],
    ];
    let file = crash.directory.join("converted");
    for options in forms {
        peers::convert(&crash.fixtures, options, &crash.dump, &file)?;
        let form = options.join(" ");
        ensure_same(&form, &answers(&file)?, &expected)?;
        ensure!(analyzer()?.run(&["card"], &file, None)? == card, "{form}: another card");
        let size = ensure_same_memory(&form, &file, &crash.dump)?;
        let is_filtered = options.contains(&"-d");
        ensure!(size > if is_filtered { 16 << 20 } else { 240 << 20 }, "{form}: {size} bytes");
        std::fs::remove_file(&file)?;
    }
    Ok(())
}

fn dump_that_was_cut_off_says_so_first(arch: &'static str) -> Result<()> {
    let crash = crash(arch)?;
    let file = crash.directory.join("cut");
    let forms: [(&[&str], &str); 3] = [
        (&["-c"], "pages are cut off or were never written"),
        (&["-F", "-c"], "the flattened file has no end mark"),
        (&["-E", "-d", "31"], "bytes are cut off"),
    ];
    for (options, why) in forms {
        peers::convert(&crash.fixtures, options, &crash.dump, &file)?;
        let size = file.metadata()?.len();
        OpenOptions::new().write(true).open(&file)?.set_len(size / 10 * 9)?;
        let answer = analyzer()?.run(&["sys"], &file, None)?;
        let first = answer.lines().next().context("no answer")?;
        ensure!(first.starts_with("INCOMPLETE DUMP: ") && first.contains(why), "{first}");
        std::fs::remove_file(&file)?;
    }
    Ok(())
}

/// The machine was reset when the payload had ended: the memory of the dead kernel is as it was, the
/// registers are the payload's, and the registers that the dead kernel saved are in its memory.
fn memory_that_qemu_dumped_says_what_the_payloads_dump_says(arch: &'static str) -> Result<()> {
    let crash = crash(arch)?;
    let (ours, theirs) = (answers(&crash.by_qemu)?, answers(&crash.dump)?);
    for (at, question) in QUESTIONS.iter().enumerate().filter(|(at, _)| ABOUT_MEMORY.contains(at)) {
        ensure!(ours[at] == theirs[at], "{question:?}:\n{}\ninstead of\n{}", ours[at], theirs[at]);
    }
    let said = analyzer()?.command(&["log"], &crash.by_qemu, None).output()?.stderr;
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(said.contains("has no VMCOREINFO note; that of Linux 6.1"), "{said}");
    ensure!(!said.contains("another kernel"), "{said}");
    Ok(())
}

fn every_form_by_qemu_says_the_same(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("inputs/{arch}-qemu"))?;
    let trigger = Trigger::FromOutside;
    let scenario = Scenario { memory_mib: 256, trigger, ..bench.scenario() };
    let mut vm = bench.guest().boot(&scenario, Vec::new(), &directory)?;
    vm.pause()?;
    let core = directory.join("core.elf");
    dump_guest_memory(&mut vm, "elf", false, &core)?;
    let expected = answers(&core)?;
    ensure!(expected[4].contains("Linux version 6.1"), "{}", expected[4]);
    ensure!(expected[0].contains("CPU: 1"), "{}", expected[0]);

    let file = directory.join("qemu.kdump");
    dump_guest_memory(&mut vm, "elf", true, &file)?;
    ensure_same("paging", &answers(&file)?, &expected)?;
    // Debian's QEMU has zlib alone; others are tried where they are.
    let known = vm.qmp("query-dump-guest-memory-capability", json!({}))?;
    let known = known["formats"].as_array().context("no formats")?;
    let compressed =
        known.iter().filter_map(|it| it.as_str()).filter(|it| it.starts_with("kdump-"));
    ensure!(compressed.clone().any(|format| format == "kdump-zlib"), "{known:?}");
    for format in compressed {
        dump_guest_memory(&mut vm, format, false, &file)?;
        ensure_same(format, &answers(&file)?, &expected)?;
    }
    dump_guest_memory(&mut vm, "kdump-zlib", false, &file)?;
    // As QEMU 8.2 can write it at once.
    let plain = directory.join("plain.kdump");
    peers::convert(&bench.fixtures, &["-R"], &file, &plain)?;
    ensure_same("plain", &answers(&plain)?, &expected)?;
    vm.quit()?;
    [core, file, plain].iter().try_for_each(std::fs::remove_file)?;
    Ok(())
}
