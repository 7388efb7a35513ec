//! Our own host programs, built from this checkout and run as a user would run them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process;
use crate::workspace;

/// How a program is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// As `cargo test` does: shares its artifacts.
    Dev,
    /// As a user installs it.
    Release,
}

/// Builds the workspace's program `name` and returns its path.
///
/// # Errors
/// When it does not build; cargo has then said why.
pub fn build(name: &str, profile: Profile) -> Result<PathBuf> {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(workspace())
        .args(["build", "--quiet", "--package", name, "--bin", name])
        .arg("--message-format=json-render-diagnostics")
        .args((profile == Profile::Release).then_some("--release"))
        .stderr(Stdio::inherit());
    let output = command.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("`{name}` does not build");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back();
    executable.with_context(|| format!("cargo built no program `{name}`"))
}

/// A program of the host's and the libraries that it is linked with: for guests of the host's architecture.
///
/// # Errors
/// When ldd cannot tell.
pub fn with_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let said = process::output(Command::new("ldd").arg(program))?;
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f...)`; the interpreter has no arrow.
    let words = said.split_whitespace().filter(|word| word.starts_with('/'));
    Ok([program.to_owned()].into_iter().chain(words.map(PathBuf::from)).collect())
}

/// `loader`, as the tests and the demo use it.
#[derive(Clone, Debug)]
pub struct Loader {
    program: PathBuf,
}

impl Loader {
    /// Builds it.
    ///
    /// # Errors
    /// When it does not build.
    pub fn build() -> Result<Loader> {
        Ok(Loader { program: build("loader", Profile::Dev)? })
    }

    /// Where the program is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.program
    }

    /// `loader reserve AREA`; returns what it printed.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn reserve(&self, area: &Path) -> Result<String> {
        process::output(Command::new(&self.program).arg("reserve").arg(area))
    }

    /// `loader show AREA`; returns what it printed.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn show(&self, area: &Path) -> Result<String> {
        process::output(Command::new(&self.program).arg("show").arg(area))
    }

    /// `loader save AREA DIRECTORY`; returns the path of the dump.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn save(&self, area: &Path, directory: &Path) -> Result<PathBuf> {
        self.save_with(&[], area, directory, "dump.elf")
    }

    /// `loader save --incomplete AREA DIRECTORY`; returns the path of the dump.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn save_incomplete(&self, area: &Path, directory: &Path) -> Result<PathBuf> {
        self.save_with(&["--incomplete"], area, directory, "dump.incomplete.elf")
    }

    fn save_with(
        &self,
        options: &[&str],
        area: &Path,
        directory: &Path,
        name: &str,
    ) -> Result<PathBuf> {
        let mut command = Command::new(&self.program);
        let said = process::output(command.arg("save").args(options).arg(area).arg(directory))?;
        let dump = directory.join(name);
        if !dump.is_file() {
            bail!("loader save made no {}; it said: {said}", dump.display());
        }
        Ok(dump)
    }
}

/// `host-analyzer`, as the tests and the demo use it.
#[derive(Clone, Debug)]
pub struct Analyzer {
    program: PathBuf,
}

impl Analyzer {
    /// Builds it.
    ///
    /// # Errors
    /// When it does not build.
    pub fn build(profile: Profile) -> Result<Analyzer> {
        Ok(Analyzer { program: build("host-analyzer", profile)? })
    }

    /// `host-analyzer COMMAND... DUMP [VMLINUX]`, a command with its options; returns what it printed.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn run(&self, command: &[&str], dump: &Path, vmlinux: Option<&Path>) -> Result<String> {
        process::output(&mut self.command(command, dump, vmlinux))
    }

    /// The same as a command that was not run yet.
    #[must_use]
    pub fn command(&self, command: &[&str], dump: &Path, vmlinux: Option<&Path>) -> Command {
        let mut analyzer = Command::new(&self.program);
        analyzer.args(command).arg(dump).args(vmlinux);
        analyzer
    }
}
