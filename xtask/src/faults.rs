//! `cargo xtask fault-matrix`: everything that may go wrong, and what becomes of the dump then.
//!
//! Each row is a boot test, which checks far more than the table says: that the dump is exact or says what it
//! lacks, that nothing outside of the area was written to. What the table shows is what the payload said on the
//! console of that very run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::workspace;

/// The rows: `tests/faults.toml`.
#[derive(Deserialize)]
struct Matrix {
    fault: Vec<Fault>,
}

/// A boot test in which something goes wrong.
#[derive(Deserialize)]
struct Fault {
    /// What does.
    what: String,
    /// The test program.
    program: String,
    /// The test in it.
    test: String,
    /// Where under `target/boot-tests` it leaves its console.
    directory: String,
}

/// Runs the tests, and prints the table.
///
/// # Errors
/// When a test fails, or left no console.
pub fn run() -> Result<()> {
    let list = workspace().join("tests/faults.toml");
    let text = std::fs::read_to_string(&list)
        .with_context(|| format!("cannot read {}", list.display()))?;
    let matrix: Matrix = toml::from_str(&text).with_context(|| format!("{}", list.display()))?;
    let mut programs = BTreeMap::<_, Vec<_>>::new();
    for Fault { program, test, .. } in &matrix.fault {
        programs.entry(program).or_default().push(test);
    }
    for (program, tests) in programs {
        let output = Command::new(env!("CARGO"))
            .current_dir(workspace())
            .args(["test", "--quiet", "--package", "tests", "--test", program, "--", "--exact"])
            .args(&tests)
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "a test of `{program}` failed:\n{said}");
        let passed = format!("{} passed", tests.len());
        ensure!(said.contains(&passed), "`{program}` has not all of {tests:#?}:\n{said}");
    }
    println!("| what goes wrong | the dump | crash card | in the end |");
    println!("|---|---|---|---|");
    for Fault { what, directory, .. } in &matrix.fault {
        let log = workspace().join("target/boot-tests").join(directory).join("serial.log");
        let Told { dump, card, end } = told(&log)?;
        println!("| {what} | {dump} | {card} | {end} |");
    }
    Ok(())
}

/// What a payload told.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    dump: String,
    card: &'static str,
    end: String,
}

fn told(log: &Path) -> Result<Told> {
    let bytes = std::fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let said = text.lines().filter_map(|line| Some(line.split_once("] tinykdump: ")?.1));
    of_lines(&said.collect::<Vec<_>>())
}

fn of_lines(lines: &[&str]) -> Result<Told> {
    let after = |start: &str| lines.iter().find_map(|line| line.strip_prefix(start));
    let end = lines.iter().rev().find(|line| line.starts_with("rebooting"));
    let end = end.context("the payload did not say that it reboots")?;
    let unreadable = lines.iter().find_map(|line| {
        let (_, rest) = line.split_once(" pages read, ")?;
        rest.split_once(" unreadable").map(|(count, _)| count).filter(|count| *count != "0")
    });
    let is_complete = lines.contains(&"complete");
    let mut dump = if is_complete { "complete" } else { "not complete" }.to_owned();
    if let Some(count) = unreadable {
        dump += &format!(", {count} pages missing");
    }
    if let Some(why) = after("this target has no dump: ").filter(|_| is_complete) {
        dump += &format!("; the first target: {why}");
    }
    let has = |text: &str| lines.iter().any(|line| line.contains(text));
    let card = match has("the crash card is beside the unsaved dump") {
        true => "on the console, and beside the unsaved dump",
        false if has("writing ") && !has("takes no crash card") || end.contains("reason 4:") => {
            "on the console, and on the disk"
        }
        false if has("end of the crash card") => "on the console",
        false => "none",
    };
    Ok(Told { dump, card, end: (*end).to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_payload_told_becomes_a_row() {
        let lines = [
            "end of the crash card",
            "disk 0000:00:01.0: the disk did not answer in time",
            "this target has no dump: the disk did not answer in time",
            "writing 509 MiB in 3 ranges to area 0",
            "130000 pages read, 2 unreadable, 0 headers dropped",
            "complete",
            "rebooting",
        ];
        let told = of_lines(&lines).unwrap();
        let dump = "complete, 2 pages missing; the first target: the disk did not answer in time";
        assert_eq!((told.dump.as_str(), told.end.as_str()), (dump, "rebooting"));
        assert_eq!(told.card, "on the console, and on the disk");
        let told = of_lines(&["rebooting after reason 18: no disk"]).unwrap();
        assert_eq!((told.dump.as_str(), told.card), ("not complete", "none"));
        assert!(of_lines(&["complete"]).is_err(), "a payload that says no more has not rebooted");
    }
}
