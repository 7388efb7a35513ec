//! `vmcoreinfo`: what [`Options`] says.

use std::io::Write;

use clap::Args;

use crate::Error;
use crate::kernel::Kernel;
use crate::render::text;

/// VMCOREINFO: how the kernel describes itself to those who read its memory
///
/// Line by line as the kernel wrote it (Documentation/admin-guide/kdump/vmcoreinfo.rst).
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Output as JSON: names and values
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// [`Error::Output`].
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let info = kernel.vmcoreinfo();
    if options.json {
        let all = info.lines().filter_map(|line| {
            let (name, value) = line.split_once('=')?;
            Some((name.to_owned(), value.into()))
        });
        return text::json(&all.collect::<serde_json::Map<_, _>>().into(), out);
    }
    for line in info.lines() {
        writeln!(out, "{line}")?;
    }
    Ok(())
}
