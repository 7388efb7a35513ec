//! `whatis`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::Error;
use crate::kernel::Kernel;
use crate::kernel::btf::Btf;
use crate::kernel::types::{Type, TypeId, Types};
use crate::linux::Linux;
use crate::render::text;
use crate::render::value::declaration;

/// What a name stands for: a type, a function's prototype, an enumeration's constants
///
/// Functions and per-CPU variables have types in BTF; other variables have them from 6.14 on, where the
/// kernel was built so. What the kernel itself does not describe is looked for in the modules.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Show the offsets of a structure's members, in bytes
    #[arg(short, long)]
    pub offsets: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// [`Error::NoSuchType`], [`Error::Usage`], [`Error::NoTypes`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    if words.is_empty() {
        return Err(Error::Usage("what is what? Write a name, as in `whatis panic`".to_owned()));
    }
    let linux = Linux::new(kernel);
    // `struct list_head` is what people copy out of sources.
    let keyword = matches!(words[0].as_str(), "struct" | "union" | "enum");
    let names = if keyword { &words[1..] } else { words };
    for name in names {
        let types = linux.types_that(|types| !types.named(name, |_| true).is_empty())?;
        let found = types.named(name, |_| true);
        let shown: Vec<String> =
            found.iter().map(|&id| describe(&types, id, name, options)).collect();
        if shown.is_empty() {
            let hint = match kernel.symbol(name)? {
                Some(at) => format!(", and nothing tells the type of the symbol at {:016x}", at.0),
                None => String::new(),
            };
            return Err(Error::NoSuchType(name.clone(), hint));
        }
        if options.json {
            text::json(&json!({"name": name, "declarations": shown}), out)?;
        } else {
            write!(out, "{}", shown.concat())?;
        }
    }
    Ok(())
}

fn describe(types: &Btf<'_>, id: TypeId, name: &str, options: &Options) -> String {
    match types.get(id) {
        Type::Structure(structure) => declaration(types, &structure, options.offsets.then_some(0)),
        Type::Enumeration(it) => {
            let value = |(name, value): &(String, i64)| format!("    {name} = {value},\n");
            let values: String = it.values.iter().map(value).collect();
            format!("enum {name} {{\n{values}}}\nSIZE: {}\n", it.size)
        }
        Type::Typedef(_, inner) => {
            let size = types.size_of(inner).map(|size| format!("SIZE: {size}\n"));
            format!("typedef {};\n{}", types.declare(inner, name), size.unwrap_or_default())
        }
        Type::Function(_, prototype) | Type::Variable(_, prototype) => {
            types.declare(prototype, name) + ";\n"
        }
        _ => types.type_name(id) + ";\n",
    }
}
