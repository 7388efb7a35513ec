//! Other people's readers of dumps: what they make of ours.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use xtask::fixtures::Fixtures;
use xtask::process;

use crate::core_file::CoreFile;
use crate::trace::Frame;

/// Opens the dump; what follows prints JSON.
const DRGN_OPEN: &str = "\
import sys, json, drgn
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.printk import get_dmesg
program = drgn.Program()
program.set_core_dump(sys.argv[1])
program.load_debug_info([sys.argv[2]])
def frames(trace):
    return [dict(name=f.name, pc=f.pc, inlined=f.is_inline) for f in trace]
";

/// The crashed thread's frames.
const DRGN_CRASHED: &str = "print(json.dumps(frames(program.crashed_thread().stack_trace())))";

/// The frames of every task that was not running, by the task's address.
const DRGN_SLEEPING: &str = "\
running = {per_cpu(program['runqueues'], cpu).curr.value_() for cpu in for_each_online_cpu(program)}
tasks = [task for task in for_each_task(program) if task.value_() not in running]
print(json.dumps({task.value_(): frames(program.stack_trace(task)) for task in tasks}))
";

/// Every task but the idle ones: PID, name, state as ps shows it, PID of the parent process, KiB mapped
/// and resident (`None` without memory).
const DRGN_TASKS: &str = "\
from drgn.helpers.linux.sched import task_state_to_char
def resident(mm):
    try:
        counts = [max(mm.rss_stat[i].count.value_(), 0) for i in (0, 1, 3)]
    except TypeError:
        counts = [max(mm.rss_stat.count[i].counter.value_(), 0) for i in (0, 1, 3)]
    return sum(counts) * 4
def memory(mm):
    return (mm.total_vm.value_() * 4, resident(mm)) if mm else None
print(json.dumps([(t.pid.value_(), t.comm.string_().decode(errors='replace'),
                   task_state_to_char(t), t.real_parent.tgid.value_(), memory(t.mm))
                  for t in for_each_task(program) if t.pid]))
";

/// Every module: name, address and size, how many use it, and which modules do.
const DRGN_MODULES: &str = "\
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.module import for_each_module
def place(module):
    try:
        parts = [module.mem[i] for i in range(module.mem.type_.length)]
    except AttributeError:
        parts = [module.core_layout, module.init_layout]
    return parts[0].base.value_(), sum(part.size.value_() for part in parts)
def users(module):
    uses = list_for_each_entry('struct module_use', module.source_list.address_of_(), 'source_list')
    return [use.source.name.string_().decode() for use in uses]
print(json.dumps([(m.name.string_().decode(), *place(m), m.refcnt.counter.value_() - 1, users(m))
                  for m in for_each_module(program)]))
";

/// The kernel's log.
const DRGN_LOG: &str = "print(json.dumps(get_dmesg(program).decode(errors='replace')))";

/// Offset of `release` in struct new_utsname: two arrays of 65 bytes lie before it
/// (include/uapi/linux/utsname.h).
const RELEASE_OFFSET: u64 = 2 * 65;

#[derive(Deserialize)]
struct DrgnFrame {
    name: String,
    pc: u64,
    inlined: bool,
}

/// The stack of the crashed thread as drgn sees it.
///
/// # Errors
/// When drgn cannot be had or does not open the dump.
pub fn drgn(fixtures: &Fixtures, dump: &Path, vmlinux: &Path) -> Result<Vec<Frame>> {
    drgn_says(fixtures, DRGN_CRASHED, dump, vmlinux).map(in_kernel)
}

/// The stacks of all tasks that were not running as drgn sees them, by the task's address.
///
/// # Errors
/// When drgn cannot be had or does not open the dump.
pub fn drgn_sleeping(
    fixtures: &Fixtures,
    dump: &Path,
    vmlinux: &Path,
) -> Result<BTreeMap<u64, Vec<Frame>>> {
    let tasks: BTreeMap<u64, _> = drgn_says(fixtures, DRGN_SLEEPING, dump, vmlinux)?;
    Ok(tasks.into_iter().map(|(task, frames)| (task, in_kernel(frames))).collect())
}

/// A task: PID, name, letter of the state, PID of the parent process, KiB mapped and resident.
pub type DrgnTask = (u32, String, String, u32, Option<(u64, u64)>);

/// A module: name, address, size, how many use it, and which modules do.
pub type DrgnModule = (String, u64, u64, i64, Vec<String>);

/// Every task but the idle ones, as drgn sees them.
///
/// # Errors
/// When drgn cannot be had or does not open the dump.
pub fn drgn_tasks(fixtures: &Fixtures, dump: &Path, vmlinux: &Path) -> Result<Vec<DrgnTask>> {
    drgn_says(fixtures, DRGN_TASKS, dump, vmlinux)
}

/// Every module, as drgn sees them.
///
/// # Errors
/// When drgn cannot be had or does not open the dump.
pub fn drgn_modules(fixtures: &Fixtures, dump: &Path, vmlinux: &Path) -> Result<Vec<DrgnModule>> {
    drgn_says(fixtures, DRGN_MODULES, dump, vmlinux)
}

/// The kernel's log, as drgn takes it out of `dump`: what the kernel printed on its console,
/// without what an emulated serial line under load can do to it (characters that come twice).
///
/// # Errors
/// When drgn cannot be had or does not open the dump.
pub fn kernel_log(fixtures: &Fixtures, dump: &Path, vmlinux: &Path) -> Result<String> {
    drgn_says(fixtures, DRGN_LOG, dump, vmlinux)
}

pub(crate) fn drgn_says<T: DeserializeOwned>(
    fixtures: &Fixtures,
    script: &str,
    dump: &Path,
    vmlinux: &Path,
) -> Result<T> {
    let python = fixtures.python("drgn")?.join("python3");
    let script = format!("{DRGN_OPEN}{script}");
    let mut command = Command::new(python);
    let text = process::output(command.args(["-c", &script]).arg(dump).arg(vmlinux))?;
    serde_json::from_str(&text).context("drgn's output")
}

/// The frames down to the system call. Behind that drgn runs on into user space.
fn in_kernel(frames: Vec<DrgnFrame>) -> Vec<Frame> {
    let in_kernel = frames.into_iter().take_while(|frame| frame.pc >> 63 == 1);
    in_kernel
        .map(|frame| Frame {
            function: frame.name,
            module: None,
            offset: None,
            address: Some(frame.pc),
            inlined: frame.inlined,
        })
        .collect()
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
    let tools = fixtures.packages("gdb")?;
    let mut command = tools.command("usr/bin/gdb-multiarch")?;
    // It starts Python, which wants its library: PYTHONHOME/lib/python3.11.
    let library = tools.file("usr/lib/python3.11/os.py")?;
    command.env("PYTHONHOME", library.ancestors().nth(3).context("no Python home")?);
    command.args(["-nx", "-batch", "-ex", "print/x $pc", "-ex"]);
    command.arg(format!("x/s {:#x}", uts + name + RELEASE_OFFSET)).arg("-c").arg(dump);
    let text = process::output(&mut command)?;
    ensure!(text.contains(&format!("\"{release}\"")), "gdb does not find {release:?}:\n{text}");
    ensure!(text.contains("$1 = 0xffff"), "gdb shows no kernel address:\n{text}");
    Ok(())
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
    let log = work.path().join("log");
    let mut command = tools.command("usr/bin/makedumpfile")?;
    process::run(command.arg("--dump-dmesg").arg(dump).arg(&log))?;
    let log = String::from_utf8_lossy(&std::fs::read(log)?).into_owned();
    ensure!(log.contains("Kernel panic - not syncing"), "no panic in the log:\n{log}");
    Ok(())
}

/// Has makedumpfile make `into` of `dump` by these options. With `-F` it writes a flattened file, with `-R`
/// it reads one.
///
/// # Errors
/// When makedumpfile cannot be had or does not do that.
pub fn convert(fixtures: &Fixtures, options: &[&str], dump: &Path, into: &Path) -> Result<()> {
    let tools = fixtures.packages("makedumpfile")?;
    let mut command = tools.command("usr/bin/makedumpfile")?;
    command.args(options);
    if options.contains(&"-R") {
        command.stdin(File::open(dump)?).arg(into);
    } else if options.contains(&"-F") {
        command.arg(dump).stdout(File::create(into)?);
    } else {
        command.arg(dump).arg(into);
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}", process::failure(&command, &output));
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
