//! What the user asks for: one file per command. A command collects what it shows, then
//! [`crate::render`] writes it. The doc comment of a command's `Options` is its `--help`.

pub mod bt;
pub mod card;
pub mod log;
pub mod modules;
pub mod ps;
pub mod receive;
pub mod sys;
