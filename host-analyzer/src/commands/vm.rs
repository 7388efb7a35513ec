//! `vm`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::areas::{Area, AreaLayout, Areas};
use crate::linux::files::FilesLayout;
use crate::linux::process::ProcessLayout;
use crate::render::table::{Align, table};
use crate::render::text;
use crate::{Error, ReadContext, VirtAddr};

use super::task::chosen;

/// The virtual memory of tasks: their memory areas, and what is mapped there
///
/// Each word is a PID or the address of a task; without any, the task that crashed. FLAGS is vm_flags in
/// hexadecimal, PERM what may be done (s is for shared memory). Kernel threads have none.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

const COLUMNS: [(&str, Align); 6] = [
    ("VMA", Align::Left),
    ("START", Align::Right),
    ("END", Align::Right),
    ("FLAGS", Align::Right),
    ("PERM", Align::Left),
    ("FILE", Align::Left),
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
    let (layout, files) = (AreaLayout::new(kernel)?, FilesLayout::new(kernel)?);
    let (processes, member) = (ProcessLayout::new(kernel)?, kernel.offset("task_struct", "mm")?);
    let top = kernel.offset("mm_struct", "pgd")?;
    let mut documents = Vec::new();
    if !options.json {
        text::completeness(kernel.dump(), out)?;
    }
    for task in chosen(&linux, words)? {
        let space =
            kernel.memory().pointer(task.address.offset(member)).reading("a task's memory")?;
        let process = processes.read(kernel, task);
        let task = &process.task;
        let areas = match space.is_null() {
            true => Areas::default(),
            false => layout.read(kernel, space)?,
        };
        let path = |area: &Area| match area.file.is_null() {
            true => None,
            false => Some(files.path_of(kernel, area.file).unwrap_or_else(|_| "?".to_owned())),
        };
        if options.json {
            let area = |it: &Area| {
                json!({"vma": format!("{:#x}", it.address.0), "start": format!("{:#x}", it.start),
                    "end": format!("{:#x}", it.end), "flags": format!("{:#x}", it.flags),
                    "permissions": permissions(it.flags), "file": path(it)})
            };
            documents.push(json!({"pid": task.pid, "command": task.comm,
                "mm": format!("{:#x}", space.0), "problems": areas.problems,
                "areas": areas.list.iter().map(area).collect::<Vec<_>>()}));
            continue;
        }
        text::task(task, out)?;
        let tables = kernel.memory().pointer(space.offset(top));
        let tables = tables.map_or_else(|_| "-".to_owned(), |at| format!("{at:016x}"));
        let kib = |bytes: u64| format!("{}k", bytes / 1024);
        let (mapped, resident) = match process.size {
            Ok(Some(size)) => (kib(size.mapped), size.resident.map_or("?".to_owned(), kib)),
            Ok(None) => ("0k".to_owned(), "0k".to_owned()),
            Err(_) => ("?".to_owned(), "?".to_owned()),
        };
        let space = format!("{:016x}", space.0);
        writeln!(out, "MM: {space}  PGD: {tables}  RSS: {resident}  TOTAL_VM: {mapped}")?;
        let row = |it: &Area| row(it, path(it));
        let rows: Vec<_> = areas.list.iter().map(row).collect();
        if !rows.is_empty() {
            table(COLUMNS, &rows, out)?;
        }
        text::problems(&areas.problems, out)?;
        writeln!(out)?;
    }
    if options.json { text::json(&documents.into(), out) } else { Ok(()) }
}

fn row(area: &Area, path: Option<String>) -> [String; 6] {
    let Area { address: VirtAddr(address), start, end, flags, .. } = area;
    [
        format!("{address:016x}"),
        format!("{start:x}"),
        format!("{end:x}"),
        format!("{flags:x}"),
        permissions(*flags),
        path.unwrap_or_default(),
    ]
}

/// As /proc/PID/maps shows them: VM_READ, VM_WRITE, VM_EXEC and VM_MAYSHARE (include/linux/mm.h, 6.1).
fn permissions(flags: u64) -> String {
    let bit = |mask: u64, yes, no| if flags & mask != 0 { yes } else { no };
    [bit(1, 'r', '-'), bit(2, 'w', '-'), bit(4, 'x', '-'), bit(0x80, 's', 'p')].iter().collect()
}
