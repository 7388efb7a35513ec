//! Plain text, in the manner of crash.

use std::io::Write;

use crate::Error;
use crate::commands::bt::{Backtrace, OfFunction, Owner, Row, own_variables};
use crate::kernel::dwarf::Position;
use crate::linux::task::Task;
use crate::source::{Completeness, Dump, Memory};
use crate::unwind::{CallerBy, End, ExceptionFrame};

/// Says first what is missing from a dump, when something is.
///
/// # Errors
/// [`Error::Output`].
pub fn completeness(dump: &Dump, out: &mut dyn Write) -> Result<(), Error> {
    if let Completeness::Incomplete(why) = dump.completeness() {
        let there = dump.ranges().iter().map(|range| range.end - range.start).sum();
        writeln!(out, "INCOMPLETE DUMP: {why}. What is there ({}) is shown.", size(there))?;
    }
    Ok(())
}

/// Says last what could not be read.
///
/// # Errors
/// [`Error::Output`].
pub fn problems(problems: &[String], out: &mut dyn Write) -> Result<(), Error> {
    for problem in problems {
        writeln!(out, "could not be read: {problem}")?;
    }
    Ok(())
}

/// A document of JSON, indented.
///
/// # Errors
/// [`Error::Output`].
pub fn json(document: &serde_json::Value, out: &mut dyn Write) -> Result<(), Error> {
    writeln!(out, "{document:#}")?;
    Ok(())
}

/// Bytes as 64-bit words, two in a row, and as characters; `at` is the address of the first.
///
/// # Errors
/// [`Error::Output`].
pub fn hex_dump(at: u64, bytes: &[u8], out: &mut dyn Write) -> Result<(), Error> {
    for (row, bytes) in bytes.chunks(16).enumerate() {
        let word = |raw: &[u8]| raw.iter().rev().map(|byte| format!("{byte:02x}")).collect();
        let words: Vec<String> = bytes.chunks(8).map(word).collect();
        let at = at.wrapping_add(row as u64 * 16);
        writeln!(out, "{at:016x}:  {:<33}   {}", words.join(" "), characters(bytes))?;
    }
    Ok(())
}

/// Bytes as characters, those that cannot be printed as dots.
#[must_use]
pub fn characters(bytes: &[u8]) -> String {
    let character = |&byte: &u8| match byte {
        b' '..=b'~' => char::from(byte),
        _ => '.',
    };
    bytes.iter().map(character).collect()
}

/// Rows of names and values, the names flush right before a colon.
///
/// # Errors
/// [`Error::Output`].
pub fn rows(rows: &[(&str, String)], out: &mut dyn Write) -> Result<(), Error> {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in rows {
        writeln!(out, "{name:>width$}: {value}")?;
    }
    Ok(())
}

/// Which task what follows is about.
///
/// # Errors
/// [`Error::Output`].
pub fn task(task: &Task, out: &mut dyn Write) -> Result<(), Error> {
    task_on(task, task.cpu, out)
}

fn task_on(task: &Task, cpu: u32, out: &mut dyn Write) -> Result<(), Error> {
    let Task { pid, address, comm, .. } = task;
    writeln!(out, "PID: {pid:<6}  TASK: {address:016x}  CPU: {cpu}  COMMAND: \"{comm}\"")?;
    Ok(())
}

/// A backtrace; `panic` goes into its header.
///
/// # Errors
/// [`Error::Output`].
pub fn backtrace(trace: &Backtrace, panic: Option<&str>, out: &mut dyn Write) -> Result<(), Error> {
    backtrace_with(trace, panic, out, &mut |_, _| Ok(()))
}

/// What is written behind a frame, whose number it is given.
pub type Behind<'a> = &'a mut dyn FnMut(usize, &mut dyn Write) -> Result<(), Error>;

/// A backtrace with something behind every frame.
///
/// # Errors
/// [`Error::Output`].
pub fn backtrace_with(
    trace: &Backtrace,
    panic: Option<&str>,
    out: &mut dyn Write,
    behind: Behind<'_>,
) -> Result<(), Error> {
    owner(trace, out)?;
    if let Some(panic) = panic {
        writeln!(out, "PANIC: \"{panic}\"")?;
    }
    for (number, row) in trace.rows.iter().enumerate() {
        frame(number, row, out)?;
        behind(number, out)?;
    }
    match &trace.end {
        End::UserMode(frame) => registers(frame, out),
        End::KernelThread => Ok(()),
        End::Stuck(why) => Ok(writeln!(out, "    (no further: {why})")?),
    }
}

/// Whose backtrace it is.
///
/// # Errors
/// [`Error::Output`].
pub fn owner(trace: &Backtrace, out: &mut dyn Write) -> Result<(), Error> {
    let cpu = trace.running_on.map_or_else(|| "?".to_owned(), |cpu| cpu.to_string());
    match &trace.owner {
        Owner::Task(owner) => {
            task_on(owner, trace.running_on.unwrap_or(owner.cpu), out)?;
        }
        Owner::Torn { address, why } => {
            writeln!(out, "PID: ?       TASK: {address:016x}  CPU: {cpu}  (not readable: {why})")?;
        }
        Owner::Registers { pid, why } => {
            let pid = pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            let how = "by the registers that the CPU saved; its task is not known";
            writeln!(out, "PID: {pid:<6}  CPU: {cpu}  ({how}: {why})")?;
        }
    }
    Ok(())
}

fn frame(number: usize, row: &Row, out: &mut dyn Write) -> Result<(), Error> {
    let name = function(row);
    if let Some(exception) = &row.frame.exception {
        // The program counter comes first, under the name that the architecture gives it.
        let counter = exception.registers.first().map_or("PC", |register| register.name);
        writeln!(out, "    [exception {counter}: {name}]")?;
        registers(exception, out)?;
    }
    if let Some(stack) = &row.left_stack {
        writeln!(out, "--- <{stack} stack> ---")?;
    }
    let (at, pc) = (row.frame.at, row.frame.pc);
    for (index, inlined) in row.source.iter().enumerate().filter(|(_, source)| source.inlined) {
        let name = inlined.function.as_deref().unwrap_or("(unknown)");
        let position = position(&inlined.position);
        writeln!(out, "    [inlined]          {name} at {pc:016x}{position}")?;
        variables(row.variables.get(index), out)?;
    }
    let own = row.source.iter().find(|source| !source.inlined);
    let position = own.map(|source| position(&source.position)).unwrap_or_default();
    let guess = match row.frame.caller {
        CallerBy::Tables => "",
        CallerBy::CallSite => "  (not in the unwind tables: caller found by its call)",
        CallerBy::FramePointer => "  (no unwind tables: caller by frame pointer)",
        CallerBy::Scan => "  (found by scanning the stack: may be left over)",
        CallerBy::LinkRegister => "  (interrupted without a frame of its own: caller from lr)",
        CallerBy::Uncertain => "  (interrupted perhaps without a frame: its caller may be missing)",
    };
    let number = format!("#{number}");
    writeln!(out, "{number:>3} [{at:016x}] {name} at {pc:016x}{position}{guess}")?;
    variables(own_variables(&row.source, &row.variables), out)
}

fn variables(of: Option<&OfFunction>, out: &mut dyn Write) -> Result<(), Error> {
    for line in of.iter().flat_map(|it| it.lines()) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// The function of a frame and where in it, as frames show it.
#[must_use]
pub fn function(row: &Row) -> String {
    let Some(place) = &row.place else { return "(unknown)".to_owned() };
    let module = place.module.as_ref().map(|name| format!(" [{name}]")).unwrap_or_default();
    format!("{}+{:#x}{module}", place.name, place.offset)
}

fn position(line: &Position) -> String {
    match &line.file {
        Some(file) if line.line != 0 => format!("  {file}:{}", line.line),
        Some(file) => format!("  {file}"),
        None => String::new(),
    }
}

/// Registers, three in a row.
///
/// # Errors
/// [`Error::Output`].
pub fn registers(frame: &ExceptionFrame, out: &mut dyn Write) -> Result<(), Error> {
    const COLUMNS: usize = 3;
    for row in frame.registers.chunks(COLUMNS) {
        let cells = row.iter().map(|register| {
            let (name, value, digits) = (register.name, register.value, register.digits);
            let width = if digits == 16 { 3 } else { 0 };
            format!("{name:>width$}: {value:0digits$x}")
        });
        writeln!(out, "    {}", cells.collect::<Vec<_>>().join("  "))?;
    }
    Ok(())
}

/// A size in bytes, in the largest unit that leaves a number above 1.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Seconds as days and a time.
#[must_use]
pub fn duration(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let time = format!("{:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60);
    if days == 0 { time } else { format!("{days} days, {time}") }
}

/// Seconds since 1970 as a date, in UTC.
#[must_use]
pub fn date(seconds: u64) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let days = seconds / 86400;
    let (year, month, day) = civil(days);
    let weekday = WEEKDAYS[(days % 7) as usize];
    let month = MONTHS[(month - 1) as usize];
    let rest = seconds % 86400;
    let time = format!("{:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60);
    format!("{weekday} {month} {day:>2} {time} UTC {year}")
}

/// Year, month and day of a number of days since 1970, by the 400-year cycle of the Gregorian
/// calendar; years begin in March so that the leap day comes last.
fn civil(days: u64) -> (u64, u64, u64) {
    const CYCLE: u64 = 146_097;
    let shifted = days + 719_468;
    let cycle = shifted / CYCLE;
    let day = shifted % CYCLE;
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let calendar_month = if month < 10 { month + 3 } else { month - 9 };
    let carry = u64::from(calendar_month <= 2);
    (cycle * 400 + year + carry, calendar_month, date)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VirtAddr;
    use crate::kernel::dwarf::SourceFrame;
    use crate::linux::Place;
    use crate::unwind::{Frame, FrameKind, Register, Registers};

    fn shown(write: impl FnOnce(&mut dyn Write) -> Result<(), Error>) -> String {
        let mut out = Vec::new();
        write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn row(exception: Option<ExceptionFrame>) -> Row {
        let frame = Frame {
            pc: VirtAddr(0xffff_ffff_c025_6e19),
            kind: FrameKind::ReturnAddress,
            at: VirtAddr(0xffff_c900_001b_7d50),
            exception,
            registers: Registers::default(),
            caller: CallerBy::Tables,
        };
        let module = Some("fuse".to_owned());
        let place = Some(Place { name: "fuse_dev_do_read".to_owned(), offset: 0xa29, module });
        Row { frame, place, source: Vec::new(), left_stack: None, variables: Vec::new() }
    }

    #[test]
    fn frame_reads_as_crash_prints_it() {
        let text = shown(|out| frame(3, &row(None), out));
        let expected = " #3 [ffffc900001b7d50] fuse_dev_do_read+0xa29 [fuse] at ffffffffc0256e19\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn inlined_functions_come_first_and_have_no_number() {
        let position = |line| Position { file: Some("fs/fuse/dev.c".to_owned()), line };
        let inlined = SourceFrame {
            function: Some("fuse_wait".to_owned()),
            inlined: true,
            position: position(7),
        };
        let own = SourceFrame { function: None, inlined: false, position: position(1219) };
        let text = shown(|out| frame(10, &Row { source: vec![inlined, own], ..row(None) }, out));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("[inlined]") && lines[0].ends_with("fs/fuse/dev.c:7"));
        assert!(lines[1].starts_with("#10 [") && lines[1].ends_with("fs/fuse/dev.c:1219"));
    }

    #[test]
    fn registers_stand_three_in_a_row_above_the_frame_they_belong_to() {
        let register = |name, digits| Register { name, value: 0x33, digits };
        let registers =
            vec![register("R8", 16), register("RFLAGS", 8), register("CS", 4), register("SS", 4)];
        let exception = ExceptionFrame { at: VirtAddr(0), user: false, registers };
        let text = shown(|out| frame(0, &row(Some(exception)), out));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "    [exception R8: fuse_dev_do_read+0xa29 [fuse]]");
        assert_eq!(lines[1], "     R8: 0000000000000033  RFLAGS: 00000033  CS: 0033");
        assert_eq!(lines[2], "    SS: 0033");
        assert!(lines[3].starts_with(" #0 ["));
    }

    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(date(0), "Thu Jan  1 00:00:00 UTC 1970");
        assert_eq!(date(951_782_400), "Tue Feb 29 00:00:00 UTC 2000");
        assert_eq!(date(1_795_398_830), "Mon Nov 23 01:53:50 UTC 2026");
        assert_eq!(date(4_107_542_399), "Sun Feb 28 23:59:59 UTC 2100");
    }

    #[test]
    fn sizes_and_durations_are_short() {
        assert_eq!(size(512), "512 bytes");
        assert_eq!(size(464 << 20), "464.0 MiB");
        assert_eq!(duration(6), "00:00:06");
        assert_eq!(duration(86400 * 3 + 3661), "3 days, 01:01:01");
    }
}
