//! Dumps to SATA disks behind AHCI controllers. The kernels that crash have no driver for them: the
//! payload finds the controllers as firmware left them.

use anyhow::{Result, ensure};
use format::area::Layout;
use tests::core_file::CoreFile;
use tests::crash::{Crashed, Dumped, analyzer, bench, directory};
use tests::stories;
use xtask::dump::{Workbench, area_size};
use xtask::guest::Scenario;
use xtask::qemu::{Disk, sparse_image};

stories! {
    x86_64:
        every_byte_gets_to_a_disk_on_the_boards_controller,
        every_byte_gets_to_a_disk_on_a_controller_in_a_slot,
        second_port_is_taken_when_only_its_disk_has_a_mark,
        disk_that_fails_once_takes_all_that_follows,
        disk_that_refuses_a_write_is_left_with_a_reason,
        cd_drive_is_passed_over;
    aarch64:
        every_byte_gets_to_a_disk_on_a_controller_in_a_slot,
        every_byte_gets_to_a_disk_on_a_controller_that_uefi_has_seen,
        disk_that_fails_once_takes_all_that_follows;
}

fn on(machine: &str, bench: &Workbench) -> Scenario {
    Scenario { machine: machine.to_owned(), ..bench.scenario() }
}

fn every_byte_gets_to_a_disk_on_the_boards_controller(arch: &'static str) -> Result<()> {
    every_byte_gets_there(arch, "ahci", "00:1f.2 port 0: AHCI, 640 MiB")
}

fn every_byte_gets_to_a_disk_on_a_controller_in_a_slot(arch: &'static str) -> Result<()> {
    every_byte_gets_there(arch, "ahci-in-slot", " port 1: AHCI, 640 MiB")
}

fn every_byte_gets_to_a_disk_on_a_controller_that_uefi_has_seen(arch: &'static str) -> Result<()> {
    every_byte_gets_there(arch, "ahci-in-slot-uefi", " port 1: AHCI, 640 MiB")
}

fn every_byte_gets_there(arch: &'static str, machine: &str, line: &str) -> Result<()> {
    let bench = bench(arch)?;
    let dumped = Dumped::new(bench, &format!("ahci/{arch}-{machine}"), on(machine, bench))?;
    dumped.crashed.expect_payload_line(line)?;
    ensure!(dumped.crashed.end == "guest-reset", "no reboot but {}", dumped.crashed.end);
    ensure!(dumped.differences.is_empty(), "{:#?}", dumped.differences);
    let core = CoreFile::open(&dumped.dump)?;
    core.check_layout()?;
    let bytes: u64 = core.loads().map(|load| load.p_filesz).sum();
    ensure!(bytes > 480 << 20, "only {bytes} of 512 MiB are in the dump");
    Ok(())
}

fn second_port_is_taken_when_only_its_disk_has_a_mark(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("ahci/{arch}-second-port"))?;
    let scenario = on("ahci", bench);
    let first = sparse_image(&directory.join("first.img"), 64 << 20)?;
    let second = bench.reserved_disk(&scenario, &directory, "second.img")?;
    let disks = vec![first.clone(), second.clone()];
    let crashed = Crashed::new(bench, &scenario, disks, &directory, |_| Ok(()))?;
    crashed.expect_payload_line("port 0: no reservation mark")?;
    crashed.expect_payload_line("port 1: AHCI")?;
    crashed.expect_payload_line("complete after")?;
    let written = std::fs::read(&first.image)?.iter().any(|&byte| byte != 0);
    ensure!(!written, "the first disk was written to");
    bench.loader.save(&second.image, &directory)?;
    Ok(())
}

/// A disk whose sector `sector` cannot be written, once or ever.
fn faulty(disk: &Disk, sector: u64, once: &str) -> Result<Disk> {
    let faults = disk.image.with_extension("faults");
    let rule = format!(
        "[inject-error]\nevent = \"none\"\nerrno = \"5\"\n\
         sector = \"{sector}\"\nonce = \"{once}\"\n"
    );
    std::fs::write(&faults, rule)?;
    Ok(Disk { faults: Some(faults), ..disk.clone() })
}

fn disk_that_fails_once_takes_all_that_follows(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("ahci/{arch}-fails-once"))?;
    let scenario = on("ahci-in-slot", bench);
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let layout = Layout::new(area_size(&scenario)).expect("an area has a layout");
    let faulty = faulty(&disk, layout.card / 512, "on")?;
    let crashed = Crashed::new(bench, &scenario, vec![faulty], &directory, |_| Ok(()))?;
    crashed.expect_payload_line("the disk takes no crash card; the dump goes on")?;
    crashed.expect_payload_line("complete after")?;
    let dump = bench.loader.save(&disk.image, &directory)?;
    let log = analyzer()?.run(&["log"], &dump, None)?;
    ensure!(log.contains("sysrq triggered crash"), "{log}");
    Ok(())
}

fn disk_that_refuses_a_write_is_left_with_a_reason(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("ahci/{arch}-refuses"))?;
    let scenario = on("ahci", bench);
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let disks = vec![faulty(&disk, 204_800, "off")?];
    let crashed = Crashed::new(bench, &scenario, disks, &directory, |_| Ok(()))?;
    crashed.expect_payload_line("port 0: the disk reported an error")?;
    crashed.expect_payload_line("NO COMPLETE DUMP")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    let card = analyzer()?.run(&["card"], &disk.image, None)?;
    ensure!(card.contains("sysrq triggered crash"), "{card}");
    let shown = bench.loader.show(&disk.image)?;
    ensure!(shown.contains("the disk reported an error"), "{shown}");
    Ok(())
}

fn cd_drive_is_passed_over(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("ahci/{arch}-cd"))?;
    let scenario = on("ahci-with-cd", bench);
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let crashed = Crashed::new(bench, &scenario, vec![disk.clone()], &directory, |_| Ok(()))?;
    crashed.expect_payload_line("port 1: AHCI")?;
    crashed.expect_payload_line("complete after")?;
    let lines = crashed.payload_lines();
    ensure!(!lines.iter().any(|line| line.contains("port 0")), "{lines:#?}");
    bench.loader.save(&disk.image, &directory)?;
    Ok(())
}
