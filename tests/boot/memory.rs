//! How little memory it takes: the payload's size does not grow with the machine.

use anyhow::{Result, ensure};
use tests::core_file::CoreFile;
use tests::crash::{Crashed, bench, directory};
use tests::stories;
use xtask::guest::Scenario;
use xtask::target::Syscall;

/// What the README promises, in KiB.
const LARGEST_IMAGE: u64 = 384;

stories! {
    x86_64: capture_bin_is_at_most_384_kib;
    aarch64: capture_bin_is_at_most_384_kib;
}

fn capture_bin_is_at_most_384_kib(arch: &'static str) -> Result<()> {
    let size = bench(arch)?.payload.metadata()?.len();
    println!("capture.bin has {size} bytes");
    ensure!(size <= LARGEST_IMAGE << 10, "capture.bin has {size} bytes");
    Ok(())
}

#[test]
fn a_machine_of_16_gib_is_dumped_from_2_mib_by_kexec_load() -> Result<()> {
    dumps("x86_64", "16-gib-load", Syscall::Load, "2M", 16 << 10)
}

#[test]
fn a_machine_of_16_gib_is_dumped_from_2_mib_by_kexec_file_load() -> Result<()> {
    dumps("x86_64", "16-gib-file-load", Syscall::FileLoad, "2M", 16 << 10)
}

#[test]
fn an_arm64_machine_of_8_gib_is_dumped_from_2_mib() -> Result<()> {
    dumps("aarch64", "arm64-8-gib", Syscall::Load, "2M", 8 << 10)
}

/// kexec_load takes 640 KiB of the region for its copy of low memory.
#[test]
fn kexec_load_needs_no_more_than_1920_kib() -> Result<()> {
    dumps("x86_64", "1920-kib-load", Syscall::Load, "1920K", 512)
}

#[test]
fn kexec_file_load_needs_no_more_than_1280_kib() -> Result<()> {
    dumps("x86_64", "1280-kib-file-load", Syscall::FileLoad, "1280K", 512)
}

/// Dumps a machine with `memory_mib` of RAM from a region of `crashkernel`. The disk image keeps
/// its holes, so that RAM which the guest never touched takes no space. Of the memory a sample is
/// compared with what QEMU reads.
fn dumps(
    arch: &'static str,
    name: &str,
    syscall: Syscall,
    crashkernel: &str,
    memory_mib: u32,
) -> Result<()> {
    let bench = bench(arch)?;
    let scenario =
        Scenario { syscall, crashkernel: crashkernel.to_owned(), memory_mib, ..bench.scenario() };
    let directory = directory(&format!("memory/{name}"))?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let disks = vec![disk.clone()];
    let mut differences = Vec::new();
    let crashed = Crashed::new(bench, &scenario, disks, &directory, |vm| {
        let core = CoreFile::open(&disk.image)?;
        differences = core.sampled_differences_to(vm, &directory)?;
        Ok(())
    })?;
    println!("{}", crashed.expect_payload_line("complete after")?);
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);

    ensure!(differences.is_empty(), "{differences:#?}");

    let core = CoreFile::open(&disk.image)?;
    core.check_layout()?;
    let bytes: u64 = core.loads().map(|load| load.p_filesz).sum();
    let least = (u64::from(memory_mib) << 20) / 100 * 95;
    ensure!(bytes >= least, "{} of {memory_mib} MiB are in the dump", bytes >> 20);
    std::fs::remove_file(&disk.image)?;
    Ok(())
}
