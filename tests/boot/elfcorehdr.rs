//! A command line that points the payload at garbage. What else can be wrong with an elfcorehdr is
//! tested on the host, in `capture`.

use anyhow::Result;
use tests::crash::{bench, directory, refused};
use xtask::guest::{Scenario, Syscall};

/// With kexec_file_load the kernel puts its own `elfcorehdr=` before ours, and the last one wins.
fn scenario(elfcorehdr: &str) -> Scenario {
    Scenario {
        syscall: Syscall::FileLoad,
        append: format!("console=ttyS0,115200n8 elfcorehdr={elfcorehdr}"),
        ..Scenario::default()
    }
}

#[test]
fn elfcorehdr_in_low_memory_that_is_no_elf_header_ends_in_a_reboot() -> Result<()> {
    let scenario = scenario("0x1000");
    let directory = directory("elfcorehdr/garbage")?;
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    let crashed = refused("elfcorehdr/garbage", &scenario, vec![disk])?;
    crashed.expect_payload_line("NO COMPLETE DUMP: no ELF header at elfcorehdr")?;
    Ok(())
}

#[test]
fn elfcorehdr_where_no_memory_is_ends_in_a_reboot() -> Result<()> {
    // Far above the 512 MiB of RAM, and not a device.
    let scenario = scenario("0x3f00000000");
    let directory = directory("elfcorehdr/hole")?;
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    let crashed = refused("elfcorehdr/hole", &scenario, vec![disk])?;
    crashed.expect_payload_line("NO COMPLETE DUMP: ")?;
    Ok(())
}
