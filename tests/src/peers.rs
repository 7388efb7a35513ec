//! Other people's readers of dumps: what they make of ours.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use xtask::fixtures::Fixtures;
use xtask::process;

use crate::core_file::CoreFile;
use crate::trace::Frame;

/// Prints the crashed thread's frames as JSON.
const DRGN_SCRIPT: &str = "\
import sys, json, drgn
program = drgn.Program()
program.set_core_dump(sys.argv[1])
program.load_debug_info([sys.argv[2]])
trace = program.crashed_thread().stack_trace()
print(json.dumps([dict(name=f.name, pc=f.pc, inlined=f.is_inline) for f in trace]))
";

/// Offset of `release` in struct new_utsname: two arrays of 65 bytes lie before it
/// (include/uapi/linux/utsname.h).
const RELEASE_OFFSET: u64 = 2 * 65;

#[derive(Deserialize)]
struct DrgnFrame {
    name: String,
    pc: u64,
    inlined: bool,
}

/// The stack of the crashed thread as drgn sees it, down to the system call. Behind that drgn runs
/// on into user space.
///
/// # Errors
/// When drgn cannot be had or does not open the dump.
pub fn drgn(fixtures: &Fixtures, dump: &Path, vmlinux: &Path) -> Result<Vec<Frame>> {
    let python = fixtures.python("drgn")?.join("python3");
    let mut command = Command::new(python);
    let text = process::output(command.args(["-c", DRGN_SCRIPT]).arg(dump).arg(vmlinux))?;
    let frames: Vec<DrgnFrame> = serde_json::from_str(&text).context("drgn's output")?;
    let in_kernel = frames.into_iter().take_while(|frame| frame.pc >> 63 == 1);
    Ok(in_kernel
        .map(|frame| Frame {
            function: frame.name,
            offset: None,
            address: Some(frame.pc),
            inlined: frame.inlined,
        })
        .collect())
}

/// Has gdb open `dump` and checks what it reads through the virtual addresses: the registers of
/// the first CPU and the kernel's release string.
///
/// # Errors
/// When gdb cannot be had, does not open the dump or reads something else.
pub fn gdb(fixtures: &Fixtures, dump: &Path) -> Result<()> {
    let core = CoreFile::open(dump)?;
    let uts = u64::from_str_radix(&core.vmcoreinfo("SYMBOL(init_uts_ns)")?, 16)?;
    let name: u64 = core.vmcoreinfo("OFFSET(uts_namespace.name)")?.parse()?;
    let release = core.vmcoreinfo("OSRELEASE")?;
    let mut command = fixtures.packages("gdb")?.command("usr/bin/gdb")?;
    command.args(["-nx", "-batch", "-ex", "info registers rip", "-ex"]);
    command.arg(format!("x/s {:#x}", uts + name + RELEASE_OFFSET)).arg("-c").arg(dump);
    let text = process::output(&mut command)?;
    ensure!(text.contains(&format!("\"{release}\"")), "gdb does not find {release:?}:\n{text}");
    ensure!(text.contains("rip            0xffffffff"), "gdb shows no kernel address:\n{text}");
    Ok(())
}

/// The kernel's log, as makedumpfile takes it out of `dump`: what the kernel printed on its console,
/// without what an emulated serial line under load can do to it (characters that come twice).
///
/// # Errors
/// When makedumpfile cannot be had or does not do that.
pub fn kernel_log(fixtures: &Fixtures, dump: &Path) -> Result<String> {
    let work = tempfile::tempdir()?;
    let log = work.path().join("log");
    let mut command = fixtures.packages("makedumpfile")?.command("usr/bin/makedumpfile")?;
    process::run(command.arg("--dump-dmesg").arg(dump).arg(&log))?;
    Ok(String::from_utf8_lossy(&std::fs::read(log)?).into_owned())
}

/// Has makedumpfile filter and compress `dump` (`-d 31 -l`) and take the kernel's log out of it.
///
/// # Errors
/// When makedumpfile cannot be had or does not do that.
pub fn makedumpfile(fixtures: &Fixtures, dump: &Path) -> Result<()> {
    let tools = fixtures.packages("makedumpfile")?;
    let work = tempfile::tempdir()?;
    let filtered = work.path().join("filtered");
    let mut command = tools.command("usr/bin/makedumpfile")?;
    process::run(command.args(["-d", "31", "-l"]).arg(dump).arg(&filtered))?;
    let (all, left) = (dump.metadata()?.len(), filtered.metadata()?.len());
    ensure!(left > 1 << 20 && left < all / 4, "{left} of {all} bytes left after filtering");
    let log = kernel_log(fixtures, dump)?;
    ensure!(log.contains("Kernel panic - not syncing"), "no panic in the log:\n{log}");
    Ok(())
}

/// The functions in the backtrace of crash 9.
///
/// # Errors
/// When crash cannot be had, is older than 9, or does not open the dump.
pub fn crash(fixtures: &Fixtures, dump: &Path, vmlinux: &Path) -> Result<Vec<String>> {
    let tools = fixtures.packages("crash")?;
    let version = process::output(tools.command("usr/bin/crash")?.arg("--version"))?;
    let major = version.lines().find_map(|line| line.strip_prefix("crash "));
    ensure!(major.is_some_and(|major| major.starts_with("9.")), "not crash 9: {version}");

    let work = tempfile::tempdir()?;
    let commands = work.path().join("commands");
    std::fs::write(&commands, "bt\nquit\n")?;
    let mut command = tools.command("usr/bin/crash")?;
    command.args(["-s", "-i"]).arg(&commands).arg(vmlinux).arg(dump);
    command.env("HOME", work.path()).current_dir(work.path());
    let text = process::output(&mut command)?;
    let frames = text.lines().map(str::trim).filter(|line| line.starts_with('#'));
    // #3 [ff5aeb20c0013d88] sysrq_handle_crash at ffffffffb68a8a06
    let functions: Vec<String> =
        frames.filter_map(|line| line.split_whitespace().nth(2).map(str::to_owned)).collect();
    if functions.is_empty() {
        bail!("crash shows no backtrace:\n{text}");
    }
    Ok(functions)
}
