//! `targets/ARCH.toml`: what is particular to an architecture, in one file each.

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::workspace;

/// One architecture, as its file in `targets/` describes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Target {
    /// The file's name without `.toml`: `x86_64`, `aarch64`.
    #[serde(skip)]
    pub arch: String,
    /// The Rust target that the payload is built for.
    pub triple: String,
    /// The payload's linker script, relative to the workspace's root.
    pub linker_script: String,
    /// What the linked payload becomes.
    pub image: image::Format,
    /// The machine to test it on.
    pub qemu: Qemu,
    /// Where its test kernels come from.
    pub debian: Debian,
}

/// The QEMU machine that tests and demo run.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Qemu {
    /// Name of the program.
    pub program: String,
    /// The Debian package that brings it.
    pub package: String,
    /// `-machine`.
    pub machine: String,
    /// `-cpu`.
    pub cpu: String,
    /// `-cpu` for a machine whose kernel runs 4-level page tables.
    pub cpu_four_level: String,
    /// The kernel's name for the first serial port.
    pub console: String,
}

/// Debian's names for the architecture.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Debian {
    /// Name of the architecture in package names.
    pub architecture: String,
}

impl Target {
    /// Reads `targets/{arch}.toml`.
    ///
    /// # Errors
    /// When there is no such file, or it does not describe a target; the message names the file.
    pub fn load(arch: &str) -> Result<Target> {
        let path = workspace().join("targets").join(format!("{arch}.toml"));
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("no target `{arch}`: cannot read {}", path.display()))?;
        let target: Target =
            toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        Ok(Target { arch: arch.to_owned(), ..target })
    }
}
