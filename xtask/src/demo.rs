//! `cargo demo`: a Debian kernel crashes in QEMU, and a minute later one sees why.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::dump::{DUMP, Workbench, area_size};
use crate::fixtures::{DebugInfo, Fixtures, Kernel};
use crate::guest::{self, Scenario};
use crate::process;
use crate::programs::{Analyzer, Loader, Profile};
use crate::qemu::{Disk, sparse_image};
use crate::target::{Syscall, Target};
use crate::workspace;

/// What can be chosen on `cargo demo`'s command line.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The architecture: a file name in targets/, without .toml.
    #[arg(long, default_value = "x86_64")]
    pub arch: String,
    /// Also fetch the kernel's vmlinux (about 280 MB): inlined frames, file names and lines.
    #[arg(long)]
    pub with_debug_info: bool,
    /// Load the payload with kexec_load (`kexec -c`) instead of kexec_file_load (`kexec -s`).
    #[arg(long)]
    pub kexec_load: bool,
    /// The guest's memory in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(256..))]
    pub memory: u32,
    /// Options for the payload, as they would follow `--append=`; the default names the console.
    #[arg(long)]
    pub append: Option<String>,
}

/// Runs the demo; its files are left in `target/demo`.
///
/// # Errors
/// At the first step that fails, with what to do about it.
pub fn run(options: &Options) -> Result<()> {
    let directory = workspace().join("target/demo");
    let target = Target::load(&options.arch)?;
    let usual = Scenario::usual(&target);
    let scenario = Scenario {
        syscall: if options.kexec_load { Syscall::Load } else { usual.syscall },
        memory_mib: options.memory,
        append: options.append.clone().unwrap_or(usual.append),
        ..usual
    };
    let (bench, kernel) = prepare(target, &scenario, options)?;
    // Not before: a word that was mistyped should not cost the dump of the last demo.
    clear(&directory)?;
    let disk = reserve(&bench, &scenario, &directory)?;
    crash(&bench, &scenario, &disk, &directory)?;
    let dump = save(&bench, &disk, &directory)?;
    explain(&kernel, &dump)
}

fn prepare(target: Target, scenario: &Scenario, options: &Options) -> Result<(Workbench, Kernel)> {
    heading(1, "Get QEMU, a Debian kernel, kexec-tools and busybox");
    let qemu = &target.qemu;
    process::install(&[process::Program { name: &qemu.program, package: &qemu.package }])?;
    let fixtures = Fixtures::open()?;
    let debug_info = if options.with_debug_info { DebugInfo::Yes } else { DebugInfo::No };
    let kernel = guest::kernel(&fixtures, &target, scenario, debug_info)?;
    let tools = guest::tools(&fixtures, &target)?;
    println!("kernel  {} {}", kernel.package.name, kernel.package.version);
    println!("kept in {}", crate::fixtures::cache()?.display());

    heading(2, "Build the payload");
    let payload = crate::image::build(&target)?;
    println!("{}", size_of(&payload)?);
    println!("building loader and host-analyzer too");
    let loader = Loader::build()?;
    Analyzer::build(Profile::Dev)?;
    Ok((Workbench { target, fixtures, tools, payload, loader }, kernel))
}

fn reserve(bench: &Workbench, scenario: &Scenario, directory: &Path) -> Result<Disk> {
    heading(3, "Reserve an area for the dump");
    let size = area_size(scenario);
    let disk = sparse_image(&directory.join("disk.img"), size)?;
    shell("truncate", &format!("--size={}M target/demo/disk.img", size >> 20));
    shell("loader", "reserve target/demo/disk.img");
    print!("{}", bench.loader.reserve(&disk.image)?);
    Ok(disk)
}

fn crash(bench: &Workbench, scenario: &Scenario, disk: &Disk, directory: &Path) -> Result<()> {
    heading(4, "Boot Debian, load the payload with kexec -p, crash");
    let mut vm = bench.guest().start(scenario, vec![disk.clone()], directory)?;
    println!("$ {}\n", vm.command());
    vm.console.follow(show_from_the_first_mark());
    bench.guest().wait_for_crash(&mut vm)?;
    let crash = Instant::now();
    let reason = vm.wait_for_end(DUMP)?;
    let took = crash.elapsed();
    vm.quit()?;
    if reason != "guest-reset" {
        bail!("the machine did not reboot: {reason}; see {}", directory.display());
    }
    println!("\nThe machine rebooted by itself, {:.1} s after the crash.", took.as_secs_f64());
    Ok(())
}

fn save(bench: &Workbench, disk: &Disk, directory: &Path) -> Result<PathBuf> {
    heading(5, "Save the dump");
    shell("loader", "show target/demo/disk.img");
    print!("{}", bench.loader.show(&disk.image)?);
    shell("loader", "save target/demo/disk.img target/demo");
    let dump = bench.loader.save(&disk.image, directory)?;
    println!("{}", size_of(&dump)?);
    Ok(dump)
}

fn explain(kernel: &Kernel, dump: &Path) -> Result<()> {
    heading(6, "Why did it die?");
    let analyzer = Analyzer::build(Profile::Dev)?;
    let vmlinux = kernel.vmlinux.as_deref();
    let shown = vmlinux.map(|path| format!(" {}", path.display())).unwrap_or_default();
    for command in ["sys", "bt"] {
        shell("host-analyzer", &format!("{command} target/demo/dump.elf{shown}"));
        println!("{}", analyzer.run(&[command], dump, vmlinux)?.trim_end());
    }
    println!("\nEverything is left in target/demo: dump.elf, disk.img, serial.log.");
    if vmlinux.is_none() {
        println!("With `--with-debug-info` it shows inlined frames and lines too.");
    }
    Ok(())
}

/// Removes what an earlier run left.
fn clear(directory: &Path) -> Result<()> {
    if directory.exists() {
        std::fs::remove_dir_all(directory)?;
    }
    std::fs::create_dir_all(directory)?;
    Ok(())
}

/// Prints console lines, but not the hundreds before the guest's first own one.
fn show_from_the_first_mark() -> impl FnMut(&str) + Send {
    let mut shown = false;
    move |line| {
        shown |= line.contains(guest::MARK);
        if shown {
            println!("    {line}");
        }
    }
}

fn heading(number: u32, text: &str) {
    println!("\n== {number}. {text}");
}

fn shell(program: &str, arguments: &str) {
    println!("$ {program} {arguments}");
}

/// A file's name below the workspace, and its size.
fn size_of(path: &Path) -> Result<String> {
    let bytes = path.metadata()?.len();
    let shown = path.strip_prefix(workspace()).unwrap_or(path).display();
    Ok(match bytes {
        0..1_048_576 => format!("{shown}: {} KiB", bytes.div_ceil(1024)),
        _ => format!("{shown}: {} MiB", bytes >> 20),
    })
}
