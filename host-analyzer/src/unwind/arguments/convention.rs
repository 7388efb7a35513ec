//! Where arguments are passed: System V ABI, AMD64 supplement, 3.2.3, and AAPCS64, 6.8.2, as far as kernels
//! use them, which have no floating-point arguments.

use crate::kernel::machine::Machine;
use crate::kernel::types::{Prototype, Type, TypeId, Types};

/// Where an argument is when its function is entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In registers, one behind the other: their places among those that arguments are passed in.
    Registers { first: usize, count: usize },
    /// On the stack, so many bytes behind the first argument that is passed there.
    Stack(u64),
    /// It is a copy in memory, whose address is in this register, or on the stack.
    Copy(Box<Place>),
}

/// Structures that are larger are passed in memory.
const LARGEST: usize = 16;
const WORD: usize = 8;

/// Where the arguments of `prototype` are, as far as it can be told: those behind one that cannot be told
/// are left out.
pub(super) fn places(types: &dyn Types, machine: Machine, prototype: &Prototype) -> Vec<Place> {
    let registers = match machine {
        Machine::X86_64 => super::x86_64::ARGUMENTS.len(),
        Machine::Aarch64 => super::aarch64::ARGUMENTS.len(),
    };
    let mut next = Next { machine, registers, used: 0, stack: 0 };
    // The address of a result that is too large for registers comes first; arm64 has x8 for it.
    let result = class(types, prototype.returns);
    if machine == Machine::X86_64 && matches!(result, Some(Class::Memory { .. })) {
        next.used = 1;
    }
    let mut places = Vec::new();
    for (_, kind) in &prototype.parameters {
        let Some(class) = class(types, *kind) else { break };
        places.push(next.place(class));
    }
    places
}

/// How a type is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// In so many registers; `even` if the first must have an even number (arm64 only).
    Words { count: usize, even: bool },
    /// In memory: its size in bytes.
    Memory { size: usize },
}

fn class(types: &dyn Types, kind: TypeId) -> Option<Class> {
    let (id, bare) = types.bare(kind);
    let size = || types.size_of(id);
    let words = |size: usize| Class::Words { count: size.div_ceil(WORD), even: false };
    Some(match bare {
        Type::Integer(it) if it.size <= WORD => words(it.size),
        Type::Integer(it) => Class::Words { count: it.size.div_ceil(WORD), even: true },
        Type::Pointer(_) | Type::Enumeration(_) => words(WORD),
        Type::Structure(it) if has_float(types, id, 0) || it.size == 0 => return None,
        Type::Structure(_) | Type::Array(..) => match size()? {
            size if size <= LARGEST => words(size),
            size => Class::Memory { size },
        },
        // A result that there is none of; no parameter has this type.
        Type::Void if kind == TypeId(0) => Class::Words { count: 0, even: false },
        _ => return None,
    })
}

/// Whether there is a floating-point number in a structure: those go elsewhere.
fn has_float(types: &dyn Types, id: TypeId, depth: u32) -> bool {
    const MAX_DEPTH: u32 = 8;
    match types.bare(id).1 {
        _ if depth > MAX_DEPTH => true,
        Type::Float(..) => true,
        Type::Structure(it) => it.members.iter().any(|it| has_float(types, it.kind, depth + 1)),
        Type::Array(element, _) => has_float(types, element, depth + 1),
        _ => false,
    }
}

struct Next {
    machine: Machine,
    registers: usize,
    used: usize,
    stack: u64,
}

impl Next {
    fn place(&mut self, class: Class) -> Place {
        match (self.machine, class) {
            (_, Class::Words { count, even }) => self.words(count, even),
            (Machine::X86_64, Class::Memory { size }) => self.on_stack(size, WORD as u64),
            (Machine::Aarch64, Class::Memory { .. }) => Place::Copy(Box::new(self.words(1, false))),
        }
    }

    fn words(&mut self, count: usize, even: bool) -> Place {
        let is_arm = self.machine == Machine::Aarch64;
        if is_arm && even {
            self.used = self.used.next_multiple_of(2);
        }
        if self.used + count <= self.registers {
            let first = self.used;
            self.used += count;
            return Place::Registers { first, count };
        }
        // On arm64 nothing that follows goes into the registers that are left; on x86_64 it does.
        if is_arm {
            self.used = self.registers;
        }
        self.on_stack(count * WORD, if even { 16 } else { WORD as u64 })
    }

    fn on_stack(&mut self, size: usize, alignment: u64) -> Place {
        let at = self.stack.next_multiple_of(alignment);
        self.stack = at + size.next_multiple_of(WORD) as u64;
        Place::Stack(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::types::{Integer, Member, Structure};

    /// Types by their numbers: 1 int, 2 a pointer, 3 a 128-bit integer, 4 a structure of 16 bytes, 5 one of
    /// 24, 6 one with a floating-point number.
    struct Few;

    const INT: TypeId = TypeId(1);
    const POINTER: TypeId = TypeId(2);
    const WIDE: TypeId = TypeId(3);
    const SMALL: TypeId = TypeId(4);
    const LARGE: TypeId = TypeId(5);
    const FLOATS: TypeId = TypeId(6);

    impl Types for Few {
        fn get(&self, id: TypeId) -> Type {
            let integer = |size| {
                let name = String::new();
                Type::Integer(Integer { name, size, signed: false, boolean: false })
            };
            let structure = |size, kind| {
                let member = Member { name: String::new(), kind, bits: 0, width: 0 };
                let members = vec![member];
                Type::Structure(Structure { name: String::new(), union: false, size, members })
            };
            match id.0 {
                1 => integer(4),
                2 => Type::Pointer(TypeId(0)),
                3 => integer(16),
                4 => structure(16, POINTER),
                5 => structure(24, POINTER),
                6 => structure(8, TypeId(7)),
                7 => Type::Float("double".to_owned(), 8),
                _ => Type::Void,
            }
        }

        fn size_of(&self, id: TypeId) -> Option<usize> {
            [0, 4, 8, 16, 16, 24, 8, 8].get(id.0 as usize).copied()
        }
    }

    fn of(machine: Machine, returns: TypeId, parameters: &[TypeId]) -> Vec<Place> {
        let parameters = parameters.iter().map(|&kind| (String::new(), kind)).collect();
        places(&Few, machine, &Prototype { returns, parameters })
    }

    fn register(first: usize) -> Place {
        Place::Registers { first, count: 1 }
    }

    #[test]
    fn twenty_pointers_take_all_registers_and_then_the_stack() {
        let x86 = of(Machine::X86_64, INT, &[POINTER; 20]);
        assert_eq!(
            (&x86[5], &x86[6], &x86[19]),
            (&register(5), &Place::Stack(0), &Place::Stack(104))
        );
        let arm = of(Machine::Aarch64, INT, &[POINTER; 20]);
        assert_eq!(
            (&arm[7], &arm[8], &arm[19]),
            (&register(7), &Place::Stack(0), &Place::Stack(88))
        );
    }

    #[test]
    fn small_structures_take_two_registers_or_none() {
        let x86 =
            of(Machine::X86_64, INT, &[POINTER, POINTER, POINTER, POINTER, POINTER, SMALL, INT]);
        // Five are taken: the structure goes to the stack whole, what follows it to the sixth.
        assert_eq!(x86[5..], [Place::Stack(0), register(5)]);
        let arm = of(Machine::Aarch64, INT, &[POINTER, SMALL, INT]);
        assert_eq!(arm[1..], [Place::Registers { first: 1, count: 2 }, register(3)]);
    }

    #[test]
    fn large_structures_are_in_memory() {
        assert_eq!(
            of(Machine::X86_64, INT, &[LARGE, INT, LARGE]),
            [Place::Stack(0), register(0), Place::Stack(24)]
        );
        assert_eq!(
            of(Machine::Aarch64, INT, &[LARGE, INT]),
            [Place::Copy(Box::new(register(0))), register(1)]
        );
    }

    #[test]
    fn large_results_take_the_first_register_of_x86_64() {
        assert_eq!(of(Machine::X86_64, LARGE, &[INT]), [register(1)]);
        assert_eq!(of(Machine::Aarch64, LARGE, &[INT]), [register(0)]);
    }

    #[test]
    fn wide_integers_begin_with_an_even_register_on_arm64() {
        let pair = |first| Place::Registers { first, count: 2 };
        assert_eq!(of(Machine::Aarch64, INT, &[INT, WIDE])[1], pair(2));
        assert_eq!(of(Machine::X86_64, INT, &[INT, WIDE])[1], pair(1));
    }

    #[test]
    fn what_is_behind_a_type_that_cannot_be_told_is_left_out() {
        assert_eq!(of(Machine::X86_64, INT, &[INT, FLOATS, INT]), [register(0)]);
        assert_eq!(of(Machine::X86_64, INT, &[INT, TypeId(0)]).len(), 2);
    }
}
