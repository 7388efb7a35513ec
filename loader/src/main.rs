//! `loader`: prepares the machine to be protected, and takes a dump out of its area.

#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use loader::in_use::System;
use loader::save::{Options, save};
use loader::{handoff, reserve, show, text};

/// Reserves a place for crash dumps on a disk, shows what is in it, and saves a dump from it.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Reserve a block device or an image file for crash dumps.
    ///
    /// Writes a mark into the last 4 KiB and clears the first 128 KiB; a file gets some more marks. The
    /// payload writes a dump only where it finds the mark, and then overwrites everything from the first
    /// byte on.
    Reserve {
        /// A whole disk, a partition, the image of one, or a file in a file system.
        path: PathBuf,
        /// Make a file of SIZE bytes (K, M, G and T are powers of 1024) on ext4 or XFS. The payload finds it by
        /// the handoff; see `loader handoff`.
        #[arg(long, value_parser = text::parse_size, conflicts_with = "force")]
        size: Option<u64>,
        /// Reserve it although it holds a file system, a partition table or an unsaved dump, which
        /// will be lost. A device in use is refused all the same.
        #[arg(long)]
        force: bool,
    },
    /// Tell the payload where files in file systems are that are dump areas.
    ///
    /// The handoff is loaded with it: kexec -p ... --initrd=HANDOFF. Make it anew each time.
    Handoff {
        /// Files that `loader reserve --size` made.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Where the handoff goes; overwritten when it exists.
        #[arg(long, short)]
        output: PathBuf,
    },
    /// Show the state of a dump area.
    Show {
        /// The area, or a disk (or its image) with partitions and one area on it.
        path: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Save the dump in an area as DIR/dump.elf, and make the area ready for the next crash.
    ///
    /// Every checksum is verified on the way. The area counts as empty only after the file is
    /// safely on its disk. An existing file is never overwritten.
    Save {
        /// The area, or a disk (or its image) with partitions and one area on it.
        area: PathBuf,
        /// Where the file goes; created when it does not exist.
        dir: PathBuf,
        /// Also save a dump that was not finished, as dump.incomplete.elf.
        #[arg(long)]
        incomplete: bool,
        /// Also save a dump with wrong checksums, as dump.damaged.elf; the area stays as it is.
        #[arg(long)]
        keep_damaged: bool,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The messages of this crate say their causes themselves.
            eprintln!("loader: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Reserve { path, size: Some(size), .. } => {
            show_user(&reserve::reserve_new_file(&path, size, &System::default())?)
        }
        Command::Reserve { path, size: None, force } => {
            show_user(&reserve::reserve(&path, force, &System::default())?)
        }
        Command::Handoff { files, output } => {
            show_user(&handoff::handoff(&files, &output, &System::default())?)
        }
        Command::Show { path, json } => {
            let report = show::show(&path)?;
            if json {
                show_user(&format_args!("{}\n", serde_json::to_string_pretty(&report)?))
            } else {
                show_user(&report)
            }
        }
        Command::Save { area, dir, incomplete, keep_damaged } => {
            show_user(&save(&area, &dir, Options { incomplete, keep_damaged })?)
        }
    }
}

/// Writes the result of a command that has succeeded. Whoever closed the pipe has read enough.
fn show_user(text: &dyn Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("done, but the result could not be shown")
        }
        _ => Ok(()),
    }
}
