//! The oldest and the newest kernel that are read, without vmlinux.

use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::crash::{Dumped, analyzer, bench, once};
use tests::trace::{self, Frame, from_crash, listing as shown};
use xtask::guest::Scenario;

macro_rules! kernels {
    ($($name:ident: $arch:ident $kernel:literal;)*) => {
        $(mod $name {
            use super::*;

            fn dumped() -> Result<&'static Dumped> {
                static DUMPED: OnceLock<Result<Dumped, String>> = OnceLock::new();
                once(&DUMPED, || dump_of(stringify!($arch), $kernel))
            }

            #[test]
            fn backtrace_is_the_one_that_the_kernel_printed() -> Result<()> {
                super::backtrace_is_the_one_that_the_kernel_printed(dumped()?)
            }

            #[test]
            fn every_stack_is_followed_to_its_end() -> Result<()> {
                super::every_stack_is_followed_to_its_end(dumped()?)
            }

            #[test]
            fn commands_find_what_the_guest_had() -> Result<()> {
                super::commands_find_what_the_guest_had(dumped()?)
            }
        })*
    };
}

kernels! {
    x86_64_5_10: x86_64 "5_10";
    x86_64_newest: x86_64 "newest";
    aarch64_5_10: aarch64 "5_10";
    aarch64_newest: aarch64 "newest";
}

fn dump_of(arch: &'static str, kernel: &str) -> Result<Dumped> {
    let bench = bench(arch)?;
    // Kernels for x86_64 that rewrite elfcorehdr when memory comes and goes (CONFIG_CRASH_HOTPLUG, 6.6 on)
    // want room for 16384 program headers: 896 KiB.
    let crashkernel = if kernel == "newest" { "3M" } else { "2M" }.into();
    let scenario = Scenario { kernel: kernel.into(), crashkernel, ..bench.scenario() };
    Dumped::new(bench, &format!("kernels/{arch}-{kernel}"), scenario)
}

fn backtrace_is_the_one_that_the_kernel_printed(dumped: &Dumped) -> Result<()> {
    let text = analyzer()?.run(&["bt"], &dumped.dump, None)?;
    let ours = trace::of_analyzer(&text)?;
    let printed = trace::of_kernel(&dumped.crashed.text())?;
    let (ours, printed) = (from_crash(&ours)?, from_crash(&printed)?);
    let mut agree = ours.len() == printed.len();
    for (ours, printed) in ours.iter().zip(printed) {
        agree &= same_place(dumped, ours, printed)?;
    }
    let (ours, printed) = (shown(ours), shown(printed));
    ensure!(agree, "the backtrace is\n{ours:#?}\nthe kernel printed\n{printed:#?}");
    Ok(())
}

fn every_stack_is_followed_to_its_end(dumped: &Dumped) -> Result<()> {
    let said = says(dumped, &["bt", "--all-tasks"], &[])?;
    let traces = said["backtraces"].as_array().context("no backtraces")?;
    ensure!(traces.len() > 30, "only {} tasks", traces.len());
    let stuck = traces.iter().find(|trace| trace["end"]["at"] == "stuck");
    ensure!(stuck.is_none(), "{}", stuck.unwrap_or(&Value::Null));
    let empty = traces.iter().find(|trace| trace["frames"].as_array().is_none_or(Vec::is_empty));
    ensure!(empty.is_none(), "{}", empty.unwrap_or(&Value::Null));
    Ok(())
}

/// /init, a script of busybox's, wrote to /proc/sysrq-trigger.
fn commands_find_what_the_guest_had(dumped: &Dumped) -> Result<()> {
    let files = says(dumped, &["files"], &["1"])?;
    let paths: Vec<&str> = files[0]["files"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|it| it["path"].as_str())
        .collect();
    for path in ["/dev/console", "/proc/sysrq-trigger", "/init"] {
        ensure!(paths.contains(&path), "no {path} among {paths:?}");
    }
    let areas = says(dumped, &["vm"], &["1"])?;
    ensure!(areas[0]["problems"] == serde_json::json!([]), "{areas}");
    let areas = areas[0]["areas"].as_array().context("no areas")?;
    let code = areas.iter().find(|it| it["permissions"] == "r-xp");
    let code = code.context("no code is mapped")?;
    ensure!(code["file"] == "/bin/busybox", "{code}");
    let list = says(dumped, &["struct"], &["list_head"])?;
    ensure!(list["size"] == 16, "{list}");
    let text = |command: &[&str]| analyzer()?.run(command, &dumped.dump, None);
    ensure!(text(&["ps"])?.contains("[kthreadd]"), "{}", text(&["ps"])?);
    ensure!(text(&["mod"])?.contains("virtio_blk"), "{}", text(&["mod"])?);
    ensure!(text(&["log"])?.contains("sysrq triggered crash"), "{}", text(&["log"])?);
    ensure!(!text(&["sys"])?.contains("RELEASE: (unknown"), "{}", text(&["sys"])?);
    Ok(())
}

/// What a command says as JSON.
fn says(dumped: &Dumped, command: &[&str], words: &[&str]) -> Result<Value> {
    let mut run = analyzer()?.command(command, &dumped.dump, None);
    Ok(serde_json::from_str(&xtask::process::output(run.arg("--json").args(words))?)?)
}

/// Whether two frames are at one place. On arm64 the kernel looks the return address itself up: behind a
/// call that does not return, it names the next function.
fn same_place(dumped: &Dumped, ours: &Frame, printed: &Frame) -> Result<bool> {
    if shown(std::slice::from_ref(ours)) == shown(std::slice::from_ref(printed)) {
        return Ok(true);
    }
    let address = format!("{:#x}", ours.address.context("a frame without an address")?);
    let said = says(dumped, &["sym"], &[&address])?;
    let (name, offset) = (&said[0]["name"], said[0]["offset"].as_u64());
    Ok(*name == *printed.function && offset == printed.offset)
}
