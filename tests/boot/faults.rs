//! What goes wrong while the dump is written costs as little as it can.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::core_file::{CoreFile, part};
use tests::crash::{Crashed, analyzer, bench, directory};
use tests::trace::{from_crash, of_analyzer};
use tests::wire::{Settings, Wire};
use xtask::dump::DUMP;
use xtask::guest::{Scenario, Trigger};
use xtask::qemu::{Blob, Vm};

/// QEMU's monitor command for a machine check on CPU 0, bank 1: uncorrected, with an address; the
/// interrupted code can go on (MCi_STATUS, MCG_STATUS, MCi_ADDR, MCi_MISC; Intel SDM 3B, 16.3).
const MACHINE_CHECK: &str = "mce 0 1 0xbe00000000000000 0x5 0x1234000 0x8c";

/// Time between two machine checks: the first must be dealt with when the second comes, else the
/// CPU shuts down as the architecture demands.
const INTERVAL: Duration = Duration::from_millis(40);

/// What the payload says of a page that it could not read.
const UNREADABLE: &str = " cannot be read; it is zeros in the dump";

#[test]
fn machine_checks_cost_the_page_that_is_being_read_and_no_more() -> Result<()> {
    // Long enough a dump that some of the checks hit while a page is read: about one in ten does.
    let bench = bench("x86_64")?;
    let scenario = Scenario { cpus: 1, memory_mib: 2048, ..bench.scenario() };
    let directory = directory("faults/machine-check")?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], &directory)?;
    vm.expect(&["tinykdump: writing"], DUMP)?;
    let give_up = Instant::now() + DUMP;
    while !vm.console.text().contains(UNREADABLE) && Instant::now() < give_up {
        vm.monitor(MACHINE_CHECK)?;
        sleep(INTERVAL);
    }
    let end = vm.wait_for_end(DUMP)?;
    let console: String = vm.quit()?.into_iter().map(|line| line.text + "\n").collect();
    ensure!(end == "guest-reset", "no reboot but {end}:\n{console}");
    ensure!(console.contains("tinykdump: complete\n"), "the dump is not complete:\n{console}");

    // tinykdump: page at 0x33fd000 cannot be read; it is zeros in the dump
    let (before, _) = console.split_once(UNREADABLE).context("no machine check hit a read")?;
    let page = before.rsplit("0x").next().context("no address")?;
    let page = u64::from_str_radix(page, 16)?;
    // Saving verifies every checksum.
    let dump = bench.loader.save(&disk.image, &directory)?;
    ensure!(page_in(&dump, page)? == [0; 4096], "the page at {page:#x} is not zeros");
    let sys = analyzer()?.run(&["sys"], &dump, None)?;
    ensure!(sys.contains(&format!("{page:#x}-{:#x}", page + 4095)), "{page:#x}:\n{sys}");
    std::fs::remove_file(&dump)?;
    std::fs::remove_file(&disk.image)?;
    Ok(())
}

/// The TCO timer of q35's chipset, where firmware puts it: its value in steps of 0.6 s, and its control
/// register, in which a bit that is zero lets it run (ICH9, 13.9). Run out twice, it resets the machine.
const TCO_SECONDS: u64 = 3;
const LET_TCO_RUN: [&str; 2] = ["o /h 0x672 5", "o /h 0x668 0"];

/// Clears "no reboot" in the chipset's GCS, as Linux's driver of the timer does, which this kernel lacks.
const LET_TCO_RESET: &str = "devmem 0xfed1f410 32 0";

#[test]
fn watchdog_that_runs_does_not_end_the_dump() -> Result<()> {
    let bench = bench("x86_64")?;
    let machine = "watchdog".to_owned();
    let (before, trigger) = (LET_TCO_RESET.to_owned(), Trigger::FromOutside);
    let scenario = Scenario { machine, before, trigger, ..bench.scenario() };
    let directory = directory("faults/watchdog")?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    // Nobody pets it: the machine is reset.
    let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], &directory)?;
    LET_TCO_RUN.iter().try_for_each(|command| vm.monitor(command).map(drop))?;
    let begun = Instant::now();
    ensure!(vm.wait_for_end(Duration::from_secs(60))? == "guest-reset", "no reset");
    ensure!(begun.elapsed() > Duration::from_secs(TCO_SECONDS), "too soon");
    vm.quit()?;
    // The payload does, over a disk that takes three times as long.
    let scenario = Scenario { trigger: Trigger::Sysrq, ..scenario };
    let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], &directory)?;
    LET_TCO_RUN.iter().try_for_each(|command| vm.monitor(command).map(drop))?;
    vm.expect(&["tinykdump: the TCO watchdog runs"], DUMP)?;
    let begun = Instant::now();
    vm.throttle("disk0", 32 << 20)?;
    vm.expect(&["tinykdump: complete"], DUMP)?;
    let took = begun.elapsed();
    ensure!(took > Duration::from_secs(4 * TCO_SECONDS), "no test of the watchdog: {took:?}");
    vm.wait_for_end(DUMP)?;
    bench.loader.save(&disk.image, &directory)?;
    Ok(())
}

/// The same, but the interrupted code cannot go on: the payload has failed.
const FATAL_MACHINE_CHECK: &str = "mce 0 1 0xbe00000000000000 0x4 0x1234000 0x8c";

/// What the payload says first when it has failed by that.
const FAILED: &str = "exception 18 in the payload";

/// Checks the machine every `interval` until the payload has failed: a check that hits while old memory
/// is read costs no more than a page. One that hits on the way out ends the machine at once.
fn fail_payload(vm: &mut Vm, interval: Duration) -> Result<()> {
    let give_up = Instant::now() + DUMP;
    while !vm.console.text().contains(FAILED) {
        ensure!(Instant::now() < give_up, "it does not fail:\n{}", vm.console.text());
        vm.monitor(FATAL_MACHINE_CHECK)?;
        let seen = Instant::now() + interval;
        while !vm.console.text().contains(FAILED) && Instant::now() < seen {
            sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

#[test]
fn payload_that_fails_during_the_dump_says_so_in_the_area_and_reboots() -> Result<()> {
    let bench = bench("x86_64")?;
    let scenario = Scenario { cpus: 1, memory_mib: 2048, ..bench.scenario() };
    let directory = directory("faults/payload")?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], &directory)?;
    // So slow that the payload waits for it most of the time: a check that hits while old memory is read
    // does not make it fail.
    vm.throttle("disk0", 100 << 20)?;
    // A second later there is something to tell of.
    vm.expect(&["tinykdump:  ", "tinykdump: complete"], DUMP)?;
    fail_payload(&mut vm, Duration::from_millis(500))?;
    let end = vm.wait_for_end(DUMP)?;
    let crashed = Crashed { console: vm.quit()?, end };
    crashed.expect_payload_line(FAILED)?;
    crashed.expect_payload_line("the dump there is marked incomplete")?;
    crashed.expect_payload_line("rebooting after reason 6: ")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);

    let shown = bench.loader.show(&disk.image)?;
    ensure!(shown.contains("state         incomplete"), "{shown}");
    ensure!(shown.contains("ended early   the payload itself failed"), "{shown}");
    ensure!(shown.contains("sysrq triggered crash"), "{shown}");
    let dump = bench.loader.save_incomplete(&disk.image, &directory)?;
    analyzer()?.run(&["sys"], &dump, None)?;
    std::fs::remove_file(&dump)?;
    std::fs::remove_file(&disk.image)?;
    Ok(())
}

#[test]
fn payload_that_fails_at_the_card_writes_the_dump_without() -> Result<()> {
    let bench = bench("x86_64")?;
    let scenario = Scenario { cpus: 1, memory_mib: 256, ..bench.scenario() };
    let directory = directory("faults/card")?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    // So slow that the card is not yet done when its first lines are seen.
    let settings = Settings { baud: Some(115_200), paced_bytes: 40_000, one_in: 0 };
    let wire = Wire::new(&directory, settings);
    let guest = bench.guest();
    let mut vm = guest.with_machine(&scenario, vec![disk.clone()], &directory, |machine| {
        machine.start_over(&directory, |input, output| wire.lay(input, output))
    })?;
    guest.wait_for_crash(&mut vm)?;
    vm.expect(&["tinykdump: crash card:"], DUMP)?;
    fail_payload(&mut vm, Duration::from_secs(3))?;
    let end = vm.wait_for_end(DUMP)?;
    let text: String = vm.quit()?.into_iter().map(|line| line.text + "\n").collect();
    ensure!(text.contains("tinykdump: complete\n") && end == "guest-reset", "{end}:\n{text}");
    let dump = bench.loader.save(&disk.image, &directory)?;
    let card = analyzer()?.run(&["card"], &dump, None)?;
    ensure!(card.contains("the rest is missing: the payload failed"), "{card}");
    let frames = of_analyzer(&analyzer()?.run(&["bt"], &dump, None)?)?;
    ensure!(!from_crash(&frames)?.is_empty(), "{frames:#?}");
    Ok(())
}

/// Where RAM begins on the `virt` machine, and where its 512 MiB end.
const RAM: Range<u64> = 0x4000_0000..0x6000_0000;

/// In RAM, and beyond the 256 MiB that the guest's kernel is told of.
const HANDMADE: u64 = 0x5f00_0000;

/// Reading where no memory is ends in an external abort, as reading memory that is broken does. A
/// handmade elfcorehdr, in RAM that the kernel does not own, claims a MiB beyond the end of RAM.
#[test]
fn external_aborts_cost_the_pages_that_cannot_be_read_and_no_more() -> Result<()> {
    const MIB: u64 = 1 << 20;
    let bench = bench("aarch64")?;
    let directory = directory("faults/external-abort")?;
    let file = directory.join("elfcorehdr");
    std::fs::write(&file, elfcorehdr(&[(RAM.start, 128 * MIB), (RAM.end - MIB, 2 * MIB)]))?;
    let scenario = Scenario {
        kernel_options: "mem=256M".to_owned(),
        blobs: vec![Blob { file, address: HANDMADE }],
        ..bench.scenario().appending(&format!("elfcorehdr={HANDMADE:#x}"))
    };
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let mut differences = Vec::new();
    let disks = vec![disk.clone()];
    let crashed = Crashed::new(bench, &scenario, disks, &directory, |vm| {
        let core = CoreFile::open(&disk.image)?;
        let in_ram = core.loads().map(|load| part(load, 0, RAM.end - load.p_paddr));
        differences = core.differences_in(in_ram, vm, &directory)?;
        Ok(())
    })?;
    crashed.expect_payload_line("256 unreadable")?;
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    ensure!(differences.is_empty(), "{differences:#?}");

    let dump = bench.loader.save(&disk.image, &directory)?;
    let bytes: u64 = CoreFile::open(&dump)?.loads().map(|load| load.p_filesz).sum();
    ensure!(bytes == 130 * MIB, "{bytes} bytes of 130 MiB are in the dump");
    let record = CoreFile::open(&dump)?.record()?;
    let unreadable: Vec<_> = record.unreadable().collect();
    let gap = RAM.end..RAM.end + MIB;
    ensure!(unreadable == [gap], "{unreadable:#x?}");
    for page in (RAM.end..RAM.end + MIB).step_by(4096) {
        ensure!(page_in(&dump, page)? == [0; 4096], "the page at {page:#x} is not zeros");
    }
    std::fs::remove_file(&dump)?;
    std::fs::remove_file(&disk.image)?;
    Ok(())
}

/// An ELF header and a PT_LOAD for each of `ranges`, which are addresses and sizes (System V ABI,
/// "ELF Header", "Program Header"; all fields little-endian).
fn elfcorehdr(ranges: &[(u64, u64)]) -> Vec<u8> {
    let half = u16::to_le_bytes;
    let (word, xword) = (u32::to_le_bytes, u64::to_le_bytes);
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    // ET_CORE for EM_AARCH64, program headers right behind this one.
    bytes.extend([half(4), half(183)].concat());
    bytes.extend(word(1));
    bytes.extend([xword(0), xword(64), xword(0)].concat());
    let count = u16::try_from(ranges.len()).unwrap_or(u16::MAX);
    bytes.extend(word(0));
    bytes.extend([half(64), half(56), half(count), half(0), half(0), half(0)].concat());
    for &(at, size) in ranges {
        let direct_map = 0xffff_0000_0000_0000 + (at - RAM.start);
        bytes.extend([word(1), word(0)].concat());
        let fields = [at, direct_map, at, size, size, 0];
        bytes.extend(fields.into_iter().flat_map(xword));
    }
    bytes
}

/// The page at the physical address `at`.
fn page_in(dump: &Path, at: u64) -> Result<[u8; 4096]> {
    let core = CoreFile::open(dump)?;
    let load = core.loads().find(|load| (load.p_paddr..load.p_paddr + load.p_filesz).contains(&at));
    let load = load.with_context(|| format!("no PT_LOAD holds {at:#x}"))?;
    let mut page = [0xff; 4096];
    File::open(dump)?.read_exact_at(&mut page, load.p_offset + (at - load.p_paddr))?;
    Ok(page)
}
