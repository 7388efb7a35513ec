//! `cargo xtask bench-devices`: how fast the payload writes a dump against how fast the guest's own
//! Linux writes as much to the same virtual disk, for every kind of disk that the payload can drive.

use std::path::PathBuf;

use anyhow::Result;

use super::payload::{self, LinuxWrites, RUNS, Rates};
use crate::dump::Workbench;
use crate::fixtures::DebugInfo;
use crate::guest::Scenario;
use crate::workspace;

/// The guests' memory, and so what both write, in MiB.
const MEMORY_MIB: u32 = 1024;

/// Half of the memory has something in it, as a machine in use has.
const FILE_MIB: u32 = MEMORY_MIB / 2;

/// A kind of disk.
struct Device {
    name: &'static str,
    arch: &'static str,
    /// The machine in the target's file that has it.
    machine: &'static str,
    /// Linux's name for the disk.
    disk: &'static str,
    /// The kernel that has a driver for it, if it is not the usual one.
    kernel: Option<&'static str>,
    /// The driver's modules, in the order in which they are loaded.
    modules: &'static [&'static str],
}

const fn device(
    name: &'static str,
    arch: &'static str,
    machine: &'static str,
    disk: &'static str,
) -> Device {
    Device { name, arch, machine, disk, kernel: None, modules: &[] }
}

const DEVICES: &[Device] = &[
    device("virtio-blk, modern", "x86_64", "virtio-blk-modern", "/dev/vda"),
    device("virtio-blk, transitional", "x86_64", "usual", "/dev/vda"),
    device("virtio-scsi", "x86_64", "scsi", "/dev/sda"),
    device("NVMe, 512-byte blocks", "x86_64", "nvme", "/dev/nvme0n1"),
    device("NVMe, 4096-byte blocks", "x86_64", "nvme-4k", "/dev/nvme0n1"),
    Device {
        kernel: Some("6_1-plain"),
        modules: &[
            "drivers/scsi/scsi_common",
            "drivers/scsi/scsi_mod",
            "drivers/ata/libata",
            "drivers/ata/libahci",
            "drivers/ata/ahci",
            "crypto/crct10dif_common",
            "crypto/crct10dif_generic",
            "lib/crc-t10dif",
            "lib/crc64",
            "crypto/crc64_rocksoft_generic",
            "lib/crc64-rocksoft",
            "block/t10-pi",
            "drivers/scsi/sd_mod",
        ],
        ..device("AHCI", "x86_64", "ahci", "/dev/sda")
    },
    device("virtio-blk over PCI", "aarch64", "usual", "/dev/vda"),
    device("virtio-blk over MMIO", "aarch64", "max-el1-gic3-mmio2", "/dev/vda"),
    device("NVMe, 512-byte blocks", "aarch64", "nvme", "/dev/nvme0n1"),
];

/// Measures and prints a table; of the devices whose name has `only` in it, if that is given.
///
/// # Errors
/// When a guest does not do what it should.
pub fn run(only: Option<&str>) -> Result<()> {
    let is_wanted = |device: &&Device| {
        only.is_none_or(|only| format!("{} {}", device.arch, device.name).contains(only))
    };
    println!("{RUNS} guests for each row; medians of their rates in MB/s, all runs in brackets;");
    println!("half of their memory is not zeros");
    payload::explain(MEMORY_MIB, MEMORY_MIB);
    for arch in ["x86_64", "aarch64"] {
        let devices: Vec<_> =
            DEVICES.iter().filter(|device| device.arch == arch).filter(is_wanted).collect();
        if devices.is_empty() {
            continue;
        }
        let bench = Workbench::new(arch)?;
        println!("| {arch:<24} | Linux, dd             | payload               | ratio |");
        println!("|{:-<26}|{:-<23}|{:-<23}|-------|", "", "", "");
        for device in devices {
            measure(&bench, device)?;
        }
    }
    Ok(())
}

fn measure(bench: &Workbench, device: &Device) -> Result<()> {
    let directory = workspace().join("target/bench-devices").join(bench.target.arch.as_str());
    let directory = directory.join(device.machine);
    let (scenario, linux) = (scenario(bench, device)?, linux_writes(device));
    let rates: Result<Vec<Rates>> =
        (0..RUNS).map(|_| payload::measure(bench, &scenario, &linux, &directory)).collect();
    let rates = rates?;
    let (linux, linux_shown) = shown(rates.iter().map(|it| it.linux));
    let (payload, payload_shown) = shown(rates.iter().map(|it| it.payload));
    println!(
        "| {:<24} | {linux_shown:<21} | {payload_shown:<21} | {:5.2} |",
        device.name,
        payload / linux
    );
    Ok(())
}

fn linux_writes(device: &Device) -> LinuxWrites {
    LinuxWrites { file_mib: FILE_MIB, times: MEMORY_MIB / FILE_MIB, disk: device.disk }
}

fn scenario(bench: &Workbench, device: &Device) -> Result<Scenario> {
    let usual = bench.scenario();
    let scenario = Scenario {
        machine: device.machine.to_owned(),
        memory_mib: MEMORY_MIB,
        kernel: device.kernel.map_or(usual.kernel.clone(), str::to_owned),
        ..usual
    };
    let kernel = bench.kernel(&scenario, DebugInfo::No)?;
    let module = |name: &&str| kernel.modules.join(format!("{name}.ko"));
    let modules: Vec<PathBuf> = device.modules.iter().map(module).collect();
    Ok(Scenario { modules, ..scenario })
}

/// The median of the rates, and how they are printed.
fn shown(rates: impl Iterator<Item = f64>) -> (f64, String) {
    let rates: Vec<f64> = rates.collect();
    let each: Vec<_> = rates.iter().map(|rate| format!("{rate:.0}")).collect();
    let mut sorted = rates;
    sorted.sort_unstable_by(f64::total_cmp);
    let median = super::median(&sorted);
    (median, format!("{median:>4.0} ({})", each.join(" ")))
}
