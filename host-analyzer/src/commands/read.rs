//! `rd`: what [`Options`] says.

use std::io::Write;

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::render::text;
use crate::source::Memory;
use crate::{Error, PhysAddr, ReadContext, VirtAddr, bytes};

use super::place::{hexadecimal, number, place};

/// Memory, as it is
///
/// From an address or a symbol on, COUNT units (one, if not said) in hexadecimal and as characters. What
/// is not in the dump ends it.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Bits of a unit
    #[arg(short, long, value_enum, default_value_t)]
    pub bits: Bits,
    /// The address is a physical one
    #[arg(short, long, conflicts_with = "task")]
    pub physical: bool,
    /// The address is one of this process, by PID or address of its task
    #[arg(short = 'c', long, value_name = "TASK")]
    pub task: Option<String>,
    /// Read up to this address
    #[arg(short, long, value_name = "ADDRESS")]
    pub end: Option<String>,
    /// Show the symbols that words lead to instead of characters; two words in a row
    #[arg(short, long)]
    pub symbols: bool,
    /// Numbers in decimal, with a sign
    #[arg(short, long)]
    pub decimal: bool,
    /// Only characters
    #[arg(short, long)]
    pub ascii: bool,
    /// Write the bytes themselves into this file instead
    #[arg(short = 'r', long, value_name = "FILE")]
    pub raw: Option<std::path::PathBuf>,
    /// Output as JSON: the words as texts in hexadecimal
    #[arg(long)]
    pub json: bool,
}

/// Bits of a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Bits {
    /// A byte.
    #[value(name = "8")]
    Eight,
    /// Two bytes.
    #[value(name = "16")]
    Sixteen,
    /// Four bytes.
    #[value(name = "32")]
    ThirtyTwo,
    /// Eight bytes.
    #[default]
    #[value(name = "64")]
    SixtyFour,
}

impl Bits {
    const fn size(self) -> usize {
        match self {
            Bits::Eight => 1,
            Bits::Sixteen => 2,
            Bits::ThirtyTwo => 4,
            Bits::SixtyFour => 8,
        }
    }
}

/// Most bytes that are read at once.
const MAX_BYTES: u64 = 1 << 30;
const ROW: usize = 16;

/// Runs the command.
///
/// # Errors
/// [`Error::Usage`], [`Error::NoPlace`], [`Error::NoTask`], [`Error::Read`] when nothing can be read,
/// [`Error::Io`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let (start, wanted) = extent(&linux, options, words)?;
    let raw = read(&linux, options, start, wanted)?;
    let missing = wanted - raw.len();
    if let Some(path) = &options.raw {
        let write = std::fs::write(path, &raw);
        write.map_err(|error| Error::Io { path: path.clone(), error })?;
        writeln!(out, "{} bytes written to {}", raw.len(), path.display())?;
    } else if options.json {
        let size = options.bits.size();
        let units: Vec<_> = raw.chunks_exact(size).map(|raw| format!("{:#x}", unit(raw))).collect();
        let start = format!("{start:#x}");
        let document = json!({"address": start, "bits": size * 8, "units": units,
            "bytes_missing": missing});
        return text::json(&document, out);
    } else {
        for (index, row) in raw.chunks(ROW).enumerate() {
            let at = start.wrapping_add((index * ROW) as u64);
            writeln!(out, "{at:>16x}:  {}", shown(&linux, options, row).trim_end())?;
        }
    }
    if missing != 0 {
        let at = start.wrapping_add(raw.len() as u64);
        text::problems(&[format!("{missing} bytes from {at:#x} on are not in the dump")], out)?;
    }
    Ok(())
}

/// The first address and the number of bytes.
fn extent(
    linux: &Linux<'_, '_>,
    options: &Options,
    words: &[String],
) -> Result<(u64, usize), Error> {
    let address = |text: &str| match options.physical {
        true => hexadecimal(text)
            .ok_or_else(|| Error::Usage(format!("{text} is no physical address in hexadecimal"))),
        false => place(linux, text).map(|at| at.0),
    };
    let (start, count) = match words {
        [start] => (address(start)?, None),
        [start, count] => {
            let wrong = || Error::Usage(format!("{count} is no number of units"));
            (address(start)?, Some(number(count).ok_or_else(wrong)?))
        }
        _ => return Err(Error::Usage("write an address and how many units".to_owned())),
    };
    let size = options.bits.size() as u64;
    let bytes = match (&options.end, count) {
        (Some(_), Some(_)) => {
            return Err(Error::Usage("either a number of units or --end".to_owned()));
        }
        (Some(end), None) => address(end)?
            .checked_sub(start)
            .ok_or_else(|| Error::Usage("--end lies before the start".to_owned()))?,
        (None, count) => count.unwrap_or(1).saturating_mul(size),
    };
    if bytes > MAX_BYTES {
        return Err(Error::Usage(format!("{bytes} bytes are more than a GiB: read less at once")));
    }
    Ok((start, bytes as usize))
}

/// What is there of the bytes.
fn read(
    linux: &Linux<'_, '_>,
    options: &Options,
    start: u64,
    wanted: usize,
) -> Result<Vec<u8>, Error> {
    let kernel = linux.kernel();
    if options.physical {
        let mut raw = Vec::new();
        while raw.len() < wanted {
            let at = PhysAddr(start).offset(raw.len() as u64);
            match kernel.dump().run(at, wanted - raw.len()) {
                Ok(run) => raw.extend_from_slice(&run),
                Err(error) if raw.is_empty() => return Err(error).reading("physical memory"),
                Err(_) => break,
            }
        }
        return Ok(raw);
    }
    let own = options.task.as_ref().map(|task| linux.memory_of(task)).transpose()?;
    let memory = own.as_ref().unwrap_or(kernel.memory());
    let raw = memory.bytes_up_to(VirtAddr(start), wanted);
    if raw.is_empty() && wanted != 0 {
        memory.bytes(VirtAddr(start), 1).reading("memory")?;
    }
    Ok(raw)
}

fn unit(raw: &[u8]) -> u64 {
    let mut wide = [0; 8];
    for (to, from) in wide.iter_mut().zip(raw) {
        *to = *from;
    }
    u64::from_le_bytes(wide)
}

fn shown(linux: &Linux<'_, '_>, options: &Options, row: &[u8]) -> String {
    if options.ascii {
        return text::characters(row);
    }
    let size = options.bits.size();
    if options.symbols {
        let word = |raw: &[u8]| {
            let word = bytes::u64_at(raw, 0).unwrap_or_default();
            let place = linux.place(VirtAddr(word));
            let name = place.map(|it| format!("{}+{}", it.name, it.offset));
            name.map_or_else(
                || format!("{word:016x}"),
                |name| name.trim_end_matches("+0").to_owned(),
            )
        };
        return row.chunks(8).map(|raw| format!("{:<24}", word(raw))).collect::<Vec<_>>().join(" ");
    }
    let one = |raw: &[u8]| {
        let (value, unused) = (unit(raw), 64 - 8 * size as u32);
        match options.decimal {
            true => format!("{:>20}", (value << unused) as i64 >> unused),
            false => format!("{value:0width$x}", width = size * 2),
        }
    };
    let units: Vec<String> = row.chunks(size).map(one).collect();
    let width = ROW / size * (size * 2 + 1) - 1;
    match options.decimal {
        true => units.join(" "),
        false => format!("{:<width$}   {}", units.join(" "), text::characters(row)),
    }
}
