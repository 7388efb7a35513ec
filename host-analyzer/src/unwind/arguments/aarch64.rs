//! What arm64 instructions do to registers (Arm ARM, DDI 0487, C4.1).
//!
//! An instruction that is not looked at closely counts as one that writes every register that is named in
//! it where others have results.

use super::super::prologue::{Way, flow_of};
use super::flow::{Copied, Effect, Step};

/// The registers of arguments (AAPCS64, 6.8.2): x0 to x7.
pub(super) const ARGUMENTS: [u16; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
/// Those that a call may overwrite: x0 to x18, and x30.
const CLOBBERED: u32 = 0x4007_ffff;
const SP: u32 = 31;
/// `mov x9, x30`: what follows is a call of the tracer, which gives all registers back.
const BEFORE_TRACER: u32 = 0xaa1e_03e9;

/// The instruction at `at` of a function whose words from `start` on are `code`.
pub(super) fn decode(code: &[u32], start: u64, at: u64) -> Option<Step> {
    let index = usize::try_from(at.checked_sub(start)? / 4).ok()?;
    let word = *code.get(index)?;
    let before = index.checked_sub(1).and_then(|before| code.get(before)).copied();
    let to = |distance: i64| {
        let target = at.wrapping_add_signed(distance * 4);
        (start..start + code.len() as u64 * 4).contains(&target).then_some(target)
    };
    let way = flow_of(word);
    let next = match way {
        // `brk` of WARN() goes on; behind that of BUG() nothing holds that does not hold here.
        Way::On | Way::Trap => vec![at + 4],
        Way::Jump(distance) => to(distance).into_iter().collect(),
        Way::Branch(distance) => to(distance).into_iter().chain([at + 4]).collect(),
        Way::Computed | Way::End => Vec::new(),
    };
    let computed = matches!(way, Way::Computed);
    Some(Step { effect: effect(word, before), next, computed })
}

/// Bits `low` to `low + width - 1`.
const fn field(word: u32, low: u32, width: u32) -> u32 {
    word >> low & ((1 << width) - 1)
}

fn effect(word: u32, before: Option<u32>) -> Effect {
    let plain = |written: u32| Effect { written, copy: None, stack: Some(0) };
    let rd = field(word, 0, 5);
    match field(word, 25, 4) {
        // Branches, exceptions, system instructions.
        0b1010 | 0b1011 => {
            let calls = word >> 26 == 0b10_0101 || word & 0xfeff_f000 == 0xd63f_0000;
            let reads = word & 0xffd0_0000 == 0xd510_0000 || word & 0xfff0_0000 == 0xd530_0000;
            match calls {
                true if before == Some(BEFORE_TRACER) => plain(1 << 30),
                true => plain(CLOBBERED),
                false if reads => plain(1 << rd),
                false => plain(0),
            }
        }
        0b0100 | 0b0110 | 0b1100 | 0b1110 => memory(word),
        // Conditional comparisons have flags where others have a result.
        _ if word & 0x1fe0_0000 == 0x1a40_0000 => plain(0),
        _ => computation(word, rd),
    }
}

fn computation(word: u32, rd: u32) -> Effect {
    let rn = field(word, 5, 5);
    // add and sub of an immediate number, 64 bits
    if word & 0xbf80_0000 == 0x9100_0000 && rd == SP {
        let number = i64::from(field(word, 10, 12)) << (12 * field(word, 22, 1));
        let number = if field(word, 30, 1) == 1 { -number } else { number };
        return Effect { written: 0, copy: None, stack: Some(number).filter(|_| rn == SP) };
    }
    // mov: orr with the zero register, nothing shifted
    let copy = (word & 0x7fe0_ffe0 == 0x2a00_03e0 && rd != SP).then(|| Copied {
        to: rd as u16,
        from: field(word, 16, 5) as u16,
        whole: word >> 31 == 1,
    });
    // 31 is the zero register, except for the few that compute the stack pointer: those with an immediate
    // number, and add and sub with an extended register.
    let immediate = field(word, 26, 3) == 0b100;
    let extended = word & 0x1f20_0000 == 0x0b20_0000;
    let stack = rd == SP && (immediate || extended) && field(word, 29, 1) == 0;
    let copy = copy.filter(|copy| u32::from(copy.from) != SP);
    let written = if rd == SP { 0 } else { 1 << rd };
    Effect { written, copy, stack: (!stack).then_some(0) }
}

/// Loads and stores.
fn memory(word: u32) -> Effect {
    let (rt, rn, rt2, rs) =
        (field(word, 0, 5), field(word, 5, 5), field(word, 10, 5), field(word, 16, 5));
    let vector = field(word, 26, 1) == 1;
    let pair = field(word, 27, 3) == 0b101;
    let single = field(word, 27, 3) == 0b111;
    let bit = |number: u32| if number == SP { 0 } else { 1u32 << number };
    let mut back = None;
    let written = if pair {
        if matches!(field(word, 23, 2), 0b01 | 0b11) {
            // Signed, in units of the registers' size.
            let number = i64::from((word << 10) as i32 >> 25);
            let scale = match (vector, field(word, 30, 2)) {
                (true, size) => 2 + size,
                (false, size) => 2 + (size >> 1),
            };
            back = Some(number << scale);
        }
        if vector || field(word, 22, 1) == 0 { 0 } else { bit(rt) | bit(rt2) }
    } else if single {
        let register = field(word, 24, 2) == 0 && field(word, 21, 1) == 1;
        // Before or behind the access, the address is written back.
        if field(word, 24, 2) == 0 && !register && field(word, 10, 1) == 1 {
            back = Some(i64::from((word << 11) as i32 >> 23));
        }
        let atomic = register && field(word, 10, 2) != 0b10;
        let store = field(word, 22, 2) == 0 && !atomic;
        // Pointer authentication's loads write the address back in their own way.
        let odd = if atomic { bit(rn) } else { 0 };
        if vector || store { 0 } else { bit(rt) | odd }
    } else {
        // Exclusive, ordered, compare and swap, literals and the rest.
        bit(rt) | bit(rt2) | bit(rs)
    };
    let address = if back.is_some() { bit(rn) } else { 0 };
    let stack = if rn == SP { back.unwrap_or(0) } else { 0 };
    Effect { written: written | address, copy: None, stack: Some(stack) }
}

#[cfg(test)]
mod tests {
    use super::super::flow::{State, state_at};
    use super::*;

    const START: u64 = 0xffff_8000_0800_0000;

    fn at(code: &[u32], index: u64) -> State {
        let decode = |at| decode(code, START, at);
        state_at(START, START + index * 4, &ARGUMENTS, decode).unwrap()
    }

    #[test]
    fn arguments_are_followed_to_the_registers_that_they_are_kept_in() {
        let code = [
            0xaa1e_03e9, // mov x9, x30
            0x9400_1000, // bl tracer
            0xa9be_7bfd, // stp x29, x30, [sp, #-32]!
            0xf900_0bf3, // str x19, [sp, #16]
            0xaa00_03f3, // mov x19, x0
            0x2a01_03f4, // mov w20, w1
            0x9400_1000, // bl
            0xf940_0260, // ldr x0, [x19]
            0xd65f_03c0, // ret
        ];
        assert_eq!(at(&code, 4).held[0].whole, 1);
        assert_eq!(at(&code, 4).stack, Some(-32));
        let after = at(&code, 7);
        assert_eq!((after.held[0].whole, after.held[1].whole), (1 << 19, 0));
        assert_eq!((after.held[1].low, after.held[2].whole), (1 << 20, 0));
    }

    #[test]
    fn stores_leave_the_registers_that_they_store() {
        // str x0, [x1, #8]; stp x2, x3, [x4], #16; strb w5, [x6, x7]; nop
        let code = [0xf900_0420, 0xa881_0c82, 0x3827_68c5, 0xd503_201f];
        let after = at(&code, 3);
        let lost: Vec<usize> = (0..8).filter(|&it| after.held[it].whole == 0).collect();
        assert_eq!(lost, [4]);
    }

    #[test]
    fn loads_and_atomics_overwrite() {
        // ldr x0, [x1]; ldp x2, x3, [x1]; ldadd x4, x5, [x1]; ldr x6, [x7], #8; nop
        let code = [0xf940_0020, 0xa940_0c22, 0xf824_0025, 0xf840_84e6, 0xd503_201f];
        let after = at(&code, 4);
        let held: Vec<usize> = (0..8).filter(|&it| after.held[it].whole != 0).collect();
        assert_eq!(held, [4]);
    }

    #[test]
    fn stack_pointer_is_followed() {
        // sub sp, sp, #0x40; add sp, sp, #1, lsl #12; ldr x0, [sp], #16; mov sp, x29; nop
        let code = [0xd101_03ff, 0x9140_07ff, 0xf841_07e0, 0x9100_03bf, 0xd503_201f];
        assert_eq!(at(&code, 1).stack, Some(-0x40));
        assert_eq!(at(&code, 2).stack, Some(0x1000 - 0x40));
        assert_eq!(at(&code, 3).stack, Some(0x1000 - 0x30));
        assert_eq!(at(&code, 4).stack, None);
    }

    #[test]
    fn comparisons_write_nothing() {
        // cmp x0, #1; ccmp x1, x2, #4, eq; tst x3, x4; cbz x5, +1; nop
        let code = [0xf100_041f, 0xfa42_0024, 0xea04_007f, 0xb400_0025, 0xd503_201f];
        assert!(at(&code, 4).held.iter().all(|it| it.whole != 0));
    }
}
