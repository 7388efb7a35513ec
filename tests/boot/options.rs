//! What the payload's options do, and the second way to PCI configuration space.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::core_file::CoreFile;
use tests::crash::{Crashed, bench, directory};
use tests::stories;
use xtask::dump::{DUMP, Workbench};
use xtask::guest::{Scenario, Trigger};
use xtask::target::Syscall;

stories! {
    x86_64:
        after_halt_the_machine_stays_and_every_byte_is_what_qemu_reads,
        after_poweroff_the_machine_is_off,
        board_without_memory_mapped_configuration_space_is_dumped_through_its_ports,
        panic_on_the_second_cpu_is_dumped_from_there;
    aarch64:
        after_poweroff_the_machine_is_off,
        panic_on_the_second_cpu_is_dumped_from_there;
}

/// How long a machine that should stay halted is watched for a reset.
const WATCH: Duration = Duration::from_secs(2);

fn after_halt_the_machine_stays_and_every_byte_is_what_qemu_reads(
    arch: &'static str,
) -> Result<()> {
    let bench = bench(arch)?;
    let scenario =
        Scenario { syscall: Syscall::Load, ..bench.scenario().appending("capture.after=halt") };
    let directory = directory(&format!("options/{arch}-halt"))?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], &directory)?;
    vm.expect(&["tinykdump: halted"], DUMP)?;
    ensure!(vm.wait_for_end(WATCH).is_err(), "the machine did not stay halted");
    vm.pause()?;
    let core = CoreFile::open(&disk.image)?;
    let differences = core.differences_to(&mut vm, &directory)?;
    ensure!(differences.is_empty(), "{differences:#?}");
    vm.quit()?;
    bench.loader.save(&disk.image, &directory)?;
    Ok(())
}

fn after_poweroff_the_machine_is_off(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = bench.scenario().appending("capture.after=poweroff");
    let crashed = dumps(bench, &format!("options/{arch}-poweroff"), &scenario)?;
    ensure!(crashed.end == "guest-shutdown", "not off but {}", crashed.end);
    Ok(())
}

fn board_without_memory_mapped_configuration_space_is_dumped_through_its_ports(
    arch: &'static str,
) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = Scenario { machine: "i440fx".to_owned(), ..bench.scenario() };
    let crashed = dumps(bench, &format!("options/{arch}-i440fx"), &scenario)?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    Ok(())
}

fn panic_on_the_second_cpu_is_dumped_from_there(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = Scenario { trigger: Trigger::SysrqOnCpu(1), ..bench.scenario() };
    let crashed = dumps(bench, &format!("options/{arch}-second-cpu"), &scenario)?;
    ensure!(crashed.text().contains("CPU: 1 PID"), "it did not crash on CPU 1");
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    Ok(())
}

fn dumps(bench: &Workbench, name: &str, scenario: &Scenario) -> Result<Crashed> {
    let directory = directory(name)?;
    let disk = bench.reserved_disk(scenario, &directory, "disk.img")?;
    let crashed = Crashed::new(bench, scenario, vec![disk.clone()], &directory, |_| Ok(()))?;
    crashed.expect_payload_line("complete after")?;
    bench.loader.save(&disk.image, &directory)?;
    std::fs::remove_file(&disk.image)?;
    Ok(crashed)
}
