//! Dumps to NVMe disks.

use anyhow::{Result, ensure};
use tests::crash::{Crashed, Dumped, bench, directory};
use tests::stories;
use xtask::dump::DUMP;
use xtask::guest::Scenario;
use xtask::qemu::sparse_image;

stories! {
    x86_64:
        blocks_of_512_bytes,
        blocks_of_4_kib,
        behind_a_root_port,
        through_an_iommu,
        second_namespace_is_taken_when_only_it_has_a_mark,
        namespace_that_falls_silent_is_left_for_the_next_one;
    aarch64:
        blocks_of_512_bytes,
        blocks_of_4_kib;
}

fn blocks_of_512_bytes(arch: &'static str) -> Result<()> {
    takes_every_byte(arch, "nvme").map(drop)
}

fn blocks_of_4_kib(arch: &'static str) -> Result<()> {
    takes_every_byte(arch, "nvme-4k").map(drop)
}

fn behind_a_root_port(arch: &'static str) -> Result<()> {
    let dumped = takes_every_byte(arch, "nvme-root-port")?;
    let line = dumped.crashed.expect_payload_line(": NVMe, ")?;
    ensure!(!line.contains("0000:00:"), "not behind a port: {line}");
    Ok(())
}

fn through_an_iommu(arch: &'static str) -> Result<()> {
    takes_every_byte(arch, "nvme-vtd")?.crashed.expect_payload_line(": switched off").map(drop)
}

/// The dump is what QEMU reads of the memory.
fn takes_every_byte(arch: &'static str, machine: &str) -> Result<Dumped> {
    let bench = bench(arch)?;
    let scenario = Scenario { machine: machine.to_owned(), ..bench.scenario() };
    let dumped = Dumped::new(bench, &format!("nvme/{arch}-{machine}"), scenario)?;
    let end = &dumped.crashed.end;
    ensure!(end == "guest-reset", "no reboot but {end}");
    dumped.crashed.expect_payload_line(" namespace 1: NVMe, 640 MiB")?;
    ensure!(dumped.differences.is_empty(), "{:#?}", dumped.differences);
    Ok(dumped)
}

fn second_namespace_is_taken_when_only_it_has_a_mark(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("nvme/{arch}-namespaces"))?;
    let machine = "nvme-namespaces".to_owned();
    let scenario = Scenario { machine, ..bench.scenario() };
    let first = sparse_image(&directory.join("first.img"), 64 << 20)?;
    let before = std::fs::read(&first.image)?;
    let second = bench.reserved_disk(&scenario, &directory, "second.img")?;
    let disks = vec![first.clone(), second.clone()];
    let crashed = Crashed::new(bench, &scenario, disks, &directory, |_| Ok(()))?;
    crashed.expect_payload_line(" namespace 1: no reservation mark")?;
    crashed.expect_payload_line("complete after")?;
    ensure!(before == std::fs::read(&first.image)?, "the first namespace was written to");
    bench.loader.save(&second.image, &directory)?;
    Ok(())
}

/// The controller has its memory back, and is used again, with requests that it never finished.
fn namespace_that_falls_silent_is_left_for_the_next_one(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("nvme/{arch}-silent"))?;
    let machine = "nvme-namespaces".to_owned();
    let scenario = Scenario { machine, ..bench.scenario() };
    let [first, second] =
        ["first.img", "second.img"].map(|image| bench.reserved_disk(&scenario, &directory, image));
    let (first, second) = (first?, second?);
    let mut vm = bench.guest().boot(&scenario, vec![first, second.clone()], &directory)?;
    vm.expect(&["tinykdump: writing"], DUMP)?;
    // A request of 256 KiB takes three days.
    vm.throttle("disk0", 1)?;
    let end = vm.wait_for_end(DUMP)?;
    let crashed = Crashed { console: vm.quit()?, end };
    crashed.expect_payload_line(" namespace 1: the disk did not answer in time")?;
    crashed.expect_payload_line(" namespace 2: NVMe, ")?;
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    bench.loader.save(&second.image, &directory)?;
    Ok(())
}
