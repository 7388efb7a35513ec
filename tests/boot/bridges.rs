//! Dumps to disks on buses that only bridges lead to.

use anyhow::{Context, Result, ensure};
use tests::crash::{Dumped, bench};
use tests::stories;
use xtask::guest::Scenario;

stories! {
    x86_64:
        every_byte_gets_to_a_disk_behind_a_conventional_bridge,
        every_byte_gets_to_a_disk_behind_a_switch;
    aarch64:
        every_byte_gets_to_a_disk_behind_a_switch;
}

fn every_byte_gets_to_a_disk_behind_a_conventional_bridge(arch: &'static str) -> Result<()> {
    every_byte_gets_there(arch, "behind-bridge", 1)
}

/// The root port, the switch's port towards it, and that towards the disk.
fn every_byte_gets_to_a_disk_behind_a_switch(arch: &'static str) -> Result<()> {
    every_byte_gets_there(arch, "behind-switch", 3)
}

/// The disk is on the bus of this number, and the dump is what QEMU reads of the memory.
fn every_byte_gets_there(arch: &'static str, machine: &str, bus: u8) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = Scenario { machine: machine.to_owned(), memory_mib: 256, ..bench.scenario() };
    let dumped = Dumped::new(bench, &format!("bridges/{arch}-{machine}"), scenario)?;
    let end = &dumped.crashed.end;
    ensure!(end == "guest-reset", "no reboot but {end}");
    let line = dumped.crashed.expect_payload_line(", 384 MiB")?;
    let place = line.split_once("0000:").context("not on PCI")?.1;
    ensure!(place.starts_with(&format!("{bus:02x}:")), "not on bus {bus}: {line}");
    ensure!(dumped.differences.is_empty(), "{:#?}", dumped.differences);
    Ok(())
}
