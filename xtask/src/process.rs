//! Running other programs: what failed, with which command, and what is missing to run it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// A host program and the Debian package that brings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program<'a> {
    /// The program's name, to be found on `PATH`.
    pub name: &'a str,
    /// The package to install when it is missing.
    pub package: &'a str,
}

/// Runs `command`, output and all shown only when it fails.
///
/// # Errors
/// When it cannot be started or exits with an error; the message holds the command and what it said.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs `command` and returns what it printed on its standard output.
///
/// # Errors
/// When it cannot be started or exits with an error; the message holds the command and what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", display(command)))?;
    if !output.status.success() {
        bail!("{}", failure(command, &output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `command` as it could be typed into a shell.
#[must_use]
pub fn display(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// What to tell about a command that exited with an error.
#[must_use]
pub fn failure(command: &Command, output: &Output) -> String {
    format!(
        "{} failed ({})\n{}{}",
        display(command),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Checks that `programs`, which every Debian machine has, are there.
///
/// # Errors
/// Names the first that is missing.
pub fn need(programs: &[&str]) -> Result<()> {
    for program in programs {
        if !exists(program) {
            bail!(
                "`{program}` is missing: fixtures are Debian packages, and fetching and unpacking \
                 them takes Debian's own tools (packages apt and dpkg)"
            );
        }
    }
    Ok(())
}

/// Makes sure that the host has `programs`: as root it installs the packages of those missing.
///
/// # Errors
/// When something is missing and we are not root: the message names exactly the packages to
/// install. Also when apt-get fails.
pub fn install(programs: &[Program<'_>]) -> Result<()> {
    let missing = |programs: &[Program<'_>]| -> Vec<String> {
        let mut packages: Vec<_> = programs
            .iter()
            .filter(|program| !exists(program.name))
            .map(|program| program.package.to_owned())
            .collect();
        packages.dedup();
        packages
    };
    if missing(programs).is_empty() {
        return Ok(());
    }
    // Another test process may be installing the same package.
    let _lock = crate::fixtures::lock("host")?;
    let packages = missing(programs);
    if packages.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!(
            "missing on this machine: {0}\ninstall with: sudo apt-get install \
             --no-install-recommends {0}",
            packages.join(" ")
        );
    }
    install_packages(&packages)
}

/// Installs `packages` on this machine. We are root.
pub(crate) fn install_packages(packages: &[String]) -> Result<()> {
    eprintln!("installing {} with apt-get", packages.join(" "));
    run(Command::new("apt-get").args(["-qq", "update"]))?;
    run(Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-qq", "--yes", "--no-install-recommends", "install"])
        .args(packages))
}

/// Whether `program` is on `PATH`, or in one of the directories that only root has there.
fn exists(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let everybodys = std::env::split_paths(&path);
    let mut directories = everybodys.chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.any(|directory| is_executable(&directory.join(program)))
}

fn is_executable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
}
