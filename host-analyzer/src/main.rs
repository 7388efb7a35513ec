//! The program on the engineer's desk: reads the dump of a dead kernel.

#![forbid(unsafe_code)]

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Parser, Subcommand};
use host_analyzer::commands::bt::TaskId;
use host_analyzer::commands::{bt, card, log, modules, ps, receive, sys};
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

/// What each of them does is said where its options are.
#[derive(Subcommand)]
enum Command {
    Bt(BtArgs),
    Card(card::Options),
    Log(LogArgs),
    Mod(ModArgs),
    Ps(PsArgs),
    Receive(receive::Options),
    Sys(SysArgs),
}

#[derive(Args)]
struct Files {
    /// ELF core or kdump-compressed file, flattened or not, or a reserved area: a disk, a partition, or
    /// an image of one
    dump: PathBuf,
    /// The kernel's vmlinux with debug information
    vmlinux: Option<PathBuf>,
}

#[derive(Args)]
struct BtArgs {
    /// ELF core or kdump-compressed file, flattened or not, or a reserved area: a disk, a partition, or
    /// an image of one
    dump: PathBuf,
    /// The kernel's vmlinux with debug information, then tasks by PID or address
    #[arg(value_name = "VMLINUX | TASK")]
    rest: Vec<String>,
    #[command(flatten)]
    options: bt::Options,
}

#[derive(Args)]
struct LogArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    options: log::Options,
}

#[derive(Args)]
struct ModArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    options: modules::Options,
}

#[derive(Args)]
struct PsArgs {
    /// ELF core or kdump-compressed file, flattened or not, or a reserved area: a disk, a partition, or
    /// an image of one
    dump: PathBuf,
    /// The kernel's vmlinux (an existing file), then tasks by PID, address or name
    #[arg(value_name = "VMLINUX | TASK")]
    rest: Vec<String>,
    #[command(flatten)]
    options: ps::Options,
}

#[derive(Args)]
struct SysArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    options: sys::Options,
}

/// Exit status of `receive` when something is missing.
const MISSING: u8 = 2;

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(code) => code,
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

fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let mut out = BufWriter::new(std::io::stdout().lock());
    match command {
        Command::Bt(args) => {
            let (vmlinux, tasks) = split(&args.rest)?;
            let options = bt::Options { tasks, ..args.options.clone() };
            let files = Files { dump: args.dump.clone(), vmlinux };
            with_kernel(&files, |kernel| bt::run(kernel, &options, &mut out))?;
        }
        Command::Card(options) => card::run(options, &mut out)?,
        Command::Log(args) => {
            with_kernel(&args.files, |kernel| log::run(kernel, &args.options, &mut out))?;
        }
        Command::Mod(args) => {
            with_kernel(&args.files, |kernel| modules::run(kernel, &args.options, &mut out))?;
        }
        Command::Ps(args) => {
            let is_file = |text: &String| text.contains('/') || Path::new(text).is_file();
            let vmlinux = args.rest.first().filter(|text| is_file(text)).map(PathBuf::from);
            let tasks = args.rest[usize::from(vmlinux.is_some())..].to_vec();
            let options = ps::Options { tasks, ..args.options.clone() };
            let files = Files { dump: args.dump.clone(), vmlinux };
            with_kernel(&files, |kernel| ps::run(kernel, &options, &mut out))?;
        }
        Command::Receive(options) => {
            if !receive::run(options, &mut out)? {
                code = ExitCode::from(MISSING);
            }
        }
        Command::Sys(args) => {
            with_kernel(&args.files, |kernel| sys::run(kernel, &args.options, &mut out))?;
        }
    }
    out.flush()?;
    Ok(code)
}

fn with_kernel(
    files: &Files,
    command: impl FnOnce(&Kernel<'_>) -> Result<(), host_analyzer::Error>,
) -> anyhow::Result<()> {
    let dump = Dump::open(&files.dump)?;
    let vmlinux = files.vmlinux.as_deref().map(Vmlinux::open).transpose()?;
    let kernel = Kernel::open(&dump, vmlinux.as_ref())?;
    if let Some(why) = vmlinux.as_ref().and_then(Vmlinux::no_lines) {
        eprintln!("host-analyzer: no lines and inlined functions from this vmlinux: {why}");
    }
    if let Some(how) = kernel.scanned() {
        eprintln!("host-analyzer: {how}");
    }
    let outcome = command(&kernel);
    let borrowed = kernel.borrowed();
    if !borrowed.is_empty() {
        eprintln!("host-analyzer: not in the dump, taken from vmlinux: {}", borrowed.join(", "));
    }
    Ok(outcome?)
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
