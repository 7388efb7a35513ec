//! Dumps to disks behind virtio-scsi.

use anyhow::{Result, ensure};
use tests::core_file::CoreFile;
use tests::crash::{Crashed, Dumped, bench, directory, refused};
use xtask::guest::Scenario;
use xtask::qemu::sparse_image;

/// Boots the machine, and compares its dump byte by byte with the memory that QEMU reads. The
/// payload calls the disk `unit`.
fn dumps_every_byte(arch: &'static str, machine: &str, unit: &str) -> Result<Dumped> {
    let bench = bench(arch)?;
    let scenario = Scenario { machine: machine.to_owned(), ..bench.scenario() };
    let dumped = Dumped::new(bench, &format!("scsi/{arch}-{machine}"), scenario)?;
    let crashed = &dumped.crashed;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    let line = crashed.expect_payload_line(": virtio-scsi, 640 MiB")?;
    ensure!(line.contains(&format!(" {unit}: ")), "not {unit}: {line}");
    ensure!(dumped.differences.is_empty(), "{:#?}", dumped.differences);
    let core = CoreFile::open(&dumped.dump)?;
    core.check_layout()?;
    let bytes: u64 = core.loads().map(|load| load.p_filesz).sum();
    ensure!(bytes > 480 << 20, "only {bytes} of 512 MiB are in the dump");
    Ok(dumped)
}

#[test]
fn x86_64_disk_gets_every_byte() -> Result<()> {
    dumps_every_byte("x86_64", "scsi", "target 0 lun 0").map(drop)
}

#[test]
fn x86_64_disk_of_4_kib_blocks_beside_a_cd_rom_gets_every_byte() -> Result<()> {
    let dumped = dumps_every_byte("x86_64", "scsi-4k-beside-cd", "target 2 lun 5")?;
    dumped.crashed.expect_payload_line("target 2 lun 0: is not a disk (SCSI device type 0x5)")?;
    Ok(())
}

#[test]
fn aarch64_disk_over_pci_gets_every_byte() -> Result<()> {
    dumps_every_byte("aarch64", "scsi-pci", "target 0 lun 0").map(drop)
}

#[test]
fn aarch64_disk_over_legacy_mmio_gets_every_byte() -> Result<()> {
    dumps_every_byte("aarch64", "scsi-mmio1", "target 0 lun 0").map(drop)
}

#[test]
fn aarch64_disk_over_mmio_gets_every_byte() -> Result<()> {
    dumps_every_byte("aarch64", "scsi-mmio2", "target 0 lun 0").map(drop)
}

#[test]
fn second_target_is_taken_when_only_it_has_a_mark() -> Result<()> {
    let bench = bench("x86_64")?;
    let directory = directory("scsi/second-target")?;
    let scenario = Scenario { machine: "scsi".to_owned(), ..bench.scenario() };
    let first = sparse_image(&directory.join("first.img"), 64 << 20)?;
    let before = std::fs::read(&first.image)?;
    let second = bench.reserved_disk(&scenario, &directory, "second.img")?;
    let disks = vec![first.clone(), second.clone()];
    let crashed = Crashed::new(bench, &scenario, disks, &directory, |_| Ok(()))?;
    crashed.expect_payload_line("target 0 lun 0: no reservation mark")?;
    crashed.expect_payload_line("complete after")?;
    ensure!(before == std::fs::read(&first.image)?, "the first disk was written to");
    bench.loader.save(&second.image, &directory)?;
    std::fs::remove_file(&second.image)?;
    Ok(())
}

#[test]
fn host_with_nothing_attached_is_named_and_the_machine_reboots() -> Result<()> {
    let bench = bench("x86_64")?;
    let scenario = Scenario { machine: "scsi".to_owned(), ..bench.scenario() };
    let crashed = refused(bench, "scsi/nothing", &scenario, Vec::new())?;
    crashed.expect_payload_line(": virtio-scsi with nothing attached")?;
    crashed.expect_payload_line("no disk that this payload can drive")?;
    Ok(())
}
