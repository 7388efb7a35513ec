//! `task`: what [`Options`] says.

use std::io::Write;

use clap::Args;

use crate::Error;
use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::task::Task;
use crate::render::text;

use super::structure;

/// The struct task_struct of tasks
///
/// Each word is a PID or the address of a task; without any, the task that crashed.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Only these members, separated by commas
    #[arg(short = 'R', long, value_name = "MEMBERS")]
    pub members: Option<String>,
    /// Integers in hexadecimal
    #[arg(short = 'x', long)]
    pub hexadecimal: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// [`Error::NoTask`], [`Error::NoMember`], [`Error::Read`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let tasks = chosen(&linux, words)?;
    let spec = match &options.members {
        Some(members) => format!("task_struct.{members}"),
        None => "task_struct".to_owned(),
    };
    let (hexadecimal, json) = (options.hexadecimal, options.json);
    let shape = structure::Options { hexadecimal, json, ..Default::default() };
    if json {
        let places: Vec<_> = tasks.iter().map(|task| task.address).collect();
        return structure::show(&linux, &spec, &shape, &places, out);
    }
    text::completeness(kernel.dump(), out)?;
    for task in &tasks {
        text::task(task, out)?;
        structure::show(&linux, &spec, &shape, &[task.address], out)?;
        writeln!(out)?;
    }
    Ok(())
}

/// The tasks that words name; without any, the one that crashed.
///
/// # Errors
/// [`Error::NoTask`], [`Error::Read`].
pub(super) fn chosen(linux: &Linux<'_, '_>, words: &[String]) -> Result<Vec<Task>, Error> {
    if words.is_empty() {
        return Ok(vec![linux.current(linux.crashed_cpu()?)?]);
    }
    words.iter().map(|word| linux.named_task(word)).collect()
}
