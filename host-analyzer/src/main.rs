//! The program on the engineer's desk: reads the dump of a dead kernel.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Parser, Subcommand};
use host_analyzer::commands::bt::TaskId;
use host_analyzer::commands::{bt, log, sys};
use host_analyzer::kernel::Kernel;
use host_analyzer::kernel::vmlinux::Vmlinux;
use host_analyzer::source::Dump;

/// Reads the dump of a dead Linux kernel: backtraces, log, overview.
///
/// Works from the dump alone; a vmlinux adds source lines and inlined functions.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Backtraces of kernel stacks
    ///
    /// Without a task, that of the task that crashed. Real registers come first: what the crashing
    /// and the stopped CPUs saved; for other tasks, what they saved when they stopped running.
    /// Frames are followed across interrupt and exception stacks to user mode.
    Bt(BtArgs),
    /// The kernel's log, as dmesg prints it
    Log(LogArgs),
    /// The machine and its crash at a glance
    Sys(DumpArgs),
}

#[derive(Args)]
struct DumpArgs {
    /// ELF core, or a reserved area: a disk, a partition, or an image of one
    dump: PathBuf,
    /// The kernel's vmlinux with debug information
    vmlinux: Option<PathBuf>,
}

#[derive(Args)]
struct BtArgs {
    /// ELF core, or a reserved area: a disk, a partition, or an image of one
    dump: PathBuf,
    /// The kernel's vmlinux with debug information, then tasks by PID or address
    #[arg(value_name = "VMLINUX | TASK")]
    rest: Vec<String>,
    /// The tasks that were running, one per CPU
    #[arg(short, long)]
    all_cpus: bool,
    /// Every task
    #[arg(long, conflicts_with = "all_cpus")]
    all_tasks: bool,
}

#[derive(Args)]
struct LogArgs {
    #[command(flatten)]
    files: DumpArgs,
    /// Show each record's level
    #[arg(short, long)]
    level: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output may have seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("host-analyzer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(command: &Command) -> anyhow::Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    match command {
        Command::Bt(args) => {
            let (vmlinux, tasks) = split(&args.rest)?;
            let options = bt::Options { tasks, all_cpus: args.all_cpus, all_tasks: args.all_tasks };
            let files = DumpArgs { dump: args.dump.clone(), vmlinux };
            with_kernel(&files, |kernel| bt::run(kernel, &options, &mut out))?;
        }
        Command::Log(args) => {
            let options = log::Options { level: args.level };
            with_kernel(&args.files, |kernel| log::run(kernel, &options, &mut out))?;
        }
        Command::Sys(files) => with_kernel(files, |kernel| sys::run(kernel, &mut out))?,
    }
    out.flush()?;
    Ok(())
}

fn with_kernel(
    files: &DumpArgs,
    command: impl FnOnce(&Kernel<'_>) -> Result<(), host_analyzer::Error>,
) -> anyhow::Result<()> {
    let dump = Dump::open(&files.dump)?;
    let vmlinux = files.vmlinux.as_deref().map(Vmlinux::open).transpose()?;
    if let Some(why) = vmlinux.as_ref().and_then(Vmlinux::no_lines) {
        eprintln!("host-analyzer: no lines and inlined functions from this vmlinux: {why}");
    }
    let kernel = Kernel::open(&dump, vmlinux.as_ref())?;
    Ok(command(&kernel)?)
}

/// Sorts the arguments after the dump: a first one that names no task is the vmlinux.
fn split(rest: &[String]) -> anyhow::Result<(Option<PathBuf>, Vec<TaskId>)> {
    let (mut vmlinux, mut tasks) = (None, Vec::new());
    for (index, text) in rest.iter().enumerate() {
        match text.parse() {
            Ok(task) => tasks.push(task),
            Err(_) if index == 0 => vmlinux = Some(PathBuf::from(text)),
            Err(error) => bail!("{error}"),
        }
    }
    Ok((vmlinux, tasks))
}

#[cfg(test)]
mod tests {
    use host_analyzer::VirtAddr;

    use super::*;

    fn split_of(rest: &[&str]) -> anyhow::Result<(Option<PathBuf>, Vec<TaskId>)> {
        split(&rest.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn command_line_makes_sense_to_clap() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn tasks_may_follow_the_dump_with_and_without_a_vmlinux() {
        let address = TaskId::Address(VirtAddr(0xff31_9b5a_811f_20c0));
        let (vmlinux, tasks) = split_of(&["vmlinux", "1", "ff319b5a811f20c0"]).unwrap();
        assert_eq!((vmlinux, tasks), (Some("vmlinux".into()), vec![TaskId::Pid(1), address]));
        let (vmlinux, tasks) = split_of(&["0xff319b5a811f20c0"]).unwrap();
        assert_eq!((vmlinux, tasks), (None, vec![address]));
    }

    #[test]
    fn second_word_that_names_no_task_is_refused() {
        assert!(split_of(&["vmlinux", "vmlinux"]).is_err());
    }
}
