//! `targets/ARCH.toml`: what is particular to an architecture, in one file each.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow};
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
    /// The system calls that its test kernels have; the first one is the usual one.
    pub syscalls: Vec<Syscall>,
    /// The machines to test it on.
    pub qemu: Qemu,
    /// Where its test kernels come from.
    pub debian: Debian,
}

/// The system call by which `kexec -p` hands the payload over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Syscall {
    /// `kexec -c`: kexec_load, the segments made by kexec-tools.
    Load,
    /// `kexec -s`: kexec_file_load, the segments made by the kernel.
    FileLoad,
}

/// The QEMU that tests and demo run.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Qemu {
    /// Name of the program.
    pub program: String,
    /// The Debian package that brings it.
    pub package: String,
    /// The kernel's name for the first serial port.
    pub console: String,
    /// The machines that it can be, by name.
    pub machines: BTreeMap<String, Variant>,
}

/// One of a target's machines.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Variant {
    /// `-machine`.
    pub machine: String,
    /// `-cpu`.
    pub cpu: String,
    /// The device that a disk is: `virtio-blk-pci`, or `virtio-blk-device` for one behind virtio-mmio; `{}`
    /// in it stands for the disk's number.
    pub disk: String,
    /// `-device`, one each, before the disks.
    #[serde(default)]
    pub devices: Vec<String>,
    /// `-global`, one each.
    #[serde(default)]
    pub globals: Vec<String>,
    /// `-bios`, when it is not QEMU's own.
    pub firmware: Option<Firmware>,
}

/// Firmware out of a fixture.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Firmware {
    /// The set of packages.
    pub packages: String,
    /// The file in it.
    pub file: String,
}

/// Debian's names for the architecture.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Debian {
    /// Name of the architecture in package names.
    pub architecture: String,
    /// The kernel that usually runs: `6_1` of `[kernel.debian-6_1-amd64]`.
    pub kernel: String,
}

impl Variant {
    /// The device that the disk number `index` is.
    #[must_use]
    pub fn disk(&self, index: usize) -> String {
        self.disk.replace("{}", &index.to_string())
    }
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

    /// The machine `name`.
    ///
    /// # Errors
    /// When the target's file has none of this name; the message lists those it has.
    pub fn machine(&self, name: &str) -> Result<&Variant> {
        let machines = &self.qemu.machines;
        machines.get(name).ok_or_else(|| {
            let known: Vec<_> = machines.keys().map(String::as_str).collect();
            let file = format!("targets/{}.toml", self.arch);
            anyhow!("{file} has no machine `{name}`; it has {}", known.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_usual_machine_and_a_system_call() {
        for arch in ["x86_64", "aarch64"] {
            let target = Target::load(arch).unwrap();
            assert!(target.machine("usual").is_ok(), "{arch}");
            assert!(!target.syscalls.is_empty(), "{arch}");
        }
    }

    #[test]
    fn unknown_machine_is_answered_with_those_that_there_are() {
        let error = Target::load("x86_64").unwrap().machine("vax").unwrap_err().to_string();
        assert!(error.contains("targets/x86_64.toml") && error.contains("i440fx"), "{error}");
    }
}
