//! Which registers still hold what a function was given, at one of its instructions.
//!
//! All ways from the function's first instruction are followed to a fixed point: where ways meet, only
//! what holds on all of them holds.

use std::collections::HashMap;

/// More instructions than any function has that is worth it.
const MAX_INSTRUCTIONS: usize = 1 << 14;

/// What an instruction does to registers, as far as it matters here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// A bit for each register that it writes, or may write.
    pub written: u32,
    /// What it copies.
    pub copy: Option<Copied>,
    /// What it adds to the stack pointer; `None` when that cannot be told.
    pub stack: Option<i64>,
}

/// A copy from one register to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    pub to: u16,
    pub from: u16,
    /// Whether all of it is copied, not the lower 32 bits alone.
    pub whole: bool,
}

/// An instruction: where it leads to, and what it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    pub effect: Effect,
    /// The addresses of those that may come next.
    pub next: Vec<u64>,
    /// Whether it may lead to others that cannot be told.
    pub computed: bool,
}

/// Registers in which a value is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holders {
    /// Those that have all of it.
    pub whole: u32,
    /// Those that have its lower 32 bits.
    pub low: u32,
}

/// What is known at an instruction, before it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// For each register that arguments are passed in, in their order, where its value is.
    pub held: Vec<Holders>,
    /// How far the stack pointer is from where it was.
    pub stack: Option<i64>,
}

impl State {
    fn entry(registers: &[u16]) -> State {
        let itself = |&number: &u16| Holders { whole: 1 << number, low: 1 << number };
        State { held: registers.iter().map(itself).collect(), stack: Some(0) }
    }

    fn after(&self, effect: &Effect) -> State {
        let one = |before: &Holders| {
            let mut after = Holders {
                whole: before.whole & !effect.written,
                low: before.low & !effect.written,
            };
            if let Some(copy) = effect.copy {
                let (to, from) = (1u32 << copy.to, 1u32 << copy.from);
                if before.low & from != 0 {
                    after.low |= to;
                }
                if copy.whole && before.whole & from != 0 {
                    after.whole |= to;
                }
            }
            after
        };
        let stack = self.stack.zip(effect.stack).map(|(so_far, more)| so_far.wrapping_add(more));
        State { held: self.held.iter().map(one).collect(), stack }
    }

    /// What holds here and there.
    fn meet(&self, other: &State) -> State {
        let both = |(one, other): (&Holders, &Holders)| Holders {
            whole: one.whole & other.whole,
            low: one.low & other.low,
        };
        let held = self.held.iter().zip(&other.held).map(both).collect();
        State { held, stack: self.stack.filter(|_| self.stack == other.stack) }
    }
}

/// What is known at `wanted` of the function that begins at `entry` and whose instructions `decode` gives.
/// `None` when no way leads there, or ways that cannot be told may do.
pub(super) fn state_at(
    entry: u64,
    wanted: u64,
    registers: &[u16],
    decode: impl Fn(u64) -> Option<Step>,
) -> Option<State> {
    let mut known = HashMap::from([(entry, State::entry(registers))]);
    let mut open = vec![entry];
    while let Some(at) = open.pop() {
        let (Some(step), Some(before)) = (decode(at), known.get(&at)) else { continue };
        if step.computed {
            return None;
        }
        let after = before.after(&step.effect);
        for next in step.next {
            let merged = known.get(&next).map_or_else(|| after.clone(), |it| it.meet(&after));
            if known.get(&next) != Some(&merged) {
                known.insert(next, merged);
                open.push(next);
            }
        }
        if known.len() > MAX_INSTRUCTIONS {
            return None;
        }
    }
    known.remove(&wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPY: Copied = Copied { to: 3, from: 5, whole: true };

    fn writes(registers: u32) -> Effect {
        Effect { written: registers, copy: None, stack: Some(0) }
    }

    /// A function of instructions of one byte each: what they do, and where they may jump to.
    fn state(code: &[(Effect, &[u64])], wanted: u64) -> Option<State> {
        let decode = |at: u64| {
            let (effect, jumps) = code.get(usize::try_from(at).ok()?)?;
            let next = jumps.iter().copied().chain([at + 1]).collect();
            Some(Step { effect: *effect, next, computed: false })
        };
        state_at(0, wanted, &[5, 4], decode)
    }

    fn whole(state: &State) -> Vec<u32> {
        state.held.iter().map(|it| it.whole).collect()
    }

    #[test]
    fn nothing_is_lost_at_the_first_instruction() {
        assert_eq!(whole(&state(&[(writes(!0), &[])], 0).unwrap()), [1 << 5, 1 << 4]);
    }

    #[test]
    fn copy_survives_the_register_that_it_was_made_of() {
        let copy = Effect { written: 1 << 3, copy: Some(COPY), stack: Some(0) };
        let code = [(copy, &[][..]), (writes(1 << 5), &[]), (writes(0), &[])];
        assert_eq!(whole(&state(&code, 1).unwrap()), [1 << 5 | 1 << 3, 1 << 4]);
        assert_eq!(whole(&state(&code, 2).unwrap()), [1 << 3, 1 << 4]);
    }

    #[test]
    fn copy_of_32_bits_holds_no_more_than_those() {
        let copy = Some(Copied { whole: false, ..COPY });
        let copy = Effect { written: 1 << 3, copy, stack: Some(0) };
        let state = state(&[(copy, &[]), (writes(1 << 5), &[])], 2).unwrap();
        assert_eq!(state.held[0], Holders { whole: 0, low: 1 << 3 });
    }

    #[test]
    fn what_one_of_two_ways_overwrites_is_lost_where_they_meet() {
        // if (..) rdi = ..;
        let code = [(writes(0), &[2][..]), (writes(1 << 5), &[]), (writes(0), &[])];
        assert_eq!(whole(&state(&code, 2).unwrap()), [0, 1 << 4]);
        assert_eq!(whole(&state(&code, 1).unwrap()), [1 << 5, 1 << 4]);
    }

    #[test]
    fn loop_that_overwrites_behind_an_instruction_reaches_it_again() {
        let code = [(writes(0), &[][..]), (writes(0), &[]), (writes(1 << 4), &[1])];
        assert_eq!(whole(&state(&code, 1).unwrap()), [1 << 5, 0]);
    }

    #[test]
    fn stack_pointer_is_known_as_long_as_all_ways_agree() {
        let push = Effect { written: 0, copy: None, stack: Some(-16) };
        let code = [(push, &[][..]), (writes(0), &[3]), (push, &[]), (writes(0), &[])];
        assert_eq!(state(&code, 1).unwrap().stack, Some(-16));
        assert_eq!(state(&code, 3).unwrap().stack, None);
    }

    #[test]
    fn instruction_that_no_way_leads_to_is_not_known() {
        let decode = |at| Some(Step { next: Vec::new(), computed: at == 7, ..Step::default() });
        assert_eq!(state_at(0, 1, &[5], decode), None);
        assert_eq!(state_at(7, 7, &[5], decode), None);
    }
}
