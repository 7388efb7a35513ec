//! `log`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::Error;
use crate::kernel::Kernel;
use crate::linux::printk::{Log, Record};
use crate::render::text;

/// The kernel's log, as dmesg prints it
///
/// Reads the ring that kernels keep from 5.10 on. Times are seconds since boot.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Show each record's level: 0 (emergency) to 7 (debug)
    #[arg(short, long)]
    pub level: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// Those of [`Log::read`], and [`Error::Output`].
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let log = Log::read(kernel)?;
    if options.json {
        let record = |it: &Record| json!({"sequence": it.sequence, "nanoseconds": it.time, "level": it.level, "text": it.text});
        let records: Vec<_> = log.records.iter().map(record).collect();
        let document = json!({"records": records, "damaged": log.damaged, "missing": log.missing});
        return text::json(&document, out);
    }
    text::completeness(kernel.dump(), out)?;
    for record in &log.records {
        text::log_record(record, options.level, out)?;
    }
    let mut problems = Vec::new();
    if log.damaged != 0 {
        problems.push(format!("{} records of the log are damaged", log.damaged));
    }
    if log.missing != 0 {
        let (missing, all) = (log.missing, log.missing + log.damaged + log.records.len());
        let bytes = log.missing_bytes;
        problems.push(format!(
            "{missing} of {all} records are not in the dump; {bytes} bytes of text are known to be missing"
        ));
    }
    text::problems(&problems, out)
}
