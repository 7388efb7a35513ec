//! What the user asks for: one file per command. A command collects what it shows, then
//! [`crate::render`] writes it.

pub mod bt;
pub mod log;
pub mod sys;
