//! What the user asks for: one file per command. A command collects what it shows, then
//! [`crate::render`] writes it. The doc comment of a command's `Options` is its `--help`.

pub mod bt;
pub mod card;
pub mod disassemble;
pub mod files;
pub mod list;
pub mod log;
pub mod modules;
pub mod place;
pub mod ps;
pub mod pte;
pub mod ptov;
pub mod read;
pub mod receive;
pub mod search;
pub mod structure;
pub mod symbol;
pub mod sys;
pub mod task;
pub mod vm;
pub mod vmcoreinfo;
pub mod vtop;
pub mod whatis;
