//! Backtraces as JSON. The names of the fields are part of the program's interface: docs/json.md.

use std::io::Write;

use serde_json::{Map, Value, json};

use crate::kernel::Kernel;
use crate::kernel::dwarf::SourceFrame;
use crate::render::text;
use crate::source::Completeness;
use crate::unwind::{CallerBy, End, ExceptionFrame};
use crate::{Error, VirtAddr};

use super::variables::own_variables;
use super::{Backtrace, OfFunction, Owner, Row, Wanted};

/// Writes all of them as one document.
///
/// # Errors
/// [`Error::Output`].
pub fn write(
    kernel: &Kernel<'_>,
    traces: &[Backtrace],
    wanted: Wanted,
    panic: Option<&str>,
    problems: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let incomplete = match kernel.dump().completeness() {
        Completeness::Complete => None,
        Completeness::Incomplete(why) => Some(why),
    };
    let traces: Vec<Value> = traces.iter().map(|it| backtrace(it, wanted)).collect();
    let document = json!({"incomplete": incomplete, "panic": panic, "problems": problems,
        "backtraces": traces});
    text::json(&document, out)
}

fn address(at: VirtAddr) -> String {
    format!("{:#x}", at.0)
}

fn backtrace(trace: &Backtrace, wanted: Wanted) -> Value {
    let (mut map, cpu) = (Map::new(), trace.running_on);
    let mut put = |name: &str, value: Value| drop(map.insert(name.to_owned(), value));
    match &trace.owner {
        Owner::Task(task) => {
            put("pid", task.pid.into());
            put("tgid", task.tgid.into());
            put("command", task.comm.clone().into());
            put("task", address(task.address).into());
            put("cpu", cpu.unwrap_or(task.cpu).into());
        }
        Owner::Torn { address: at, why } => {
            put("task", address(*at).into());
            put("cpu", cpu.into());
            put("problem", why.clone().into());
        }
        Owner::Registers { pid, why } => {
            put("pid", (*pid).into());
            put("cpu", cpu.into());
            put("problem", why.clone().into());
        }
    }
    put("running", cpu.is_some().into());
    put("frames", trace.rows.iter().map(|it| frame(it, wanted)).collect());
    put("end", end(&trace.end));
    map.into()
}

fn frame(row: &Row, wanted: Wanted) -> Value {
    let own = row.source.iter().find(|it| !it.inlined);
    let inlined = row.source.iter().enumerate().filter(|(_, it)| it.inlined);
    let inlined = inlined.map(|(index, it)| with(source(it), row.variables.get(index), wanted));
    let inlined: Vec<Value> = inlined.collect();
    let place = row.place.as_ref();
    let caller = match row.frame.caller {
        CallerBy::Tables => "tables",
        CallerBy::CallSite => "call-site",
        CallerBy::FramePointer => "frame-pointer",
        CallerBy::Scan => "scan",
        CallerBy::LinkRegister => "link-register",
        CallerBy::Uncertain => "uncertain",
    };
    let document = json!({
        "pc": address(row.frame.pc),
        "at": address(row.frame.at),
        "function": place.map(|it| &it.name),
        "offset": place.map(|it| it.offset),
        "module": place.and_then(|it| it.module.as_ref()),
        "file": own.and_then(|it| it.position.file.as_ref()),
        "line": own.map(|it| it.position.line).filter(|&line| line != 0),
        "inlined": inlined,
        "left_stack": row.left_stack,
        "exception": row.frame.exception.as_ref().map(registers),
        "caller_by": caller,
    });
    with(document, own_variables(&row.source, &row.variables), wanted)
}

/// A function with its variables, if they are wanted.
fn with(mut document: Value, variables: Option<&OfFunction>, wanted: Wanted) -> Value {
    let none = OfFunction::default();
    let fields = variables.unwrap_or(&none).json(wanted);
    if let Some(map) = document.as_object_mut() {
        map.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
    }
    document
}

fn source(frame: &SourceFrame) -> Value {
    let line = Some(frame.position.line).filter(|&line| line != 0);
    json!({"function": frame.function, "file": frame.position.file, "line": line})
}

fn registers(frame: &ExceptionFrame) -> Value {
    let one = |it: &crate::unwind::Register| (it.name.to_lowercase(), format!("{:#x}", it.value));
    let all: Map<String, Value> =
        frame.registers.iter().map(one).map(|(name, value)| (name, value.into())).collect();
    json!({"at": address(frame.at), "user": frame.user, "registers": all})
}

fn end(end: &End) -> Value {
    match end {
        End::UserMode(frame) => json!({"at": "user mode", "exception": registers(frame)}),
        End::KernelThread => json!({"at": "kernel thread"}),
        End::Stuck(why) => json!({"at": "stuck", "problem": why}),
    }
}
