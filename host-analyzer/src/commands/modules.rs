//! `mod`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::module::Module;
use crate::linux::module_use::{ModuleUse, UseLayout};
use crate::render::table::{Align, table};
use crate::render::text;
use crate::{Error, ReadError};

/// The loaded modules
///
/// As /proc/modules shows them: where the text begins, bytes of all parts, how many use it and which
/// modules are among them, and letters of the taints. `?` is what could not be read, `-` what does not
/// exist.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

const COLUMNS: [(&str, Align); 6] = [
    ("NAME", Align::Left),
    ("BASE", Align::Left),
    ("SIZE", Align::Right),
    ("USERS", Align::Right),
    ("TAINTS", Align::Left),
    ("USED BY", Align::Left),
];

/// Runs the command. A module that cannot be read costs its row.
///
/// # Errors
/// [`Error::NoModules`] when there is nothing to show, [`Error::NoTypes`], [`Error::NoMember`],
/// [`Error::Output`].
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let modules = linux.modules();
    if modules.list.is_empty() && !modules.problems.is_empty() {
        return Err(Error::NoModules(modules.problems.join("; ")));
    }
    let layout = UseLayout::new(kernel)?;
    if options.json {
        let one = |module: &Module| document(module, layout.read(kernel, module));
        let all: Vec<_> = modules.list.iter().map(one).collect();
        return text::json(&json!({"modules": all, "problems": modules.problems}), out);
    }
    text::completeness(kernel.dump(), out)?;
    let of = |module: &Module| row(module, layout.read(kernel, module));
    let rows: Vec<_> = modules.list.iter().map(of).collect();
    table(COLUMNS, &rows, out)?;
    text::problems(&modules.problems, out)
}

fn document(module: &Module, used: ModuleUse) -> serde_json::Value {
    json!({"name": module.name, "base": format!("{:#x}", module.start.0),
        "address": format!("{:#x}", module.address.0), "size": used.size.ok(),
        "users": used.references.ok().flatten(), "used_by": used.users,
        "taints": used.taints.ok(), "state": used.state.unwrap_or("Live")})
}

fn row(module: &Module, used: ModuleUse) -> [String; 6] {
    let unknown = |_: ReadError| "?".to_owned();
    let mut users = used.users;
    users.extend(used.users_missing.map(|_| "?".to_owned()));
    users.extend(used.state.map(|state| format!("({state})")));
    let references = used.references.map_or_else(unknown, |count| {
        count.map_or_else(|| "-".to_owned(), |count| count.to_string())
    });
    [
        module.name.clone(),
        format!("{:016x}", module.start),
        used.size.map_or_else(unknown, |size| size.to_string()),
        references,
        used.taints.unwrap_or_else(unknown),
        users.join(", "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VirtAddr;

    #[test]
    fn what_cannot_be_read_is_a_question_mark_in_its_row() {
        let missing = ReadError::NotMapped(VirtAddr(0));
        let at = VirtAddr(0xffff_ffff_c000_0000);
        let module =
            Module { name: "virtio".to_owned(), start: at, end: at, address: at, orc: None };
        let used = ModuleUse {
            size: Ok(16384),
            references: Err(missing),
            users: vec!["virtio_ring".to_owned()],
            users_missing: Some("cut".to_owned()),
            taints: Err(missing),
            state: Some("Loading"),
        };
        let expected =
            ["virtio", "ffffffffc0000000", "16384", "?", "?", "virtio_ring, ?, (Loading)"];
        assert_eq!(row(&module, used), expected);
    }
}
