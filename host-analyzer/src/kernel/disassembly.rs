//! Machine code in the words of assemblers.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter, Instruction, OpKind};
use yaxpeax_arch::{Arch, Decoder as _, U8Reader};
use yaxpeax_arm::armv8::a64::{ARMv8, Opcode, Operand};

use crate::VirtAddr;

use super::machine::Machine;

/// An instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disassembled {
    /// Where it lies.
    pub at: VirtAddr,
    /// Its length in bytes.
    pub length: usize,
    /// It, as assemblers write it (x86: AT&T's way). The name of a place that it jumps to or reads from
    /// is in angle brackets.
    pub text: String,
}

/// Names addresses.
pub type Names<'a> = &'a dyn Fn(VirtAddr) -> Option<String>;

/// The instructions in `code`, the first of which lies at `at`. What is none takes a byte on x86_64 and
/// four on arm64.
#[must_use]
pub fn disassemble(
    machine: Machine,
    at: VirtAddr,
    code: &[u8],
    names: Names<'_>,
) -> Vec<Disassembled> {
    match machine {
        Machine::X86_64 => x86_64(at, code, names),
        Machine::Aarch64 => aarch64(at, code, names),
    }
}

fn x86_64(at: VirtAddr, code: &[u8], names: Names<'_>) -> Vec<Disassembled> {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut formatter = GasFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_small_hex_numbers_in_decimal(false);
    options.set_space_after_operand_separator(false);
    options.set_first_operand_char_index(7);
    options.set_branch_leading_zeros(false);
    options.set_rip_relative_addresses(false);
    let mut all = Vec::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let mut text = String::new();
        if instruction.is_invalid() {
            text.push_str("(bad)");
        } else {
            formatter.format(&instruction, &mut text);
            if let Some(name) = target(&instruction).and_then(names) {
                let _ = write!(text, " <{name}>");
            }
        }
        let (at, length) = (VirtAddr(instruction.ip()), instruction.len());
        all.push(Disassembled { at, length, text });
    }
    all
}

/// Where an instruction jumps to, or the place by the instruction pointer that it names.
fn target(instruction: &Instruction) -> Option<VirtAddr> {
    if instruction.op0_kind() == OpKind::NearBranch64 {
        return Some(VirtAddr(instruction.near_branch_target()));
    }
    let relative = instruction.is_ip_rel_memory_operand();
    relative.then(|| VirtAddr(instruction.ip_rel_memory_address()))
}

fn aarch64(at: VirtAddr, code: &[u8], names: Names<'_>) -> Vec<Disassembled> {
    const LENGTH: usize = 4;
    let decoder = <ARMv8 as Arch>::Decoder::default();
    let one = |(index, word): (usize, &[u8])| {
        let at = at.offset((index * LENGTH) as u64);
        let text = match decoder.decode(&mut U8Reader::new(word)) {
            Ok(instruction) => {
                let text = instruction.to_string();
                let offset = instruction.operands.iter().find_map(|operand| match operand {
                    Operand::PCOffset(offset) => Some(*offset),
                    _ => None,
                });
                // adrp counts from the page that it is in (Arm ARM, C6.2.11).
                let page = instruction.opcode == Opcode::ADRP;
                let from = if page { VirtAddr(at.0 & !0xfff) } else { at };
                match offset {
                    Some(offset) => with_target(&text, from.offset(offset as u64), names),
                    None => text,
                }
            }
            Err(_) => format!(".inst {:#010x}", crate::bytes::u32_at(word, 0).unwrap_or(0)),
        };
        Disassembled { at, length: LENGTH, text }
    };
    code.chunks_exact(LENGTH).enumerate().map(one).collect()
}

/// The text with the place that it names relative to itself (`$+0x40`) as an address and by name.
fn with_target(text: &str, target: VirtAddr, names: Names<'_>) -> String {
    let Some(start) = text.find('$') else { return text.to_owned() };
    let rest = &text[start..];
    let length = rest.find([',', ' ']).unwrap_or(rest.len());
    let name = names(target).map(|name| format!(" <{name}>")).unwrap_or_default();
    format!("{}{:#x}{name}{}", &text[..start], target.0, &rest[length..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT: VirtAddr = VirtAddr(0xffff_ffff_8100_0000);

    fn shown(machine: Machine, code: &[u8]) -> Vec<String> {
        let name = |at: VirtAddr| (at.0 >= AT.0).then(|| format!("f+{:#x}", at.0 - AT.0));
        disassemble(machine, AT, code, &name).into_iter().map(|it| it.text).collect()
    }

    #[test]
    fn x86_64_reads_as_the_gnu_assembler_writes_it() {
        // push %rbp; mov %rsp,%rbp; call .+5; mov 0x10(%rip),%rax; ret; (bad)
        let code =
            [0x55, 0x48, 0x89, 0xe5, 0xe8, 0, 0, 0, 0, 0x48, 0x8b, 0x05, 0x10, 0, 0, 0, 0xc3, 0x06];
        let expected = [
            "push   %rbp",
            "mov    %rsp,%rbp",
            "call   0xffffffff81000009 <f+0x9>",
            "mov    0xffffffff81000020,%rax <f+0x20>",
            "ret",
            "(bad)",
        ];
        assert_eq!(shown(Machine::X86_64, &code), expected);
    }

    #[test]
    fn arm64_jumps_name_where_they_lead() {
        let words: [u32; 5] = [0xd503_233f, 0x9400_0002, 0xb400_0040, 0x9000_0000, 0xffff_ffff];
        let code: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let expected = [
            "paciasp",
            "bl 0xffffffff8100000c <f+0xc>",
            "cbz x0, 0xffffffff81000010 <f+0x10>",
            "adrp x0, 0xffffffff81000000 <f+0x0>",
            ".inst 0xffffffff",
        ];
        assert_eq!(shown(Machine::Aarch64, &code), expected);
    }

    proptest! {
        #[test]
        fn garbage_is_shown_and_never_panics(code in prop::collection::vec(any::<u8>(), 0..200)) {
            let length = |machine| {
                disassemble(machine, AT, &code, &|_| None).iter().map(|it| it.length).sum::<usize>()
            };
            prop_assert_eq!(length(Machine::X86_64), code.len());
            prop_assert_eq!(length(Machine::Aarch64), code.len() / 4 * 4);
        }
    }
}
