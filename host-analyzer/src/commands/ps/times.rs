//! `ps -t`, `-l` and `-m`: when tasks ran.

use std::cmp::Reverse;
use std::io::Write;

use serde_json::json;

use crate::linux::Linux;
use crate::linux::process::Process;
use crate::linux::times::{Times, TimesLayout};
use crate::render::text;
use crate::{Error, ReadError};

const SECOND: u64 = 1_000_000_000;

/// A task, the CPU that was running it, and its times.
type Timed<'p> = (&'p Process, Option<u32>, Result<Times, ReadError>);

/// How times are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// Each task's.
    Each,
    /// When each last ran, the last one first.
    LastRun,
    /// The same, as how long ago that was.
    SinceLastRun,
}

/// Shows `processes`, each with the CPU that was running it.
///
/// # Errors
/// Those of [`TimesLayout::new`], [`Error::Output`].
pub(super) fn show(
    linux: &Linux<'_, '_>,
    processes: &[(&Process, Option<u32>)],
    view: View,
    as_json: bool,
    out: &mut dyn Write,
) -> Result<Option<serde_json::Value>, Error> {
    let kernel = linux.kernel();
    let layout = TimesLayout::new(kernel)?;
    let timed = processes.iter().map(|&(process, running_on)| {
        (process, running_on, layout.read(kernel, process.task.address))
    });
    let mut timed: Vec<Timed<'_>> = timed.collect();
    if view != View::Each {
        // Those that cannot be read stand at the end.
        timed.sort_by_key(|(.., times)| Reverse(times.ok().map(|times| times.last_run)));
    }
    if as_json {
        return Ok(Some(timed.iter().map(|it| document(linux, it)).collect()));
    }
    match view {
        View::Each => {
            let uptime = linux.clock().ok().map(|clock| clock.uptime);
            timed.iter().try_for_each(|it| each(it, uptime, out))?;
        }
        View::LastRun | View::SinceLastRun => {
            let stamp = |it: &Timed<'_>| match (view, it.2) {
                (View::LastRun, Ok(times)) => times.last_run.to_string(),
                (_, Ok(_)) => since(linux, it).map_or_else(|| "?".to_owned(), ago),
                (_, Err(_)) => "?".to_owned(),
            };
            let stamps: Vec<String> = timed.iter().map(stamp).collect();
            let width = stamps.iter().map(String::len).max().unwrap_or(0);
            for (stamp, (process, ..)) in stamps.iter().zip(&timed) {
                write!(out, "[{stamp:>width$}] [{}]  ", process.task.state().short)?;
                text::task(&process.task, out)?;
            }
        }
    }
    Ok(None)
}

/// How long before the last tick of its CPU's clock a task was given that CPU, in nanoseconds.
fn since(linux: &Linux<'_, '_>, (process, running_on, times): &Timed<'_>) -> Option<u64> {
    let clock = linux.scheduler_clock(running_on.unwrap_or(process.task.cpu)).ok()?;
    // The clock only moves when somebody asks it to.
    Some(clock.saturating_sub(times.ok()?.last_run))
}

fn ago(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds % SECOND / 1_000_000;
    let seconds = nanoseconds / SECOND;
    let (days, time) = (seconds / 86400, text::duration(seconds % 86400));
    format!("{days} {time}.{milliseconds:03}")
}

fn each(
    (process, _, times): &Timed<'_>,
    uptime: Option<u64>,
    out: &mut dyn Write,
) -> Result<(), Error> {
    text::task(&process.task, out)?;
    match times {
        Ok(times) => {
            let started = times.started / SECOND;
            let run = uptime.map(|uptime| text::duration(uptime.saturating_sub(started)));
            writeln!(out, "    RUN TIME: {}", run.unwrap_or_else(|| "?".to_owned()))?;
            writeln!(out, "  START TIME: {started}")?;
            writeln!(out, "       UTIME: {}", times.user)?;
            writeln!(out, "       STIME: {}\n", times.system)?;
        }
        Err(error) => writeln!(out, "  its times: {error}\n")?,
    }
    Ok(())
}

fn document(linux: &Linux<'_, '_>, it: &Timed<'_>) -> serde_json::Value {
    let (process, running_on, times) = it;
    let mut document = super::document(process, *running_on);
    let times = times.ok();
    document["start_time"] = json!(times.map(|it| it.started));
    document["utime"] = json!(times.map(|it| it.user));
    document["stime"] = json!(times.map(|it| it.system));
    document["last_run"] = json!(times.map(|it| it.last_run));
    document["since_last_run"] = json!(since(linux, it));
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_since_a_task_ran_has_days_and_milliseconds() {
        assert_eq!(ago(0), "0 00:00:00.000");
        assert_eq!(ago(2 * 86400 * SECOND + 3_661 * SECOND + 5_999_999), "2 01:01:01.005");
    }
}
