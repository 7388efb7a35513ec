//! What `host-analyzer ps` and `mod` print, read back.

use anyhow::{Context, Result, ensure};

use crate::peers::{DrgnModule, DrgnTask};

/// The rows of `ps` but those of idle tasks, as drgn would tell them.
///
/// # Errors
/// When a line is no row.
pub fn tasks(text: &str) -> Result<Vec<DrgnTask>> {
    let mut lines = text.lines();
    let names = lines.next().context("no output")?;
    let order: Vec<&str> = names.split_whitespace().collect();
    ensure!(order == ["PID", "PPID", "CPU", "TASK", "ST", "VSZ", "RSS", "COMM"], "{names}");
    let rows = lines.map(|line| task(line).with_context(|| format!("no task: {line:?}")));
    let rows: Vec<DrgnTask> = rows.collect::<Result<_>>()?;
    Ok(rows.into_iter().filter(|row| row.0 != 0).collect())
}

/// `>    1     0    0  ff304478811f0000  RU  2260  1788  init`
fn task(line: &str) -> Option<DrgnTask> {
    let mut words = line.trim_start_matches('>').split_whitespace();
    let mut number = || words.next()?.parse().ok();
    let (pid, parent, _cpu): (u32, u32, u32) = (number()?, number()?, number()?);
    let _address = u64::from_str_radix(words.next()?, 16).ok()?;
    let state = match words.next()? {
        "RU" => "R",
        "IN" => "S",
        "UN" => "D",
        "ID" => "I",
        "ST" => "T",
        "TR" => "t",
        "PA" => "P",
        "ZO" => "Z",
        "DE" => "X",
        _ => return None,
    };
    let mapped = words.next()?;
    let resident = words.next()?;
    let memory = match mapped {
        "-" => None,
        _ => Some((mapped.parse().ok()?, resident.parse().ok()?)),
    };
    let comm = words.collect::<Vec<_>>().join(" ");
    let inner = comm.strip_prefix('[').and_then(|comm| comm.strip_suffix(']'));
    let name = inner.map(str::to_owned).unwrap_or(comm);
    Some((pid, name, state.to_owned(), parent, memory))
}

/// The rows of `mod`, as drgn would tell them.
///
/// # Errors
/// When a line is no row.
pub fn modules(text: &str) -> Result<Vec<DrgnModule>> {
    let mut lines = text.lines();
    let names = lines.next().context("no output")?;
    // The taints of a row may be empty, and then its column must be known.
    let taints = names.find("TAINTS").with_context(|| format!("no TAINTS in {names:?}"))?;
    let users = names.find("USED BY").with_context(|| format!("no USED BY in {names:?}"))?;
    lines
        .map(|line| module(line, taints, users).with_context(|| format!("no module: {line:?}")))
        .collect()
}

fn module(line: &str, taints: usize, users: usize) -> Option<DrgnModule> {
    let mut words = line.get(..taints).unwrap_or(line).split_whitespace();
    let name = words.next()?.to_owned();
    let base = u64::from_str_radix(words.next()?, 16).ok()?;
    let (size, references) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let users = line.get(users..).unwrap_or_default().split(", ").map(str::to_owned);
    Some((name, base, size, references, users.filter(|user| !user.is_empty()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_ps_are_read_with_and_without_a_mark() {
        let text = "   PID  PPID  CPU  TASK  ST  VSZ  RSS  COMM\n\
                    >    1     0    0  ff30  RU  2260  1788  init\n\
                     7     2    0  ff31  ID     -     -  [kworker/0:0]\n";
        let init = (1, "init".to_owned(), "R".to_owned(), 0, Some((2260, 1788)));
        let worker = (7, "kworker/0:0".to_owned(), "I".to_owned(), 2, None);
        assert_eq!(tasks(text).unwrap(), [init, worker]);
    }

    #[test]
    fn rows_of_mod_are_read_with_and_without_users() {
        let text = "NAME  BASE  SIZE  USERS  TAINTS  USED BY\n\
                    fuse  ff00  4096      2\n\
                    ring  ff10  8192      1          fuse, blk\n";
        let users = vec!["fuse".to_owned(), "blk".to_owned()];
        let expected = [
            ("fuse".to_owned(), 0xff00, 4096, 2, Vec::new()),
            ("ring".to_owned(), 0xff10, 8192, 1, users),
        ];
        assert_eq!(modules(text).unwrap(), expected);
    }
}
