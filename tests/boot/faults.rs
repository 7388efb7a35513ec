//! What goes wrong while the dump is written costs as little as it can.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::core_file::CoreFile;
use tests::crash::{bench, directory};
use xtask::dump::DUMP;
use xtask::guest::Scenario;

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
        vm.qmp("human-monitor-command", json!({ "command-line": MACHINE_CHECK }))?;
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
    std::fs::remove_file(&dump)?;
    std::fs::remove_file(&disk.image)?;
    Ok(())
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
