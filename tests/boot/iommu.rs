//! IOMMUs that still translate for the dead kernel when the payload begins.

use anyhow::{Result, ensure};
use tests::crash::{Dumped, bench};
use tests::stories;
use xtask::guest::Scenario;

stories! {
    x86_64:
        vtd_is_switched_off,
        vtd_in_scalable_mode_is_switched_off,
        amd_vi_before_a_virtio_disk_is_switched_off,
        amd_vi_before_an_nvme_disk_is_switched_off;
    aarch64:
        smmu_of_a_device_tree_is_switched_off,
        smmu_of_acpi_is_switched_off;
}

/// What the kernel says when it uses an Intel unit, and when devices are behind one of whatever kind.
const VTD: &str = "DMAR: Intel(R) Virtualization Technology for Directed I/O";
const GROUPS: &str = "Adding to iommu group";

fn vtd_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(arch, on("vtd", arch)?, VTD)
}

fn vtd_in_scalable_mode_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(arch, on("vtd-scalable", arch)?, VTD)
}

fn amd_vi_before_a_virtio_disk_is_switched_off(arch: &'static str) -> Result<()> {
    amd_vi_is_switched_off(arch, "amd-vi")
}

fn amd_vi_before_an_nvme_disk_is_switched_off(arch: &'static str) -> Result<()> {
    amd_vi_is_switched_off(arch, "nvme-amd-vi")
}

fn amd_vi_is_switched_off(arch: &'static str, machine: &str) -> Result<()> {
    let kernel = "6_1-plain".to_owned();
    is_switched_off(arch, Scenario { kernel, ..on(machine, arch)? }, GROUPS)
}

fn smmu_of_a_device_tree_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(arch, on("smmu", arch)?, GROUPS)
}

fn smmu_of_acpi_is_switched_off(arch: &'static str) -> Result<()> {
    is_switched_off(arch, on("smmu-uefi", arch)?, GROUPS)
}

fn on(machine: &str, arch: &'static str) -> Result<Scenario> {
    let usual = bench(arch)?.scenario();
    Ok(Scenario { machine: machine.to_owned(), memory_mib: 256, ..usual })
}

/// The kernel says that it uses the IOMMU, and has it translate; the payload switches it off, and the dump
/// is what QEMU reads.
fn is_switched_off(arch: &'static str, scenario: Scenario, kernel_says: &str) -> Result<()> {
    let name = format!("iommu/{arch}-{}", scenario.machine);
    let dumped = Dumped::new(bench(arch)?, &name, scenario)?;
    let text = dumped.crashed.text();
    for said in [kernel_says, "iommu: Default domain type: Translated"] {
        ensure!(text.contains(said), "no IOMMU in use, no {said:?}:\n{text}");
    }
    let line = dumped.crashed.expect_payload_line("IOMMU 0x")?;
    ensure!(line.ends_with(": switched off"), "{line}");
    ensure!(dumped.differences.is_empty(), "{:#?}", dumped.differences);
    ensure!(dumped.crashed.end == "guest-reset", "no reboot but {}", dumped.crashed.end);
    Ok(())
}
