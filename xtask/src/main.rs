//! `cargo xtask`: every command that a person types while developing.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::target::Target;

#[derive(Parser)]
#[command(name = "cargo xtask", about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the payload: target/images/ARCH/capture.bin, ready for `kexec -p`.
    Image {
        /// The architecture: a file name in targets/, without .toml.
        arch: String,
    },
    /// Fetch every kernel and tool that tests and demo use into the user's cache directory.
    Fixtures,
    /// Crash a Debian kernel in QEMU and show why it died, step by step. Also: `cargo demo`.
    Demo(xtask::demo::Options),
    /// Run every boot test in which something goes wrong, and print what became of the dump.
    FaultMatrix,
    /// Time `host-analyzer bt` against drgn on the same dump.
    BenchAnalyzer,
    /// Print the rate at which the payload writes to every kind of disk that it can drive, and that of the
    /// guest's own Linux.
    BenchDevices {
        /// Only those whose architecture and name, with a space between, have this in them.
        #[arg(long)]
        only: Option<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Image { arch } => {
            let image = xtask::image::build(&Target::load(&arch)?)?;
            println!("{}", image.display());
        }
        Command::Fixtures => xtask::fixtures::Fixtures::open()?.all()?,
        Command::Demo(options) => xtask::demo::run(&options)?,
        Command::FaultMatrix => xtask::faults::run()?,
        Command::BenchAnalyzer => xtask::bench::analyzer::run()?,
        Command::BenchDevices { only } => xtask::bench::devices::run(only.as_deref())?,
    }
    Ok(())
}
