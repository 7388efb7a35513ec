//! What the payload's options do, and the second way to PCI configuration space.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::core_file::CoreFile;
use tests::crash::{Crashed, bench, directory};
use xtask::dump::DUMP;
use xtask::guest::{Scenario, Syscall, Trigger};
use xtask::qemu::Board;

/// How long a machine that should stay halted is watched for a reset.
const WATCH: Duration = Duration::from_secs(2);

#[test]
fn after_halt_the_machine_stays_and_every_byte_is_what_qemu_reads() -> Result<()> {
    let scenario = Scenario {
        syscall: Syscall::Load,
        append: "console=ttyS0,115200n8 capture.after=halt".to_owned(),
        ..Scenario::default()
    };
    let directory = directory("options/halt")?;
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    let mut vm = bench()?.guest().boot(&scenario, vec![disk.clone()], &directory)?;
    vm.expect(&["tinykdump: halted"], DUMP)?;
    ensure!(vm.wait_for_end(WATCH).is_err(), "the machine did not stay halted");
    vm.pause()?;
    let core = CoreFile::open(&disk.image)?;
    let differences = core.differences_to(&mut vm, &directory)?;
    ensure!(differences.is_empty(), "{differences:#?}");
    vm.quit()?;
    bench()?.loader.save(&disk.image, &directory)?;
    Ok(())
}

#[test]
fn after_poweroff_the_machine_is_off() -> Result<()> {
    let scenario = Scenario {
        append: "console=ttyS0,115200n8 capture.after=poweroff".to_owned(),
        ..Scenario::default()
    };
    let crashed = dumps("options/poweroff", &scenario)?;
    ensure!(crashed.end == "guest-shutdown", "not off but {}", crashed.end);
    Ok(())
}

#[test]
fn board_without_memory_mapped_configuration_space_is_dumped_through_its_ports() -> Result<()> {
    let scenario = Scenario { board: Board::I440fx, ..Scenario::default() };
    let crashed = dumps("options/i440fx", &scenario)?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    Ok(())
}

#[test]
fn panic_on_the_second_cpu_is_dumped_from_there() -> Result<()> {
    let scenario = Scenario { trigger: Trigger::SysrqOnCpu(1), ..Scenario::default() };
    let crashed = dumps("options/second-cpu", &scenario)?;
    ensure!(crashed.text().contains("CPU: 1 PID"), "it did not crash on CPU 1");
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    Ok(())
}

fn dumps(name: &str, scenario: &Scenario) -> Result<Crashed> {
    let directory = directory(name)?;
    let disk = bench()?.reserved_disk(scenario, &directory, "disk.img")?;
    let crashed = Crashed::new(bench()?, scenario, vec![disk.clone()], &directory, |_| Ok(()))?;
    crashed.expect_payload_line("complete after")?;
    bench()?.loader.save(&disk.image, &directory)?;
    std::fs::remove_file(&disk.image)?;
    Ok(crashed)
}
