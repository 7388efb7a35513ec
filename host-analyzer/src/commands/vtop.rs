//! `vtop`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::kernel::paging::{Entry, PageTables};
use crate::kernel::virt::VirtualMemory;
use crate::linux::Linux;
use crate::render::text;
use crate::{Error, ReadError, VirtAddr};

use super::place::place;

/// Where virtual addresses lead: the physical address, and the page tables on the way
///
/// Addresses are the kernel's; with --task those of a process. Entries are shown with the physical address
/// that they lie at.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Addresses of this process, by PID or address of its task
    #[arg(short = 'c', long, value_name = "TASK")]
    pub task: Option<String>,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// [`Error::Usage`], [`Error::NoPlace`], [`Error::NoTask`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    if words.is_empty() {
        return Err(Error::Usage("which address? Write it, or a symbol".to_owned()));
    }
    let linux = Linux::new(kernel);
    let own = options.task.as_ref().map(|task| linux.memory_of(task)).transpose()?;
    let memory = own.as_ref().unwrap_or(kernel.memory());
    let mut documents = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let at = place(&linux, word)?;
        let mut entries = Vec::new();
        let found = memory.tables().walk(memory.physical(), at, &mut |entry| entries.push(entry));
        let found = found.map(|mapping| mapping.phys.0);
        if options.json {
            documents.push(document(memory.tables(), at, found, &entries));
        } else {
            if index != 0 {
                writeln!(out)?;
            }
            show(memory, at, found, &entries, out)?;
        }
    }
    if options.json { text::json(&documents.into(), out) } else { Ok(()) }
}

fn show(
    memory: &VirtualMemory<'_>,
    at: VirtAddr,
    found: Result<u64, ReadError>,
    entries: &[Entry],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let tables = memory.tables();
    let phys = found.map_or_else(|error| format!("({error})"), |phys| format!("{phys:x}"));
    writeln!(out, "{:16}  PHYSICAL\n{at:016x}  {phys}\n", "VIRTUAL")?;
    for entry in entries {
        let name = level_name(tables.levels(), entry.level);
        writeln!(out, "{name}: {:x} => {:016x}", entry.slot.0, entry.value)?;
    }
    let Some(last) = entries.last().filter(|_| found.is_ok()) else { return Ok(()) };
    writeln!(out, "\n{:16}  {:12}  FLAGS", level_name(tables.levels(), last.level), "PHYSICAL")?;
    let (target, flags) = (tables.target(last.value).0, tables.attributes(last.value).join("|"));
    writeln!(out, "{:016x}  {target:<12x}  ({flags})", last.value)?;
    Ok(())
}

fn document(
    tables: &dyn PageTables,
    at: VirtAddr,
    found: Result<u64, ReadError>,
    entries: &[Entry],
) -> serde_json::Value {
    let one = |entry: &Entry| {
        json!({"level": level_name(tables.levels(), entry.level),
            "slot": format!("{:#x}", entry.slot.0), "entry": format!("{:#x}", entry.value)})
    };
    let flags = entries.last().filter(|_| found.is_ok()).map(|last| tables.attributes(last.value));
    json!({"virtual": format!("{:#x}", at.0),
        "physical": found.ok().map(|phys| format!("{phys:#x}")),
        "error": found.err().map(|error| error.to_string()),
        "tables": entries.iter().map(one).collect::<Vec<_>>(), "flags": flags})
}

/// What the kernel calls a level (Documentation/mm/page_tables.rst, 6.12), `below` levels above the last
/// of `levels`.
fn level_name(levels: u32, below: u32) -> &'static str {
    match below {
        0 => "PTE",
        _ if below + 1 == levels => "PGD",
        1 => "PMD",
        2 => "PUD",
        _ => "P4D",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_the_kernels_names_however_many_there_are() {
        let names = |levels: u32| (0..levels).rev().map(|it| level_name(levels, it)).collect();
        assert_eq!(<Vec<_> as From<_>>::from(["PGD", "P4D", "PUD", "PMD", "PTE"]), names(5));
        let three: Vec<_> = names(3);
        assert_eq!(three, ["PGD", "PMD", "PTE"]);
    }
}
