//! Dumps over every kind of line that a machine may have beside its console.

use std::path::Path;

use anyhow::{Result, ensure};
use tests::crash::{Crashed, analyzer, bench, directory, receive_saved};
use tests::stories;
use tests::trace::{agree, from_crash, of_analyzer, of_kernel};
use xtask::guest::Scenario;
use xtask::qemu::SecondLine;

stories! {
    x86_64:
        virtio_console_on_pci,
        uart_named_by_linux,
        uart_named_by_its_registers,
        console_named_by_its_registers;
    aarch64:
        virtio_console_on_pci,
        virtio_console_on_mmio,
        console_named_by_its_registers;
}

/// A line that goes to a file.
const ON_PCI: SecondLine = &["virtio-serial-pci", "virtconsole,chardev=line"];
const ON_MMIO: SecondLine = &["virtio-serial-device", "virtconsole,chardev=line"];
const UART: SecondLine = &["isa-serial,index=1,chardev=line"];

fn virtio_console_on_pci(arch: &'static str) -> Result<()> {
    takes_a_dump(arch, "hvc-pci", "hvc0", Some(ON_PCI))
}

fn virtio_console_on_mmio(arch: &'static str) -> Result<()> {
    takes_a_dump(arch, "hvc-mmio", "hvc0", Some(ON_MMIO))
}

fn uart_named_by_linux(arch: &'static str) -> Result<()> {
    takes_a_dump(arch, "linux-name", "ttyS1,115200n8", Some(UART))
}

fn uart_named_by_its_registers(arch: &'static str) -> Result<()> {
    takes_a_dump(arch, "registers", "uart8250,io,0x2f8,115200n8", Some(UART))
}

fn console_named_by_its_registers(arch: &'static str) -> Result<()> {
    let name = if arch == "x86_64" { "uart8250,io,0x3f8" } else { "pl011,0x9000000" };
    takes_a_dump(arch, "console", name, None)
}

/// The dump that comes over `port` has the backtrace that the kernel printed. Over a line of its own comes
/// the crash card before it, as it does on the console.
fn takes_a_dump(
    arch: &'static str,
    name: &str,
    port: &str,
    second_line: Option<SecondLine>,
) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("lines/{arch}-{name}"))?;
    let scenario = Scenario { memory_mib: 256, second_line, ..bench.scenario() }
        .appending(&format!("capture.to=serial:{port} capture.serial=minimal"));
    let vmlinux = bench.vmlinux(&scenario)?;
    let crashed = Crashed::new(bench, &scenario, Vec::new(), &directory, |_| Ok(()))?;
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);

    let (console, second) = (directory.join("serial.log"), directory.join("second-line.log"));
    let line = if second_line.is_some() { second } else { console.clone() };
    let dump = directory.join("dump.elf");
    receive_saved(&line, &dump)?;
    let said = analyzer()?.run(&["bt"], &dump, Some(&vmlinux))?;
    let (ours, printed) = (of_analyzer(&said)?, of_kernel(&crashed.text())?);
    let agree = agree(from_crash(&ours)?, from_crash(&printed)?, &vmlinux)?;
    ensure!(agree, "{said}\nthe kernel printed\n{printed:#?}");
    let card = |line: &Path| analyzer()?.run(&["card"], line, None);
    ensure!(card(&line)? == card(&console)?, "two different cards");
    Ok(())
}
