//! Arguments and local variables of frames.

use serde_json::json;

use crate::kernel::dwarf::{Missing, Origin, SourceFrame, Variable, Variables, View, World};
use crate::kernel::machine::Machine;
use crate::kernel::registers;
use crate::kernel::types::Types;
use crate::linux::Linux;
use crate::render::value::{Radix, Values};
use crate::unwind::arguments::{Argument, NOT_INTERRUPTED};
use crate::unwind::{self, Frame, Unwinder};

/// Which variables are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Arguments.
    pub arguments: bool,
    /// Local variables.
    pub locals: bool,
}

impl Wanted {
    /// Whether any are.
    #[must_use]
    pub fn any(self) -> bool {
        self.arguments || self.locals
    }
}

/// A variable, ready to be shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// Its name; empty when it has none.
    pub name: String,
    /// Its type, in C.
    pub kind: String,
    /// How C declares it.
    pub declaration: String,
    /// Its value as text; none when it is not known.
    pub text: Option<String>,
    /// Its value as JSON; `null` when it is not known.
    pub json: serde_json::Value,
    /// Where it is from, or why it is not known.
    pub from: String,
}

/// The variables of a function.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OfFunction {
    /// Its arguments, if they are wanted.
    pub arguments: Vec<Shown>,
    /// Its local variables, if they are.
    pub locals: Vec<Shown>,
    /// Why its arguments cannot be told, when they are wanted.
    pub problem: Option<String>,
}

/// The variables of each frame: a set for each of its `source` functions, or one for its function where no debug
/// information has it.
#[must_use]
pub fn of_frames(
    linux: &Linux<'_, '_>,
    unwinder: &dyn Unwinder,
    frames: &[Frame],
    wanted: Wanted,
) -> Vec<Vec<OfFunction>> {
    let views = unwind::views::views(linux.kernel(), unwinder, frames);
    let frame = |index: usize| {
        let described = described(linux, &views, index, wanted);
        match described.is_empty() && wanted.arguments {
            true => vec![by_convention(linux, &frames[index], frames.get(index + 1))],
            false => described,
        }
    };
    (0..frames.len()).map(frame).collect()
}

/// What debug information says of the frame `index`; nothing when there is none for it.
fn described(
    linux: &Linux<'_, '_>,
    views: &[View],
    index: usize,
    wanted: Wanted,
) -> Vec<OfFunction> {
    let kernel = linux.kernel();
    let Some(debug) = kernel.debug_info() else { return Vec::new() };
    let world = World { memory: kernel.memory(), machine: kernel.machine(), frames: views };
    let values = Values { linux, radix: Radix::Decimal };
    let shown = |variable: &Variable| {
        let (value, from) = match &variable.value {
            Ok((raw, origin)) => {
                (Some(debug.value(variable.kind, raw)), place(kernel.machine(), *origin))
            }
            Err(missing) => (None, reason(kernel.machine(), *missing)),
        };
        show(
            &values,
            Argument {
                name: variable.name.clone(),
                kind: debug.type_name(variable.kind),
                declaration: debug.declare(variable.kind, &variable.name),
                value,
                from,
            },
        )
    };
    let all = |wanted: bool, variables: &[Variable]| match wanted {
        true => variables.iter().map(shown).collect(),
        false => Vec::new(),
    };
    let function = |it: &Variables| OfFunction {
        arguments: all(wanted.arguments, &it.arguments),
        locals: all(wanted.locals, &it.locals),
        problem: None,
    };
    debug.variables(world, index).iter().map(function).collect()
}

/// The arguments that the registers of a frame still have, by BTF and the calling convention.
fn by_convention(linux: &Linux<'_, '_>, frame: &Frame, caller: Option<&Frame>) -> OfFunction {
    let values = Values { linux, radix: Radix::Decimal };
    match unwind::arguments::arguments(linux, frame, caller) {
        Ok(arguments) => OfFunction {
            arguments: arguments.into_iter().map(|argument| show(&values, argument)).collect(),
            ..OfFunction::default()
        },
        Err(why) => OfFunction { problem: Some(why), ..OfFunction::default() },
    }
}

fn show(values: &Values<'_, '_, '_>, it: Argument) -> Shown {
    Shown {
        text: it.value.as_ref().map(|value| values.text(value, INDENT)),
        json: it.value.as_ref().map_or(serde_json::Value::Null, |value| values.json(value)),
        name: it.name,
        kind: it.kind,
        declaration: it.declaration,
        from: it.from,
    }
}

/// Columns in front of a variable.
const INDENT: usize = 8;

fn place(machine: Machine, origin: Origin) -> String {
    match origin {
        Origin::Register(number) => registers::name(machine, number),
        Origin::Memory(at) => format!("at {at:x}"),
        Origin::LikelyMemory(at) => format!("at {at:x}, if the caller called this directly"),
        Origin::Computed => "computed".to_owned(),
        Origin::Entry => "as the caller passed it".to_owned(),
        Origin::LikelyEntry => "as the caller passed it, if it called this directly".to_owned(),
        Origin::Constant => "constant".to_owned(),
        Origin::Parts => "in parts".to_owned(),
        Origin::LikelyParts => "in parts, if the caller called this directly".to_owned(),
    }
}

fn reason(machine: Machine, missing: Missing) -> String {
    match missing {
        Missing::OptimizedOut => "optimized out".to_owned(),
        Missing::Register(number) => {
            format!("was in {}, which is not known here", registers::name(machine, number))
        }
        Missing::Memory(at) => format!("at {at:x}, which is not in the dump"),
        Missing::Entry => "was passed in a register that is not known any more".to_owned(),
        Missing::Unclear => "its place cannot be told".to_owned(),
    }
}

impl OfFunction {
    /// The lines that stand below a function.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let line = |what: &'static str| {
            move |it: &Shown| {
                let value = it.text.as_deref().map(|text| format!(" = {text}"));
                let value = value.unwrap_or_else(|| " = ?".to_owned());
                format!("{:INDENT$}{what} {}{value}  [{}]", "", it.declaration, it.from)
            }
        };
        // That it was not interrupted is seen.
        let problem = self.problem.iter().filter(|why| *why != NOT_INTERRUPTED);
        let problem = problem.map(|why| format!("{:INDENT$}args  ?  [{why}]", ""));
        let known = self.arguments.iter().map(line("arg  "));
        problem.chain(known).chain(self.locals.iter().map(line("local")))
    }

    /// The fields that JSON has for it.
    #[must_use]
    pub fn json(&self, wanted: Wanted) -> Vec<(&'static str, serde_json::Value)> {
        let one = |it: &Shown| json!({"name": it.name, "type": it.kind, "value": it.json, "from": it.from});
        let all = |list: &[Shown]| list.iter().map(one).collect::<serde_json::Value>();
        let arguments = wanted.arguments.then(|| ("arguments", all(&self.arguments)));
        let locals = wanted.locals.then(|| ("locals", all(&self.locals)));
        let problem = wanted.arguments.then(|| ("arguments_problem", json!(self.problem)));
        arguments.into_iter().chain(problem).chain(locals).collect()
    }
}

/// The variables of the function of a frame itself, not of those inlined into it.
#[must_use]
pub fn own_variables<'v>(
    source: &[SourceFrame],
    variables: &'v [OfFunction],
) -> Option<&'v OfFunction> {
    match source.iter().position(|it| !it.inlined) {
        Some(index) => variables.get(index),
        None => variables.last(),
    }
}
