//! IOMMUs that still translate for the dead kernel when the payload begins.

use anyhow::{Result, ensure};
use tests::crash::{Dumped, bench};
use tests::stories;
use xtask::guest::Scenario;

stories! {
    x86_64:
        vtd_is_switched_off,
        vtd_in_scalable_mode_is_switched_off;
    aarch64:
        smmu_of_a_device_tree_is_switched_off,
        smmu_of_acpi_is_switched_off;
}

fn vtd_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(arch, "vtd", "DMAR: Intel(R) Virtualization Technology for Directed I/O")
}

fn vtd_in_scalable_mode_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(
        arch,
        "vtd-scalable",
        "DMAR: Intel(R) Virtualization Technology for Directed I/O",
    )
}

fn smmu_of_a_device_tree_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(arch, "smmu", "Adding to iommu group")
}

fn smmu_of_acpi_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(arch, "smmu-uefi", "Adding to iommu group")
}

/// The kernel says that it uses the IOMMU of `machine`; the payload switches it off, and the dump is what
/// QEMU reads.
fn is_switched_off(arch: &'static str, machine: &str, kernel_says: &str) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = Scenario { machine: machine.to_owned(), memory_mib: 256, ..bench.scenario() };
    let dumped = Dumped::new(bench, &format!("iommu/{arch}-{machine}"), scenario)?;
    let text = dumped.crashed.text();
    ensure!(text.contains(kernel_says), "no IOMMU in use:\n{text}");
    let line = dumped.crashed.expect_payload_line("IOMMU ")?;
    ensure!(line.ends_with(": switched off"), "{line}");
    ensure!(dumped.differences.is_empty(), "{:#?}", dumped.differences);
    ensure!(dumped.crashed.end == "guest-reset", "no reboot but {}", dumped.crashed.end);
    Ok(())
}
