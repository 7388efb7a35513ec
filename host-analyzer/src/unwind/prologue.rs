//! Whether an arm64 function had a frame record of its own at one of its instructions.
//!
//! Functions that call others save x29 and x30 on the stack and point x29 to them; leaf functions do
//! not, nor does any function at its very start and end. Interrupted there, x29 still leads to the
//! *caller's* record, and the way back to the caller is in x30 alone. The function's own code, as it
//! lies in the dump, tells which it is: all ways from its first instruction are followed.
//!
//! Instructions: Arm ARM (DDI 0487), C6.2. What compilers and the kernel's assembler macros emit:
//! AAPCS64, 6.4.6 (frame records); arch/arm64/include/asm/assembler.h (frame_push, frame_pop).

/// What x29 and x30 are at an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// x29 points to the function's own record.
    Own,
    /// x29 is still, or again, the caller's; x30 is the return address.
    Callers,
    /// x29 is the caller's, and a call overwrote x30: the return address is somewhere else.
    Lost,
}

impl Record {
    const fn bit(self) -> u8 {
        match self {
            Record::Own => 1,
            Record::Callers => 2,
            Record::Lost => 4,
        }
    }

    const ALL: [Record; 3] = [Record::Own, Record::Callers, Record::Lost];
}

/// More instructions than any function has that is worth it.
pub const MAX_CODE: usize = 1 << 15;

/// Tells what x29 and x30 are at instruction `wanted` of the function whose code is `code`, before
/// that instruction has run. `None` when the code does not tell: it is reached in different states,
/// or only by jumps whose targets are computed from several.
#[must_use]
pub fn record_at(code: &[u32], wanted: usize) -> Option<Record> {
    let code = &code[..code.len().min(MAX_CODE)];
    if wanted >= code.len() {
        return None;
    }
    // `brk` ends some ways (BUG) and not others (WARN): it is passed only when nothing else leads to
    // where we want to go.
    [false, true].into_iter().find_map(|past_traps| {
        let flow = Flow::of(code, past_traps);
        match flow.seen[wanted] {
            0 => flow.behind_computed_jumps(code, wanted),
            states => only(states),
        }
    })
}

fn only(states: u8) -> Option<Record> {
    Record::ALL.into_iter().find(|state| state.bit() == states)
}

/// The states in which each instruction is reached.
struct Flow {
    /// Bits of [`Record`].
    seen: Vec<u8>,
    /// The states in which computed jumps are reached.
    jumps: u8,
}

impl Flow {
    fn of(code: &[u32], past_traps: bool) -> Flow {
        let mut flow = Flow { seen: vec![0; code.len()], jumps: 0 };
        flow.follow(code, (0, Record::Callers), past_traps);
        flow
    }

    /// Follows all ways from an instruction. Each is visited once in each state: it ends.
    fn follow(&mut self, code: &[u32], start: (usize, Record), past_traps: bool) {
        let mut open = vec![start];
        while let Some((at, state)) = open.pop() {
            let (Some(&word), Some(seen)) = (code.get(at), self.seen.get_mut(at)) else { continue };
            if *seen & state.bit() != 0 {
                continue;
            }
            *seen |= state.bit();
            let before = at.checked_sub(1).and_then(|before| code.get(before)).copied();
            let next = after(word, before, state);
            match flow_of(word) {
                Way::On => open.push((at + 1, next)),
                Way::Jump(distance) => open.extend(target(at, distance).map(|to| (to, next))),
                Way::Branch(distance) => {
                    open.push((at + 1, next));
                    open.extend(target(at, distance).map(|to| (to, next)));
                }
                Way::Computed => self.jumps |= state.bit(),
                Way::Trap if past_traps => open.push((at + 1, next)),
                Way::Trap | Way::End => {}
            }
        }
    }

    /// Instructions that no way leads to belong to the cases of a `switch`, which a computed jump
    /// leads to in the state that it is reached in itself. Followed from the start of the block.
    fn behind_computed_jumps(&self, code: &[u32], wanted: usize) -> Option<Record> {
        let state = only(self.jumps)?;
        let ends = |at: &usize| !matches!(flow_of(code[*at]), Way::On | Way::Branch(_));
        let start = (0..wanted).rev().find(ends).map_or(0, |at| at + 1);
        let mut flow = Flow { seen: vec![0; code.len()], jumps: 0 };
        flow.follow(code, (start, state), true);
        only(flow.seen[wanted])
    }
}

fn target(at: usize, distance: i64) -> Option<usize> {
    usize::try_from(at as i64 + distance).ok()
}

/// The state after an instruction; `before` is the one in front of it.
fn after(word: u32, before: Option<u32>, state: Record) -> Record {
    /// `mov x9, x30`: the compiler's preparation for ftrace, which gives x30 back.
    const KEEP_LINK: u32 = 0xaa1e_03e9;
    let calls = word >> 26 == 0b10_0101 || word & 0xffff_fc1f == 0xd63f_0000;
    if sets_own_record(word) {
        Record::Own
    } else if loads_callers_record(word) {
        Record::Callers
    } else if calls && state == Record::Callers && before != Some(KEEP_LINK) {
        Record::Lost
    } else {
        state
    }
}

/// `mov x29, sp` or `add x29, sp, #n`.
const fn sets_own_record(word: u32) -> bool {
    word & 0xff80_03ff == 0x9100_03fd
}

/// `ldp x29, x30, [..]`, with or without writing the address back.
const fn loads_callers_record(word: u32) -> bool {
    let load = matches!(word & 0xffc0_0000, 0xa8c0_0000 | 0xa940_0000 | 0xa9c0_0000);
    load && word & 0x7c1f == 30 << 10 | 29
}

/// Where an instruction leads, in instructions from itself.
pub(super) enum Way {
    On,
    Jump(i64),
    Branch(i64),
    Computed,
    Trap,
    End,
}

pub(super) fn flow_of(word: u32) -> Way {
    // A signed field of `width` bits at bit `low`.
    let distance =
        |low: u32, width: u32| i64::from((word << (32 - low - width)) as i32 >> (32 - width));
    match word {
        _ if word >> 26 == 0b00_0101 => Way::Jump(distance(0, 26)),
        // b.cond, bc.cond
        _ if word >> 24 == 0x54 => Way::Branch(distance(5, 19)),
        // cbz, cbnz
        _ if word & 0x7e00_0000 == 0x3400_0000 => Way::Branch(distance(5, 19)),
        // tbz, tbnz
        _ if word & 0x7e00_0000 == 0x3600_0000 => Way::Branch(distance(5, 14)),
        // ret, retaa, retab, eret
        _ if word & 0xffff_fc1f == 0xd65f_0000 => Way::End,
        0xd65f_0bff | 0xd65f_0fff | 0xd69f_03e0 => Way::End,
        // br, braa and the like
        _ if word & 0xfedf_f000 == 0xd61f_0000 => Way::Computed,
        _ if word & 0xffe0_001f == 0xd420_0000 => Way::Trap,
        _ => Way::On,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACIASP: u32 = 0xd503_233f;
    const PUSH: u32 = 0xa9be_7bfd; // stp x29, x30, [sp, #-32]!
    const SET: u32 = 0x9100_03fd; // mov x29, sp
    const POP: u32 = 0xa8c2_7bfd; // ldp x29, x30, [sp], #32
    const RET: u32 = 0xd65f_03c0;
    const NOP: u32 = 0xd503_201f;
    const CALL: u32 = 0x9400_1000;
    const BRK: u32 = 0xd421_0000;
    const BR_X1: u32 = 0xd61f_0020;

    /// `cbz x0, distance`.
    fn cbz(distance: i32) -> u32 {
        0xb400_0000 | (distance as u32 & 0x7ffff) << 5
    }

    fn jump(distance: i32) -> u32 {
        0x1400_0000 | distance as u32 & 0x3ff_ffff
    }

    fn all(code: &[u32]) -> Vec<Option<Record>> {
        (0..code.len()).map(|at| record_at(code, at)).collect()
    }

    const OWN: Option<Record> = Some(Record::Own);
    const CALLERS: Option<Record> = Some(Record::Callers);

    #[test]
    fn leaf_function_never_has_a_record() {
        assert_eq!(all(&[NOP, cbz(2), NOP, RET]), [CALLERS; 4]);
    }

    #[test]
    fn record_is_the_functions_own_between_its_first_and_its_last_instructions() {
        let code = [PACIASP, PUSH, SET, CALL, NOP, POP, NOP, RET];
        // Saved, but x29 not yet set; loaded again, but not yet returned.
        let expected = [CALLERS, CALLERS, CALLERS, OWN, OWN, OWN, CALLERS, CALLERS];
        assert_eq!(all(&code), expected);
    }

    #[test]
    fn frame_that_only_one_way_needs_is_found_on_that_way_only() {
        // if (x0) { push; call; pop }; return
        let code = [cbz(6), PUSH, SET, CALL, POP, NOP, RET];
        assert_eq!(all(&code)[2..], [CALLERS, OWN, OWN, CALLERS, CALLERS]);
    }

    #[test]
    fn code_behind_the_end_is_reached_by_jumps() {
        // The cold part comes after the return, and goes back.
        let code = [PUSH, SET, cbz(4), POP, RET, NOP, CALL, jump(-4)];
        assert_eq!(record_at(&code, 6), OWN);
        assert_eq!(record_at(&code, 4), CALLERS);
    }

    #[test]
    fn cases_of_a_switch_are_in_the_state_of_its_jump() {
        let code = [PUSH, SET, BR_X1, NOP, CALL, jump(3), POP, RET, POP, RET];
        assert_eq!(record_at(&code, 4), OWN);
        assert_eq!(record_at(&code, 7), CALLERS);
    }

    #[test]
    fn traps_are_passed_only_when_nothing_else_leads_there() {
        // BUG() at the end of a way; what follows belongs to another way.
        assert_eq!(record_at(&[cbz(4), PUSH, SET, BRK, NOP, RET], 4), CALLERS);
        // WARN(): the way goes on.
        assert_eq!(record_at(&[PUSH, SET, BRK, NOP, POP, RET], 3), OWN);
    }

    #[test]
    fn call_for_ftrace_gives_the_return_address_back_and_other_calls_do_not() {
        assert_eq!(record_at(&[0xaa1e_03e9, CALL, PACIASP, PUSH, SET], 3), CALLERS);
        assert_eq!(record_at(&[CALL, NOP], 1), Some(Record::Lost));
    }

    #[test]
    fn different_states_at_one_place_are_not_decided() {
        // x29 is set on one of two ways that meet.
        assert_eq!(record_at(&[cbz(2), SET, NOP, RET], 2), None);
        assert_eq!(record_at(&[NOP], 1), None);
    }

    proptest! {
        #[test]
        fn garbage_code_never_panics_and_always_ends(
            code in prop::collection::vec(any::<u32>(), 0..400),
            at in 0usize..400,
        ) {
            let _ = record_at(&code, at);
        }
    }
}
