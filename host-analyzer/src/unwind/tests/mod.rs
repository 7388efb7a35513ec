//! Unwinding in kernels made of a few pages: what the architectures' tests share.

mod aarch64;
mod x86_64;

use std::io::Write;

use super::*;
use crate::kernel::Kernel;
use crate::source::Dump;
use crate::testing::{FakeMemory, Segment, elf_core};

const EM_X86_64: u8 = 62;
const EM_AARCH64: u8 = 183;

/// Writes the kernel's symbol table: 1 KiB each of names, tokens and addresses from 0x1000 on. The
/// first character of a name is its type.
fn put_symbols(memory: &mut FakeMemory, base: u64, all: &[(u64, &str)]) {
    let (mut names, mut offsets) = (Vec::new(), Vec::new());
    for (address, name) in all {
        names.push(name.len() as u8);
        names.extend_from_slice(name.as_bytes());
        offsets.extend_from_slice(&((address - base) as u32).to_le_bytes());
    }
    // Every token is its own character.
    let table: Vec<u8> = (0..=255u8).flat_map(|token| [token.max(1), 0]).collect();
    let index: Vec<u8> = (0..256u16).flat_map(|token| (token * 2).to_le_bytes()).collect();
    memory.put(0x1000, &names);
    memory.put(0x1800, &table);
    memory.put(0x1a00, &index);
    memory.put(0x1c00, &offsets);
    memory.put_u64(0x1d00, base);
    memory.put(0x1d08, &(all.len() as u32).to_le_bytes());
}

/// The lines of VMCOREINFO that lead to it.
fn symbol_lines(base: u64) -> String {
    let tables = [
        ("_stext", 0),
        ("kallsyms_names", 0x1000),
        ("kallsyms_token_table", 0x1800),
        ("kallsyms_token_index", 0x1a00),
        ("kallsyms_offsets", 0x1c00),
        ("kallsyms_relative_base", 0x1d00),
        ("kallsyms_num_syms", 0x1d08),
    ];
    tables.map(|(name, at)| format!("SYMBOL({name})={:x}\n", base + at)).concat()
}

/// A structure: name, size, and members with offset in bytes and the structure that they are, which
/// must come before; none for a plain word.
type Structure<'a> = (&'a str, u32, &'a [(&'a str, u32, Option<&'a str>)]);

/// BTF with these structures.
fn btf(structures: &[Structure<'_>]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut text = |name: &str| {
        let at = strings.len() as u32;
        strings.extend_from_slice(name.as_bytes());
        strings.push(0);
        at
    };
    // Type 1 is a word.
    let mut words: Vec<u32> = vec![text("word"), 1 << 24, 8, 64];
    for (name, size, members) in structures {
        words.extend([text(name), 4 << 24 | members.len() as u32, *size]);
        for (member, offset, kind) in *members {
            let number = kind.and_then(|kind| structures.iter().position(|it| it.0 == kind));
            words.extend([text(member), number.map_or(1, |index| index as u32 + 2), offset * 8]);
        }
    }
    let length = words.len() as u32 * 4;
    let mut blob = vec![0x9f, 0xeb, 1, 0];
    let header = [24, 0, length, length, strings.len() as u32];
    blob.extend(header.iter().chain(&words).flat_map(|word| word.to_le_bytes()));
    blob.extend_from_slice(&strings);
    blob
}

/// Runs the unwinder of a kernel of this machine whose memory begins at `phys`.
fn with_unwinder(
    memory: &FakeMemory,
    machine: u8,
    phys: u64,
    info: &str,
    run: impl FnOnce(&dyn Unwinder) -> Trace,
) -> Trace {
    let info = format!("OSRELEASE=6.1\n{info}");
    let mut note = Vec::new();
    for word in [11, info.len() as u32, 0] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"VMCOREINFO\0\0");
    note.extend_from_slice(info.as_bytes());
    note.resize(note.len().next_multiple_of(4), 0);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let parts = [Segment::note(&note), Segment::load(phys, &memory.bytes)];
    let mut core = elf_core(0, false, &parts);
    core[18] = machine;
    file.write_all(&core).unwrap();
    let dump = Dump::open(file.path()).unwrap();
    let kernel = Kernel::open(&dump, None).unwrap();
    let linux = Linux::new(&kernel);
    run(for_kernel(&linux).as_ref())
}

fn pcs(trace: &Trace) -> Vec<u64> {
    trace.frames.iter().map(|frame| frame.pc.0).collect()
}

fn why(trace: &Trace) -> &str {
    let End::Stuck(why) = &trace.end else { panic!("{:?}", trace.end) };
    why
}
