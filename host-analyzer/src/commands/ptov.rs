//! `ptov`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::render::text;
use crate::{Error, PhysAddr};

use super::place::hexadecimal;

/// Where the kernel sees physical addresses: in its direct map
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
        return Err(Error::Usage("which physical address? Write it in hexadecimal".to_owned()));
    }
    let linux = Linux::new(kernel);
    let mut rows = Vec::new();
    for word in words {
        let wrong = || Error::Usage(format!("{word} is no physical address in hexadecimal"));
        let phys = hexadecimal(word).ok_or_else(wrong)?;
        rows.push((phys, linux.direct_map(PhysAddr(phys))));
    }
    if options.json {
        let one = |(phys, virt): &(u64, Option<crate::VirtAddr>)| json!({"physical": format!("{phys:#x}"), "virtual": virt.map(|it| format!("{:#x}", it.0))});
        return text::json(&rows.iter().map(one).collect(), out);
    }
    writeln!(out, "{:16}  PHYSICAL", "VIRTUAL")?;
    for (phys, virt) in rows {
        match virt {
            Some(virt) => writeln!(out, "{virt:016x}  {phys:x}")?,
            None => writeln!(out, "{:16}  {phys:x}", "(not mapped)")?,
        }
    }
    Ok(())
}
