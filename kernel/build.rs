//! Passes the linker script and the git revision on to the payload's build.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=TINYKDUMP_LINKER_SCRIPT");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("kernel/ has a parent");
        let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the architecture");
        let script = env::var("TINYKDUMP_LINKER_SCRIPT")
            .unwrap_or_else(|_| format!("{}/linker/{arch}.ld", root.display()));
        println!("cargo::rerun-if-changed={script}");
        println!("cargo::rustc-link-arg-bins=-T{script}");
        // Where the payload will be loaded is not known: it relocates itself, before anything is
        // read-only. (Code for aarch64-unknown-none is position-independent as it is, its data not.)
        println!("cargo::rustc-link-arg-bins=-pie");
        println!("cargo::rustc-link-arg-bins=-znotext");
    }
    println!("cargo::rustc-env=TINYKDUMP_REVISION={}", revision());
}

/// The short hash of the commit, with `+` when the tree differs from it; `unknown` outside of git.
fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    if let Some(head) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={head}");
    }
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(hash) => {
            let clean = git(&["status", "--porcelain"]).is_some_and(|changes| changes.is_empty());
            format!("{hash}{}", if clean { "" } else { "+" })
        }
        None => "unknown".to_owned(),
    }
}
