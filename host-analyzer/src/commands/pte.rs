//! `pte`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::Error;
use crate::kernel::Kernel;
use crate::render::text;

use super::place::hexadecimal;

/// What entries of page tables say: the physical address, and the attributes by name
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// [`Error::Usage`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    if words.is_empty() {
        return Err(Error::Usage("which entry? Write it in hexadecimal".to_owned()));
    }
    let tables = kernel.memory().tables();
    let mut documents = Vec::new();
    for word in words {
        let wrong = || Error::Usage(format!("{word} is no number in hexadecimal"));
        let entry = hexadecimal(word).ok_or_else(wrong)?;
        let (phys, flags) = (tables.target(entry).0, tables.attributes(entry));
        if options.json {
            documents.push(json!({"entry": format!("{entry:#x}"),
                "physical": format!("{phys:#x}"), "flags": flags}));
        } else {
            writeln!(out, "{:16}  {:12}  FLAGS", "PTE", "PHYSICAL")?;
            writeln!(out, "{entry:016x}  {phys:<12x}  ({})", flags.join("|"))?;
        }
    }
    if options.json { text::json(&documents.into(), out) } else { Ok(()) }
}
