//! The module's types: split BTF (Documentation/bpf/btf.rst, 6.12), which goes on where the kernel's own ends.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use goblin::elf::Elf;

/// The function that has arguments, and how many.
const FUNCTION: &str = "many_pointers";
const ARGUMENTS: u32 = 20;

/// Kinds of types.
const POINTER: u32 = 2;
const FUNCTION_KIND: u32 = 12;
const PROTOTYPE: u32 = 13;

/// The section with the types of a module for the kernel that `vmlinux` is of: a pointer, a function that takes
/// twenty of them, called `pointer_1` and so on.
///
/// # Errors
/// When the kernel's own types cannot be read.
pub(super) fn of_module(vmlinux: &Path) -> Result<String> {
    let bytes = std::fs::read(vmlinux)?;
    let elf = Elf::parse(&bytes)?;
    let header = elf
        .section_headers
        .iter()
        .find(|it| elf.shdr_strtab.get_at(it.sh_name) == Some(".BTF"))
        .context("vmlinux has no types (BTF)")?;
    let base =
        header.file_range().and_then(|range| bytes.get(range)).context("BTF is cut short")?;
    let (count, texts) = size_of(base)?;

    let mut strings = Vec::new();
    let mut text = |name: &str| {
        let at = texts + strings.len() as u32;
        strings.extend_from_slice(name.as_bytes());
        strings.push(0);
        at
    };
    let pointer = count + 1;
    let mut types = vec![0, POINTER << 24, 0, 0, PROTOTYPE << 24 | ARGUMENTS, 0];
    for number in 1..=ARGUMENTS {
        types.extend([text(&format!("pointer_{number}")), pointer]);
    }
    types.extend([text(FUNCTION), FUNCTION_KIND << 24, pointer + 1]);
    let length = types.len() as u32 * 4;
    let header = [24, 0, length, length, strings.len() as u32];

    let mut section = ".section .BTF, \"\", %progbits\n.short 0xeb9f\n.byte 1, 0\n".to_owned();
    // Writing to a string does not fail.
    for word in header.iter().chain(&types) {
        let _ = writeln!(section, ".long {word}");
    }
    for byte in strings {
        let _ = writeln!(section, ".byte {byte}");
    }
    Ok(section)
}

/// Number of types in BTF, and bytes of its texts.
fn size_of(btf: &[u8]) -> Result<(u32, u32)> {
    let word = |at: usize| {
        let raw = btf.get(at..at + 4).and_then(|raw| raw.try_into().ok());
        raw.map(u32::from_le_bytes).context("BTF is cut short")
    };
    ensure!(word(4)? == 24 && word(8)? == 0, "BTF has another header");
    let (types, texts) = (word(12)?, word(20)?);
    let (mut at, mut count) = (0, 0);
    while at < types {
        let information = word(24 + at as usize + 4)?;
        let length = information & 0xffff;
        // What follows the 12 bytes that all have.
        at += 12
            + match information >> 24 & 0x1f {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => length * 12,
                6 | 13 => length * 8,
                _ => 0,
            };
        count += 1;
    }
    ensure!(at == types, "the types of BTF do not end where they should");
    Ok((count, texts))
}
