//! Every command that a person types while developing, as a library that the boot tests use too.

#![forbid(unsafe_code)]

pub mod bench;
pub mod demo;
pub mod dump;
pub mod faults;
pub mod fixtures;
pub mod guest;
pub mod image;
pub mod process;
pub mod programs;
pub mod qemu;
pub mod target;

use std::path::{Path, PathBuf};

/// The root of the workspace.
#[must_use]
pub fn workspace() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_path_buf()
}
