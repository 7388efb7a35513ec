//! Arguments and local variables as drgn reads them, to compare with what `host-analyzer bt` says.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::fixtures::Fixtures;

use crate::objects::{PLAIN, difference};
use crate::peers::drgn_says;

/// By task: its frames, each with program counter, function and variables. Of structures that lie in
/// registers only that they are known is told.
const SCRIPT: &str = "\
def read(frame, name):
    try:
        it = frame[name]
        if it.absent_:
            return None
        if it.address_ is None and bare(it.type_).kind in (TypeKind.STRUCT, TypeKind.UNION, TypeKind.ARRAY):
            return dict(known=True)
        return dict(value=plain(it))
    except (drgn.FaultError, LookupError):
        return None
def variables(frame):
    return {name: read(frame, name) for name in frame.locals()}
def seen(trace):
    return [(f.pc, f.name, variables(f)) for f in trace if f.pc >> 63]
print(json.dumps({hex(task.value_()): seen(program.stack_trace(task)) for task in for_each_task(program)}))
";

/// A frame, as drgn sees it: its program counter, its function, and by name what it reads of its variables.
type DrgnFrame = (u64, Option<String>, BTreeMap<String, Option<Value>>);

/// How many variables were compared.
#[derive(Debug, Default)]
pub struct Compared {
    /// drgn reads the same value.
    pub equal: usize,
    /// Structures that drgn reads out of registers, and so do we.
    pub in_registers: usize,
    /// Nobody knows a value.
    pub unknown: usize,
    /// drgn knows none, we do: what was passed by a caller.
    pub passed: usize,
}

/// Compares the variables of all tasks in what `bt --args --locals --all-tasks --json` said with what drgn
/// reads. Frames are paired as long as they are the same: whether they are is compared elsewhere.
///
/// # Errors
/// At the first variable that only one of them has, or that has two values.
pub fn compare(fixtures: &Fixtures, dump: &Path, vmlinux: &Path, ours: &Value) -> Result<Compared> {
    let script = format!("{PLAIN}{SCRIPT}");
    let theirs: BTreeMap<String, Vec<DrgnFrame>> = drgn_says(fixtures, &script, dump, vmlinux)?;
    let mut compared = Compared::default();
    for trace in ours["backtraces"].as_array().context("no backtraces")? {
        let Some(theirs) = theirs.get(trace["task"].as_str().context("no task")?) else { continue };
        let frames = trace["frames"].as_array().context("no frames")?;
        // drgn has the inlined ones before the one that they are in, each with the same address.
        let frames = frames.iter().flat_map(|frame| {
            let inlined = frame["inlined"].as_array().into_iter().flatten();
            inlined.chain([frame]).map(|it| (&frame["pc"], it))
        });
        for ((pc, frame), (their_pc, function, variables)) in frames.zip(theirs) {
            let name = frame["function"].as_str().unwrap_or_default();
            let same = function.as_deref().is_some_and(|it| stem(it) == stem(name));
            if !same || pc.as_str() != Some(&format!("{their_pc:#x}")) {
                break;
            }
            one(frame, variables, &mut compared).with_context(|| {
                format!("in {name} of task {}: ours {frame:#}, drgn's {variables:#?}", trace["pid"])
            })?;
        }
    }
    Ok(compared)
}

/// A function's name without what compilers put behind it.
fn stem(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

fn one(
    frame: &Value,
    theirs: &BTreeMap<String, Option<Value>>,
    compared: &mut Compared,
) -> Result<()> {
    let lists = ["arguments", "locals"].map(|list| frame[list].as_array().into_iter().flatten());
    // Of several with one name, drgn has that of the innermost block, which comes last.
    let ours: BTreeMap<&str, &Value> = lists
        .into_iter()
        .flatten()
        .filter_map(|it| Some((it["name"].as_str()?, it)))
        .filter(|(name, _)| !name.is_empty())
        .collect();
    let names: Vec<&str> = ours.keys().copied().collect();
    ensure!(names.iter().eq(theirs.keys()), "not the same variables");
    for (name, ours) in ours {
        let from = ours["from"].as_str().context("from nowhere")?;
        match &theirs[name] {
            None if ours["value"].is_null() => compared.unknown += 1,
            None => {
                ensure!(from.contains("as the caller passed it"), "{name} is not known to drgn");
                compared.passed += 1;
            }
            Some(known) => match known.get("value") {
                None => {
                    ensure!(!ours["value"].is_null(), "{name} is not known");
                    compared.in_registers += 1;
                }
                Some(value) => {
                    let difference = difference(&ours["value"], value);
                    ensure!(difference.is_none(), "{name}: {}", difference.unwrap_or_default());
                    compared.equal += 1;
                }
            },
        }
    }
    Ok(())
}
