//! The program on the engineer's desk: reads the dump of a dead kernel.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{anyhow, bail};
use clap::{Args, Parser, Subcommand};
use host_analyzer::commands::bt::TaskId;
use host_analyzer::commands::{
    bt, card, disassemble, files, list, log, modules, ps, pte, ptov, read, receive, search,
    structure, symbol, sys, task, vm, vmcoreinfo, vtop, whatis,
};
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
    Bt(WithWords<bt::Options>),
    Card(card::Options),
    Dis(WithWords<disassemble::Options>),
    Files(WithWords<files::Options>),
    List(WithWords<list::Options>),
    Log(WithWords<log::Options>),
    Mod(WithWords<modules::Options>),
    Ps(WithWords<ps::Options>),
    Pte(WithWords<pte::Options>),
    Ptov(WithWords<ptov::Options>),
    Rd(WithWords<read::Options>),
    Receive(receive::Options),
    Search(WithWords<search::Options>),
    #[command(alias = "union")]
    Struct(WithWords<structure::Options>),
    Sym(WithWords<symbol::Options>),
    Sys(WithWords<sys::Options>),
    Task(WithWords<task::Options>),
    Vm(WithWords<vm::Options>),
    Vmcoreinfo(WithWords<vmcoreinfo::Options>),
    Vtop(WithWords<vtop::Options>),
    Whatis(WithWords<whatis::Options>),
}

// A dump, perhaps its kernel, and what a command is to tell about. A doc comment here would be every
// command's --help.
#[derive(Args)]
struct WithWords<O: Args> {
    /// ELF core or kdump-compressed file, flattened or not, or a reserved area: a disk, a partition, or
    /// an image of one
    dump: PathBuf,
    /// The kernel's vmlinux with debug information, then what the command is about
    #[arg(value_name = "VMLINUX | WORD", allow_hyphen_values = false)]
    rest: Vec<String>,
    #[command(flatten)]
    options: O,
}

impl<O: Args> WithWords<O> {
    /// The vmlinux, if the first word names one, and the others.
    fn split(&self) -> (Option<&Path>, &[String]) {
        match self.rest.split_first() {
            Some((first, rest)) if names_a_file(first) => (Some(Path::new(first)), rest),
            _ => (None, &self.rest),
        }
    }

    /// The same, for a command that takes no words.
    fn no_words(&self) -> anyhow::Result<Option<&Path>> {
        match self.split() {
            (vmlinux, []) => Ok(vmlinux),
            (None, [first]) => Ok(Some(Path::new(first))),
            (_, [.., last]) => bail!("what is {last} for? After the dump comes only the vmlinux"),
        }
    }
}

/// Whether a word is the vmlinux: it is a path, or the name of an ELF file that is there.
fn names_a_file(word: &str) -> bool {
    let is_elf = || {
        let mut magic = [0; 4];
        let read = File::open(word).and_then(|mut file| file.read_exact(&mut magic));
        read.is_ok() && magic == *b"\x7fELF"
    };
    word.contains('/') || is_elf()
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
            let (vmlinux, words) = args.split();
            let options = bt::Options { tasks: tasks(words)?, ..args.options.clone() };
            with_kernel(&args.dump, vmlinux, |kernel| bt::run(kernel, &options, &mut out))?;
        }
        Command::Card(options) => card::run(options, &mut out)?,
        Command::Dis(args) => with_words(args, disassemble::run, &mut out)?,
        Command::Files(args) => with_words(args, files::run, &mut out)?,
        Command::List(args) => with_words(args, list::run, &mut out)?,
        Command::Log(args) => {
            let vmlinux = args.no_words()?;
            with_kernel(&args.dump, vmlinux, |kernel| log::run(kernel, &args.options, &mut out))?;
        }
        Command::Mod(args) => {
            let run = |kernel: &Kernel<'_>| modules::run(kernel, &args.options, &mut out);
            with_kernel(&args.dump, args.no_words()?, run)?;
        }
        Command::Ps(args) => {
            let (vmlinux, words) = args.split();
            let options = ps::Options { tasks: words.to_vec(), ..args.options.clone() };
            with_kernel(&args.dump, vmlinux, |kernel| ps::run(kernel, &options, &mut out))?;
        }
        Command::Pte(args) => with_words(args, pte::run, &mut out)?,
        Command::Ptov(args) => with_words(args, ptov::run, &mut out)?,
        Command::Rd(args) => with_words(args, read::run, &mut out)?,
        Command::Receive(options) => {
            if !receive::run(options, &mut out)? {
                code = ExitCode::from(MISSING);
            }
        }
        Command::Search(args) => with_words(args, search::run, &mut out)?,
        Command::Struct(args) => with_words(args, structure::run, &mut out)?,
        Command::Sym(args) => with_words(args, symbol::run, &mut out)?,
        Command::Sys(args) => {
            let vmlinux = args.no_words()?;
            with_kernel(&args.dump, vmlinux, |kernel| sys::run(kernel, &args.options, &mut out))?;
        }
        Command::Task(args) => with_words(args, task::run, &mut out)?,
        Command::Vm(args) => with_words(args, vm::run, &mut out)?,
        Command::Vmcoreinfo(args) => {
            let run = |kernel: &Kernel<'_>| vmcoreinfo::run(kernel, &args.options, &mut out);
            with_kernel(&args.dump, args.no_words()?, run)?;
        }
        Command::Vtop(args) => with_words(args, vtop::run, &mut out)?,
        Command::Whatis(args) => with_words(args, whatis::run, &mut out)?,
    }
    out.flush()?;
    Ok(code)
}

/// What a command does that takes words.
type Run<O> = fn(&Kernel<'_>, &O, &[String], &mut dyn Write) -> Result<(), host_analyzer::Error>;

fn with_words<O: Args>(
    args: &WithWords<O>,
    run: Run<O>,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let (vmlinux, words) = args.split();
    with_kernel(&args.dump, vmlinux, |kernel| run(kernel, &args.options, words, out))
}

fn with_kernel(
    dump: &Path,
    vmlinux: Option<&Path>,
    command: impl FnOnce(&Kernel<'_>) -> Result<(), host_analyzer::Error>,
) -> anyhow::Result<()> {
    let dump = Dump::open(dump)?;
    let vmlinux = vmlinux.map(Vmlinux::open).transpose()?;
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

/// The tasks that words name.
fn tasks(words: &[String]) -> anyhow::Result<Vec<TaskId>> {
    words.iter().map(|word| word.parse().map_err(|error| anyhow!("{error}"))).collect()
}

#[cfg(test)]
mod tests {
    use host_analyzer::VirtAddr;

    use super::*;

    #[test]
    fn command_line_makes_sense_to_clap() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    /// What `--help` says of every command, as one page.
    fn page() -> String {
        use clap::CommandFactory;
        let mut cli = Cli::command().term_width(100);
        cli.build();
        let mut page = "# The commands of host-analyzer\n\nAs `--help` shows them; `--json` is described in \
                        [json.md](json.md). `TINYKDUMP_WRITE_DOCS=1 cargo test -p host-analyzer` writes this page.\n"
            .to_owned();
        for command in cli.get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let help = command.render_long_help().to_string();
            let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
            page += &format!("\n## {}\n\n```text\n{}\n```\n", command.get_name(), lines.join("\n"));
        }
        page
    }

    #[test]
    fn page_of_the_commands_says_what_their_help_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/commands.md");
        if std::env::var_os("TINYKDUMP_WRITE_DOCS").is_some() {
            std::fs::write(&path, page()).unwrap();
        }
        assert!(
            std::fs::read_to_string(path).unwrap() == page(),
            "docs/commands.md is not up to date"
        );
    }

    #[test]
    fn overview_fits_one_screen() {
        use clap::CommandFactory;
        let help = Cli::command().term_width(80).render_help().to_string();
        assert!(help.lines().count() <= 40, "{help}");
        assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
    }

    fn words_of(rest: &[&str]) -> (Option<PathBuf>, Vec<String>) {
        let rest: Vec<String> = rest.iter().map(|&text| text.to_owned()).collect();
        let args = WithWords { dump: PathBuf::new(), rest, options: sys::Options::default() };
        let (vmlinux, words) = args.split();
        (vmlinux.map(Path::to_owned), words.to_vec())
    }

    #[test]
    fn words_may_follow_the_dump_with_and_without_a_vmlinux() {
        let words = ["1".to_owned(), "ff319b5a811f20c0".to_owned()];
        assert_eq!(
            words_of(&["./vmlinux", "1", &words[1]]),
            (Some("./vmlinux".into()), words.to_vec())
        );
        assert_eq!(words_of(&["1", &words[1]]), (None, words.to_vec()));
        let address = TaskId::Address(VirtAddr(0xff31_9b5a_811f_20c0));
        assert_eq!(tasks(&words).unwrap(), [TaskId::Pid(1), address]);
        assert!(tasks(&["vmlinux".to_owned()]).is_err());
    }

    #[test]
    fn file_is_the_vmlinux_only_when_it_is_an_elf_file() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        let name = file.path().file_name().unwrap().to_str().unwrap();
        assert!(!names_a_file(name));
        std::fs::write(file.path(), b"\x7fELF").unwrap();
        assert!(names_a_file(name));
    }
}
