//! `log`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::{Value, json};

use crate::Error;
use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::printk::{Log, Record};
use crate::render::text;

/// The kernel's log, as dmesg prints it
///
/// Times are seconds since boot. The letters are those of crash.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Show each record's level: 0 (emergency) to 7 (debug)
    #[arg(short = 'm', short_alias = 'l', long)]
    pub level: bool,
    /// Show times as dates, in UTC
    #[arg(short = 'T', long)]
    pub dates: bool,
    /// Show no times
    #[arg(short = 't', long, conflicts_with = "dates")]
    pub no_times: bool,
    /// Show who wrote each record: T and a thread's number, or C and a CPU's
    #[arg(short, long)]
    pub caller: bool,
    /// Show the device that a record is about
    #[arg(short, long)]
    pub dictionary: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// What stands in front of a record's lines; `boot` is when the kernel was booted, in seconds since
    /// 1970.
    fn prefix(&self, record: &Record, boot: Option<u64>) -> String {
        let seconds = record.time / 1_000_000_000;
        let level = if self.level { format!("<{}>", record.level) } else { String::new() };
        let time = match boot {
            _ if self.no_times => String::new(),
            Some(boot) => format!("[{}]", text::date(boot + seconds)),
            None => format!("[{seconds:>5}.{:06}]", record.time / 1000 % 1_000_000),
        };
        let caller = record.caller.filter(|_| self.caller).map(|caller| {
            let kind = if caller & Record::ON_CPU == 0 { 'T' } else { 'C' };
            format!("[{:>6}]", format!("{kind}{}", caller & !Record::ON_CPU))
        });
        let prefix = format!("{level}{time}{}", caller.unwrap_or_default());
        if prefix.is_empty() { prefix } else { prefix + " " }
    }
}

/// Runs the command.
///
/// # Errors
/// Those of [`Log::read`], and [`Error::Output`].
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let log = Log::read(kernel)?;
    if options.json {
        let record = |it: &Record| {
            let about: serde_json::Map<String, Value> =
                it.about.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
            json!({"sequence": it.sequence, "nanoseconds": it.time, "level": it.level,
                "caller": it.caller, "about": about, "text": it.text})
        };
        let records: Vec<_> = log.records.iter().map(record).collect();
        let document = json!({"records": records, "damaged": log.damaged, "missing": log.missing});
        return text::json(&document, out);
    }
    text::completeness(kernel.dump(), out)?;
    let boot = options.dates.then(|| boot_time(kernel)).transpose()?;
    for record in &log.records {
        // Every line has its time.
        let prefix = options.prefix(record, boot);
        for line in record.text.split('\n') {
            writeln!(out, "{prefix}{line}")?;
        }
        for (name, value) in record.about.iter().filter(|_| options.dictionary) {
            writeln!(out, "{:>1$}{name}={value}", "", prefix.len())?;
        }
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

/// When the kernel was booted, in seconds since 1970.
fn boot_time(kernel: &Kernel<'_>) -> Result<u64, Error> {
    let clock = Linux::new(kernel).clock()?;
    Ok(clock.date.saturating_sub(clock.uptime))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_stands_before_a_record() {
        let record = Record { time: 7_070_362_000, level: 5, caller: Some(1), ..Record::default() };
        let plain = Options::default();
        assert_eq!(plain.prefix(&record, None), "[    7.070362] ");
        let all = Options { level: true, caller: true, ..plain };
        assert_eq!(all.prefix(&record, None), "<5>[    7.070362][    T1] ");
        let on_cpu = Record { caller: Some(Record::ON_CPU | 3), ..record.clone() };
        assert_eq!(all.prefix(&on_cpu, None), "<5>[    7.070362][    C3] ");
        let date = "[Mon Nov 23 01:53:50 UTC 2026] ";
        assert_eq!(plain.prefix(&record, Some(1_795_398_823)), date);
        assert_eq!(Options { no_times: true, ..plain }.prefix(&record, None), "");
    }
}
