//! `files`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::files::{FilesLayout, OpenFile, OpenFiles};
use crate::linux::task::Task;
use crate::render::table::{Align, table};
use crate::render::text;
use crate::{Error, ReadError, VirtAddr};

use super::task::chosen;

/// The files that tasks have open
///
/// Each word is a PID or the address of a task; without any, the task that crashed. Paths are those from
/// the root of all mounts. `?` is what could not be read.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

const COLUMNS: [(&str, Align); 6] = [
    ("FD", Align::Right),
    ("FILE", Align::Left),
    ("DENTRY", Align::Left),
    ("INODE", Align::Left),
    ("TYPE", Align::Left),
    ("PATH", Align::Left),
];

/// Runs the command.
///
/// # Errors
/// [`Error::NoTask`], [`Error::NoMember`], [`Error::Read`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let layout = FilesLayout::new(kernel)?;
    let mut documents = Vec::new();
    if !options.json {
        text::completeness(kernel.dump(), out)?;
    }
    for task in chosen(&linux, words)? {
        let open = layout.read(kernel, task.address)?;
        if options.json {
            documents.push(document(&task, &open));
            continue;
        }
        text::task(&task, out)?;
        let path = |path: Option<Result<String, ReadError>>| match path {
            Some(Ok(path)) => path,
            Some(Err(error)) => format!("? ({error})"),
            None => "-".to_owned(),
        };
        writeln!(out, "ROOT: {}    CWD: {}", path(open.root), path(open.current))?;
        if open.files.is_empty() {
            writeln!(out, "No open files")?;
        } else {
            table(COLUMNS, &open.files.into_iter().map(row).collect::<Vec<_>>(), out)?;
        }
        writeln!(out)?;
    }
    if options.json { text::json(&documents.into(), out) } else { Ok(()) }
}

fn row(file: OpenFile) -> [String; 6] {
    let unknown = |_: ReadError| "?".to_owned();
    let address = |at: VirtAddr| format!("{at:016x}");
    [
        file.descriptor.to_string(),
        address(file.file),
        file.dentry.map_or_else(unknown, address),
        file.inode.map_or_else(unknown, address),
        file.kind.map_or_else(unknown, str::to_owned),
        file.path.unwrap_or_else(unknown),
    ]
}

fn document(task: &Task, open: &OpenFiles) -> serde_json::Value {
    let address = |at: &VirtAddr| format!("{:#x}", at.0);
    let path = |path: &Option<Result<String, ReadError>>| path.clone().and_then(Result::ok);
    let file = |it: &OpenFile| {
        json!({"fd": it.descriptor, "file": address(&it.file),
            "dentry": it.dentry.as_ref().ok().map(address),
            "inode": it.inode.as_ref().ok().map(address),
            "type": it.kind.ok(), "path": it.path.as_ref().ok()})
    };
    json!({"pid": task.pid, "command": task.comm, "task": address(&task.address),
        "root": path(&open.root), "cwd": path(&open.current),
        "files": open.files.iter().map(file).collect::<Vec<_>>()})
}
