//! Builds the payload and wraps it into the file that `kexec -p` loads.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::target::Target;
use crate::workspace;

/// Builds `target/images/ARCH/capture.bin` from `kernel` and returns its path.
///
/// # Errors
/// When the target cannot be installed, the payload does not build, or what was linked cannot be
/// made into an image.
pub fn build(target: &Target) -> Result<PathBuf> {
    install_rust_target(&target.triple)?;
    let root = workspace();
    // A directory of its own: the outer cargo may hold the lock of the ordinary one.
    let payload = root.join("target/payload");
    let status = Command::new(env!("CARGO"))
        .current_dir(&root)
        .args(["build", "--quiet", "--package", "kernel", "--profile", "payload"])
        .args(["--target", &target.triple, "--target-dir"])
        .arg(&payload)
        .env("TINYKDUMP_LINKER_SCRIPT", root.join(&target.linker_script))
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the payload does not build for {}", target.triple);
    }

    let linked = payload.join(&target.triple).join("payload/payload");
    let elf =
        std::fs::read(&linked).with_context(|| format!("cannot read {}", linked.display()))?;
    let bytes = target.image.wrap(&elf).with_context(|| format!("in {}", linked.display()))?;

    let directory = root.join("target/images").join(&target.arch);
    std::fs::create_dir_all(&directory)?;
    let path = directory.join("capture.bin");
    // Written beside and renamed: a test that reads the image never sees half of it.
    let fresh = directory.join(format!("capture.bin.{}", std::process::id()));
    std::fs::write(&fresh, bytes)
        .and_then(|()| std::fs::rename(&fresh, &path))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Makes sure that the bare-metal target `triple` is there, asking rustup for it if not.
fn install_rust_target(triple: &str) -> Result<()> {
    let sysroot = Command::new("rustc")
        .args(["--print", "sysroot"])
        .current_dir(workspace())
        .output()
        .context("cannot run rustc")?;
    let sysroot = PathBuf::from(String::from_utf8(sysroot.stdout)?.trim());
    if sysroot.join("lib/rustlib").join(triple).join("lib").is_dir() {
        return Ok(());
    }
    eprintln!("installing the Rust target {triple}");
    let added = Command::new("rustup")
        .args(["target", "add", triple])
        .current_dir(workspace())
        .status()
        .is_ok_and(|status| status.success());
    if !added {
        bail!(
            "the Rust target {triple} is missing and rustup could not add it; \
             install it with: rustup target add {triple}"
        );
    }
    Ok(())
}
