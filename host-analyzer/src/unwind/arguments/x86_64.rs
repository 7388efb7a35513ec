//! What x86_64 instructions do to registers (Intel SDM volume 2, by way of the decoder).

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess,
    OpKind, Register,
};

use super::flow::{Copied, Effect, Step};

/// The registers of arguments, as debug information numbers them (System V ABI, AMD64 supplement, 3.2.3):
/// rdi rsi rdx rcx r8 r9.
pub(super) const ARGUMENTS: [u16; 6] = [5, 4, 1, 2, 8, 9];
/// Those that a call may overwrite: rax rdx rcx rsi rdi r8 to r11.
const CLOBBERED: u32 = 0b1111_0011_0111;
/// Longest instruction.
const LONGEST: usize = 15;
/// The tracer is called within so many bytes of a function's start: behind `endbr64`.
const TRACED: u64 = 4;

/// The instruction at `at` of a function whose bytes from `start` on are `code`.
pub(super) fn decode(code: &[u8], start: u64, at: u64) -> Option<Step> {
    let from = usize::try_from(at.checked_sub(start)?).ok()?;
    let rest = code.get(from..)?;
    let rest = &rest[..rest.len().min(LONGEST)];
    let mut decoder = Decoder::with_ip(64, rest, at, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    let on = instruction.next_ip();
    // Jumps out of the function end it: another one begins, or its cold part.
    let inside = |target: u64| (start..start + code.len() as u64).contains(&target);
    let target = Some(instruction.near_branch_target()).filter(|target| inside(*target));
    let mut effect = effect(&instruction);
    let next = match instruction.flow_control() {
        FlowControl::Next | FlowControl::XbeginXabortXend => vec![on],
        FlowControl::Call | FlowControl::IndirectCall => {
            // The tracer gives all registers back.
            if at - start > TRACED {
                effect.written |= CLOBBERED;
            }
            vec![on]
        }
        FlowControl::ConditionalBranch => target.into_iter().chain([on]).collect(),
        FlowControl::UnconditionalBranch => target.into_iter().collect(),
        // `ud2` of WARN() goes on, that of BUG() does not: what stands behind it is another way then,
        // on which nothing holds that does not hold here.
        FlowControl::Exception | FlowControl::Interrupt if instruction.code() == Code::Ud2 => {
            vec![on]
        }
        // Kernels have no tables of jumps (-fno-jump-tables with retpolines and with IBT): a computed
        // jump leads out of the function.
        _ => Vec::new(),
    };
    Some(Step { effect, next, computed: false })
}

fn effect(instruction: &Instruction) -> Effect {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let writes = info.used_registers().iter().filter(|it| {
        let kind = it.access();
        !matches!(
            kind,
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
        )
    });
    let written = writes.filter_map(|it| number(it.register())).fold(0, |all, it| all | 1 << it);
    Effect { written, copy: copy(instruction), stack: None }
}

fn copy(instruction: &Instruction) -> Option<Copied> {
    let whole = match instruction.code() {
        Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => true,
        Code::Mov_r32_rm32 | Code::Mov_rm32_r32 | Code::Movsxd_r64_rm32 => false,
        _ => return None,
    };
    let registers = [instruction.op0_kind(), instruction.op1_kind()] == [OpKind::Register; 2];
    let (to, from) = (instruction.op0_register(), instruction.op1_register());
    let copied = Copied { to: number(to)?, from: number(from)?, whole };
    registers.then_some(copied)
}

/// The number that debug information gives a general register, or the one that it is a part of.
fn number(register: Register) -> Option<u16> {
    Some(match register.full_register() {
        Register::RAX => 0,
        Register::RDX => 1,
        Register::RCX => 2,
        Register::RBX => 3,
        Register::RSI => 4,
        Register::RDI => 5,
        Register::RBP => 6,
        Register::RSP => 7,
        Register::R8 => 8,
        Register::R9 => 9,
        Register::R10 => 10,
        Register::R11 => 11,
        Register::R12 => 12,
        Register::R13 => 13,
        Register::R14 => 14,
        Register::R15 => 15,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::flow::state_at;
    use super::*;

    const START: u64 = 0xffff_ffff_8100_0000;

    /// Registers that hold rdi and rsi at the instruction `at` bytes behind the start.
    fn held(code: &[u8], at: u64) -> Option<[u32; 2]> {
        let state = state_at(START, START + at, &ARGUMENTS, |at| decode(code, START, at))?;
        Some([state.held[0].whole, state.held[1].whole])
    }

    #[test]
    fn arguments_are_followed_to_the_registers_that_they_are_kept_in() {
        // endbr64; call tracer; push rbx; mov rbx, rdi; xor edi, edi; call x; mov rax, [rsi]
        let code = b"\xf3\x0f\x1e\xfa\xe8\0\0\0\0\x53\x48\x89\xfb\x31\xff\xe8\0\0\0\0\x48\x8b\x06";
        assert_eq!(held(code, 9), Some([1 << 5, 1 << 4]));
        assert_eq!(held(code, 13), Some([1 << 5 | 1 << 3, 1 << 4]));
        assert_eq!(held(code, 15), Some([1 << 3, 1 << 4]));
        assert_eq!(held(code, 20), Some([1 << 3, 0]));
    }

    #[test]
    fn both_ways_of_a_branch_are_followed() {
        // test rdi, rdi; je +3; mov rsi, rax; mov rax, [rsi]; ret; then what nothing leads to
        let code = b"\x48\x85\xff\x74\x03\x48\x89\xc6\x48\x8b\x06\xc3\x90";
        assert_eq!(held(code, 5), Some([1 << 5, 1 << 4]));
        assert_eq!(held(code, 8), Some([1 << 5, 0]));
        assert_eq!(held(code, 12), None);
    }

    #[test]
    fn part_of_a_register_counts_as_all_of_it() {
        // mov dil, 1; mov sil, [rax]
        let code = b"\x40\xb7\x01\x40\x8a\x30\x90";
        assert_eq!(held(code, 6), Some([0, 0]));
    }
}
