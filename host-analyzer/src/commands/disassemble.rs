//! `dis`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::kernel::disassembly::{Disassembled, disassemble};
use crate::linux::Linux;
use crate::render::text;
use crate::{Error, ReadContext, VirtAddr};

use super::place::{number, place};

/// Machine code
///
/// A symbol shows the whole function, an address COUNT instructions from there on (one, if not said). The
/// code is what was in memory when the kernel died, with all that it had patched in itself.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// From the start of the function up to the address
    #[arg(short, long)]
    pub reverse: bool,
    /// From the address to the end of the function
    #[arg(short, long, conflicts_with = "reverse")]
    pub forward: bool,
    /// Show source lines (with a vmlinux)
    #[arg(short, long)]
    pub lines: bool,
    /// Show offsets in hexadecimal
    #[arg(short = 'x', long)]
    pub hexadecimal: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Longest function, and longest instruction.
const MAX_FUNCTION: u64 = 1 << 20;
const MAX_INSTRUCTION: u64 = 15;

/// Runs the command.
///
/// # Errors
/// [`Error::Usage`], [`Error::NoPlace`], [`Error::Read`] when there is no code, [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let (word, count) = match words {
        [word] => (word, None),
        [word, count] => {
            let wrong = || Error::Usage(format!("{count} is no number of instructions"));
            (word, Some(number(count).ok_or_else(wrong)?))
        }
        _ => return Err(Error::Usage("what code? Write a function or an address".to_owned())),
    };
    let at = place(&linux, word)?;
    let found = instructions(&linux, options, at, count)?;
    if options.json {
        let one = |it: &Disassembled| {
            json!({"address": format!("{:#x}", it.at.0), "place": label(&linux, it.at, options),
                "length": it.length, "instruction": it.text, "line": line(kernel, it.at)})
        };
        return text::json(&found.iter().map(one).collect(), out);
    }
    text::completeness(kernel.dump(), out)?;
    let mut last = None;
    for it in &found {
        if options.lines {
            let line = line(kernel, it.at);
            if line.is_some() && line != last {
                writeln!(out, "{}", line.as_deref().unwrap_or_default())?;
                last = line;
            }
        }
        let label = label(&linux, it.at, options).map(|it| format!(" <{it}>")).unwrap_or_default();
        writeln!(out, "{:#x}{label}:\t{}", it.at.0, it.text)?;
    }
    Ok(())
}

fn instructions(
    linux: &Linux<'_, '_>,
    options: &Options,
    at: VirtAddr,
    count: Option<u64>,
) -> Result<Vec<Disassembled>, Error> {
    let kernel = linux.kernel();
    let offset = linux.place(at).map(|place| place.offset);
    let start = at.back(offset.unwrap_or(0));
    let whole = offset == Some(0) && count.is_none() || options.reverse || options.forward;
    let end = match whole {
        true => end_of_function(linux, start),
        false => at.offset(count.unwrap_or(1).min(MAX_FUNCTION / 4) * MAX_INSTRUCTION),
    };
    // Where instructions begin is known at the start of the function only (x86).
    let length = end.0.saturating_sub(start.0).min(MAX_FUNCTION) as usize;
    let code = kernel.memory().bytes_up_to(start, length);
    if code.is_empty() {
        kernel.memory().bytes(start, 1).reading("the code")?;
    }
    let name = |it: VirtAddr| label(linux, it, options);
    let begins = |from: usize| {
        let code = code.get(from..).unwrap_or_default();
        disassemble(kernel.machine(), start.offset(from as u64), code, &name)
    };
    if options.reverse {
        let to = at.0 - start.0;
        let all = begins(0);
        return Ok(all.into_iter().filter(|it| it.at.0 - start.0 <= to).collect());
    }
    let found = begins((at.0 - start.0) as usize);
    let most = if whole { usize::MAX } else { count.unwrap_or(1) as usize };
    Ok(found.into_iter().take(most).collect())
}

/// The first address behind the function that starts at `start`: where the next symbol is.
fn end_of_function(linux: &Linux<'_, '_>, start: VirtAddr) -> VirtAddr {
    if let Some(symbol) = linux.kernel().image_symbol(start) {
        return symbol.end;
    }
    let Some(module) = linux.modules().covering(start) else { return start.offset(64) };
    let mut end = module.end;
    module.each_symbol(linux.kernel(), &mut |_, _, at| {
        if at > start && at < end {
            end = at;
        }
    });
    end
}

fn label(linux: &Linux<'_, '_>, at: VirtAddr, options: &Options) -> Option<String> {
    let place = linux.place(at)?;
    let module = place.module.map(|name| format!(" [{name}]")).unwrap_or_default();
    Some(match place.offset {
        0 => format!("{}{module}", place.name),
        offset if options.hexadecimal => format!("{}+{offset:#x}{module}", place.name),
        offset => format!("{}+{offset}{module}", place.name),
    })
}

fn line(kernel: &Kernel<'_>, at: VirtAddr) -> Option<String> {
    let position = kernel.source_frames(at).into_iter().next()?.position;
    Some(format!("{}: {}", position.file?, position.line))
}
