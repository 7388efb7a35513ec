//! `sys`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use format::record::Record;

use crate::Error;
use crate::kernel::Kernel;
use crate::kernel::machine::Machine;
use crate::linux::Linux;
use crate::linux::printk::Log;
use crate::render::text;
use crate::source::Completeness;

/// The machine and its crash at a glance
///
/// Names, clock, load and memory of the machine; why it died and which task killed it; and what the
/// payload that wrote the dump has to say about it.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Output as JSON: the rows' names and values
    #[arg(long)]
    pub json: bool,
}

/// Runs the command. A row whose value cannot be read says so.
///
/// # Errors
/// [`Error::Output`].
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let mut rows = Rows::default();
    machine_rows(&linux, &mut rows);
    crash_rows(&linux, &mut rows);
    dump_rows(kernel, &mut rows);
    if options.json {
        let row = |(name, value): &(&str, String)| ((*name).to_owned(), value.as_str().into());
        return text::json(&rows.0.iter().map(row).collect::<serde_json::Map<_, _>>().into(), out);
    }
    text::completeness(kernel.dump(), out)?;
    text::rows(&rows.0, out)
}

/// Name and value of each row.
#[derive(Default)]
struct Rows(Vec<(&'static str, String)>);

impl Rows {
    fn add(&mut self, name: &'static str, value: impl Into<String>) {
        self.0.push((name, value.into()));
    }

    fn add_result(&mut self, name: &'static str, value: Result<String, Error>) {
        self.add(name, value.unwrap_or_else(|error| format!("(unknown: {error})")));
    }
}

fn machine_rows(linux: &Linux<'_, '_>, rows: &mut Rows) {
    let kernel = linux.kernel();
    let vmlinux = kernel.vmlinux().map(|vmlinux| vmlinux.path().display().to_string());
    rows.add("KERNEL", vmlinux.unwrap_or_else(|| "(symbols and types from the dump)".to_owned()));
    rows.add("DUMPFILE", dump_file(kernel));
    rows.add_result("CPUS", linux.cpu_count().map(|count| count.to_string()));
    let clock = linux.clock();
    let crashed = kernel.vmcoreinfo().get("CRASHTIME").and_then(|text| text.parse().ok());
    let date = crashed.map_or_else(|| linux.clock().map(|clock| clock.date), Ok);
    rows.add_result("DATE", date.map(text::date));
    let uptime = clock.map(|clock| text::duration(clock.uptime));
    // Without the clock, the last thing the kernel said is close to its end.
    let said = |error| match Log::read(kernel).ok().and_then(|mut log| log.records.pop()) {
        Some(last) => Ok(format!("{} (by the log)", text::duration(last.time / 1_000_000_000))),
        None => Err(error),
    };
    rows.add_result("UPTIME", uptime.or_else(said));
    let load = |it: [f64; 3]| format!("{:.2}, {:.2}, {:.2}", it[0], it[1], it[2]);
    rows.add_result("LOAD AVERAGE", linux.load().map(load));
    let tasks = linux.all_tasks().map(|list| match list.problems.len() {
        0 => list.tasks.len().to_string(),
        _ => format!("{} (incomplete: {})", list.tasks.len(), list.problems.join("; ")),
    });
    rows.add_result("TASKS", tasks);
    match linux.names() {
        Ok(names) => {
            rows.add("NODENAME", names.node);
            rows.add("RELEASE", names.release);
            rows.add("VERSION", names.version);
            let rate = linux.cpu_mhz().map_or_else(String::new, |mhz| format!("  ({mhz} Mhz)"));
            rows.add("MACHINE", format!("{}{rate}", names.machine));
        }
        Err(error) => {
            rows.add("RELEASE", kernel.vmcoreinfo().release());
            rows.add("NODENAME", format!("(unknown: {error})"));
        }
    }
    rows.add_result("MEMORY", linux.memory_size().map(text::size));
}

fn dump_file(kernel: &Kernel<'_>) -> String {
    let path = kernel.dump().path().display();
    match kernel.dump().completeness() {
        Completeness::Complete => path.to_string(),
        Completeness::Incomplete(_) => format!("{path}  [INCOMPLETE]"),
    }
}

fn crash_rows(linux: &Linux<'_, '_>, rows: &mut Rows) {
    let panic = Log::read(linux.kernel()).map(|log| match log.panic_line() {
        Some(line) => format!("\"{line}\""),
        None => "(none in the log)".to_owned(),
    });
    rows.add_result("PANIC", panic);
    let crashed = linux.crashed_cpu().and_then(|cpu| Ok((cpu, linux.current(cpu)?)));
    match crashed {
        Ok((cpu, task)) => {
            rows.add("PID", task.pid.to_string());
            rows.add("COMMAND", format!("\"{}\"", task.comm));
            rows.add("TASK", format!("{:x}", task.address));
            rows.add("CPU", cpu.to_string());
            rows.add("STATE", format!("{} (PANIC)", task.state().name));
        }
        Err(error) => rows.add("PID", format!("(unknown: {error})")),
    }
}

fn dump_rows(kernel: &Kernel<'_>, rows: &mut Rows) {
    let Some(record) = kernel.notes().record else { return };
    rows.add("DUMPED BY", record.payload());
    let state = if record.complete.get() == 1 { "complete" } else { "incomplete" };
    rows.add("DUMP STATE", state);
    rows.add("PAGES READ", pages(record.pages_read.get()));
    rows.add("PAGES UNREADABLE", unreadable(&record));
    rows.add("HEADERS DROPPED", dropped(kernel, record.headers_dropped.get()));
    let spent = record.last_block_us.get().saturating_sub(record.first_block_us.get());
    rows.add("WRITTEN IN", format!("{}.{:03} s", spent / 1_000_000, spent / 1000 % 1000));
}

fn pages(count: u64) -> String {
    format!("{count} ({})", text::size(count.saturating_mul(4096)))
}

/// How many pages nobody could read, and where they are: they are missing from the dump.
fn unreadable(record: &Record) -> String {
    let mut text = pages(record.pages_unreadable.get());
    let mut named = 0;
    for range in record.unreadable() {
        let separator = if named == 0 { ": " } else { ", " };
        text += &format!("{separator}{:#x}-{:#x}", range.start, range.end - 1);
        named += (range.end - range.start).div_ceil(4096);
    }
    if named > 0 && named < record.pages_unreadable.get() {
        text += " and more";
    }
    text
}

/// kexec-tools look for `_text` in /proc/kallsyms; arm64 kernels without CONFIG_KALLSYMS_ALL do not list
/// it there, and the header for the kernel's image becomes an impossible one (kexec-tools 2.0.25,
/// crashdump-elf.c). Nothing is lost by that where the dump has the image all the same.
fn dropped(kernel: &Kernel<'_>, count: u64) -> String {
    let known = count == 1 && kernel.machine() == Machine::Aarch64 && has_image(kernel);
    match known && kernel.has_functions_only().unwrap_or(false) {
        true => {
            "1 (the wrong one that kexec-tools write for this kernel: nothing is missing)".into()
        }
        false => count.to_string(),
    }
}

/// Whether the dump's own headers lead to the kernel's image.
fn has_image(kernel: &Kernel<'_>) -> bool {
    let start = kernel.vmcoreinfo().symbol("_stext");
    let by_headers = start.and_then(|at| kernel.memory().physical().linear(at));
    let by_tables = start.and_then(|at| kernel.memory().translate(at).ok());
    by_headers.is_some() && by_headers == by_tables.map(|mapping| mapping.phys)
}
