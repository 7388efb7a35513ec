//! A command line that points the payload at garbage. What else can be wrong with an elfcorehdr is
//! tested on the host, in `capture`.

use anyhow::Result;
use tests::crash::{bench, directory, refused};
use tests::stories;

// With kexec_file_load on x86_64 the kernel puts its own `elfcorehdr=` before ours, and the last one
// wins. On aarch64 the kernel's is in the device tree, and the command line's comes before it.
stories! {
    x86_64:
        elfcorehdr_in_low_memory_that_is_no_elf_header_ends_in_a_reboot,
        elfcorehdr_where_no_memory_is_ends_in_a_reboot;
    aarch64:
        elfcorehdr_in_low_memory_that_is_no_elf_header_ends_in_a_reboot,
        elfcorehdr_where_no_memory_is_ends_in_a_reboot;
}

fn elfcorehdr_in_low_memory_that_is_no_elf_header_ends_in_a_reboot(
    arch: &'static str,
) -> Result<()> {
    let bench = bench(arch)?;
    // The second page of RAM.
    let address = if arch == "aarch64" { 0x4000_1000 } else { 0x1000 };
    let scenario = bench.scenario().appending(&format!("elfcorehdr={address:#x}"));
    let directory = directory(&format!("elfcorehdr/{arch}-garbage"))?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let crashed = refused(bench, &format!("elfcorehdr/{arch}-garbage"), &scenario, vec![disk])?;
    crashed.expect_payload_line("NO COMPLETE DUMP: no ELF header at elfcorehdr")?;
    Ok(())
}

fn elfcorehdr_where_no_memory_is_ends_in_a_reboot(arch: &'static str) -> Result<()> {
    // Far above the 512 MiB of RAM, and not a device.
    let bench = bench(arch)?;
    let scenario = bench.scenario().appending("elfcorehdr=0x3f00000000");
    let directory = directory(&format!("elfcorehdr/{arch}-hole"))?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let crashed = refused(bench, &format!("elfcorehdr/{arch}-hole"), &scenario, vec![disk])?;
    crashed.expect_payload_line("NO COMPLETE DUMP: ")?;
    Ok(())
}
