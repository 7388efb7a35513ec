//! A kernel module that crashes in several ways: assembled from `tests/guest` for the very kernel
//! that loads it.
//!
//! What depends on the kernel's build and version is taken from a module of the same package: the
//! version magic, the checksum of the module interface, the size of struct module.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use goblin::elf::Elf;
use xtask::dump::Workbench;
use xtask::fixtures::DebugInfo;
use xtask::guest::Scenario;
use xtask::{process, workspace};

mod types;

/// The module's name.
pub const NAME: &str = "crash";

/// A module that every kernel of the fixtures has, not compressed, and its name.
const SAMPLE: (&str, &str) = ("lib/crc7.ko", "crc7");

/// An entry of `__versions` (struct modversion_info, include/linux/module.h, 6.1): a checksum of 8
/// bytes and a name.
const VERSION: usize = 64;
const VERSION_NAME: usize = 8;

/// What a module must have of the kernel that loads it.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    /// Name, version and options of the kernel: the value of `vermagic=`.
    magic: String,
    /// The entry of `__versions` for `module_layout`.
    version: Vec<u8>,
    /// Bytes of struct module.
    size: usize,
    /// Where its name lies in it.
    name_at: usize,
}

/// Makes `crash.ko` in `directory` for the kernel that `scenario` names.
///
/// # Errors
/// When it does not assemble, or the kernel's own modules are not of the form that is known.
pub fn build(bench: &Workbench, scenario: &Scenario, directory: &Path) -> Result<PathBuf> {
    let kernel = bench.kernel(scenario, DebugInfo::Yes)?;
    let sample = kernel.modules.join(SAMPLE.0);
    let bytes =
        std::fs::read(&sample).with_context(|| format!("cannot read {}", sample.display()))?;
    let facts = Facts::of(&bytes, SAMPLE.1).with_context(|| format!("in {}", sample.display()))?;
    let vmlinux = kernel.vmlinux.context("the fixtures have no vmlinux of this kernel")?;
    let types = types::of_module(&vmlinux)?;
    let sources = workspace().join("tests/guest");
    let [functions, parameters] =
        [format!("crash_{}.s", bench.target.arch), "crash_module.s".into()]
            .map(|name| sources.join(name));
    let source = directory.join("crash.rs");
    std::fs::write(
        &source,
        format!(
            "#![no_std]\n\
             core::arch::global_asm!(\n\
             {:?},\n{types:?},\ninclude_str!({functions:?}),\ninclude_str!({parameters:?}),\n\
             options(raw)\n);\n",
            facts.sections()
        ),
    )?;
    let module = directory.join(NAME).with_extension("ko");
    let mut command = Command::new("rustc");
    command
        // It leaves its intermediate files where it runs.
        .current_dir(directory)
        .args(["--edition", "2024", "--crate-type", "lib", "--crate-name", NAME])
        .args(["--target", &bench.target.triple, "-C", "panic=abort", "-C", "codegen-units=1"])
        .arg(format!("--emit=obj={}", module.display()))
        .arg(&source);
    process::output(&mut command).context("the module does not assemble")?;
    Ok(module)
}

impl Facts {
    /// Those of the module `sample` that is called `name`.
    fn of(sample: &[u8], name: &str) -> Result<Facts> {
        let elf = Elf::parse(sample)?;
        let section = |wanted: &str| {
            let header = elf
                .section_headers
                .iter()
                .find(|it| elf.shdr_strtab.get_at(it.sh_name) == Some(wanted));
            let range = header.and_then(|header| header.file_range());
            range.and_then(|range| sample.get(range)).with_context(|| format!("no {wanted}"))
        };
        let information = section(".modinfo")?;
        let magic = information
            .split(|&byte| byte == 0)
            .find_map(|text| text.strip_prefix(b"vermagic="))
            .context("no version magic")?;
        let (versions, _) = section("__versions")?.as_chunks::<VERSION>();
        let version = versions
            .iter()
            .find(|version| version[VERSION_NAME..].starts_with(b"module_layout\0"))
            .context("no checksum of the module interface")?;
        let this_module = section(".gnu.linkonce.this_module")?;
        let name = format!("{name}\0");
        let name_at = this_module
            .windows(name.len())
            .position(|window| window == name.as_bytes())
            .context("no name in struct module")?;
        Ok(Facts {
            magic: String::from_utf8(magic.to_vec())?,
            version: version.to_vec(),
            size: this_module.len(),
            name_at,
        })
    }

    /// The sections that a module has for the kernel's loader.
    fn sections(&self) -> String {
        let Facts { magic, version, size, name_at } = self;
        let rest = size.saturating_sub(name_at + NAME.len());
        let mut text = format!(
            ".section .modinfo, \"a\", %progbits\n\
             .asciz \"license=Dual MIT/GPL\"\n.asciz \"retpoline=Y\"\n\
             .asciz \"name={NAME}\"\n.asciz \"vermagic={magic}\"\n\
             .section .gnu.linkonce.this_module, \"aw\", %progbits\n.p2align 6\n\
             .globl __this_module\n.type __this_module, %object\n.size __this_module, {size}\n\
             __this_module:\n.zero {name_at}\n.ascii \"{NAME}\"\n.zero {rest}\n\
             .section __versions, \"a\", %progbits\n.p2align 5\n"
        );
        for byte in version {
            // Writing to a string does not fail.
            let _ = writeln!(text, ".byte {byte}");
        }
        text
    }
}
