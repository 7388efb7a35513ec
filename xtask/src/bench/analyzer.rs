//! `cargo xtask bench-analyzer`: our backtrace of the crashed thread against drgn's, on the same
//! dump with the same vmlinux. It prints and judges nothing.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::dump::Workbench;
use crate::process;
use crate::programs::{Analyzer, Profile};
use crate::workspace;

/// Runs of each program, taken in turns so that a busy machine hurts both.
const RUNS: usize = 5;

/// What drgn is asked to do: start, and unwind the thread that crashed.
pub const DRGN_BACKTRACE: &str = "\
import sys, drgn
program = drgn.Program()
program.set_core_dump(sys.argv[1])
program.load_debug_info([sys.argv[2]])
print(program.crashed_thread().stack_trace())
";

/// Makes a dump, measures, prints every run, medians and the ratio.
///
/// # Errors
/// When the dump cannot be made or one of the programs fails.
pub fn run() -> Result<()> {
    let bench = Workbench::new("x86_64")?;
    let scenario = bench.scenario();
    let vmlinux = bench.vmlinux(&scenario)?;
    let directory = workspace().join("target/bench-analyzer");
    let dump = bench.dump(&scenario, &directory)?;
    let analyzer = Analyzer::build(Profile::Release)?;
    let drgn = bench.fixtures.python("drgn")?.join("python3");

    let mut ours = || analyzer.command(&["bt"], &dump, Some(&vmlinux));
    let mut theirs = || {
        let mut command = Command::new(&drgn);
        command.args(["-c", DRGN_BACKTRACE]).arg(&dump).arg(&vmlinux);
        command
    };
    // Once each before it counts: the page cache is then warm for both.
    time(&mut ours)?;
    time(&mut theirs)?;
    let (mut our_times, mut their_times) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        our_times.push(time(&mut ours)?);
        their_times.push(time(&mut theirs)?);
    }
    println!(
        "start and backtrace of the crashed thread, {}, wall time",
        describe(&dump, &vmlinux)?
    );
    println!("  host-analyzer  {}", row(&mut our_times));
    println!("  drgn           {}", row(&mut their_times));
    let ratio = super::median(&our_times).as_secs_f64() / super::median(&their_times).as_secs_f64();
    println!("  host-analyzer takes {ratio:.2} of drgn's time");
    Ok(())
}

fn time(command: &mut dyn FnMut() -> Command) -> Result<Duration> {
    let start = Instant::now();
    process::run(&mut command())?;
    Ok(start.elapsed())
}

/// The times in the order of the runs, and the median; sorts them.
fn row(times: &mut [Duration]) -> String {
    let mut row: String =
        times.iter().map(|time| format!("{:>7.3} s", time.as_secs_f64())).collect();
    times.sort_unstable();
    row += &format!("   median {:.3} s", super::median(times).as_secs_f64());
    row
}

fn describe(dump: &Path, vmlinux: &Path) -> Result<String> {
    let mib = |path: &Path| path.metadata().map(|metadata| metadata.len() >> 20);
    Ok(format!("dump of {} MiB, vmlinux of {} MiB", mib(dump)?, mib(vmlinux)?))
}
