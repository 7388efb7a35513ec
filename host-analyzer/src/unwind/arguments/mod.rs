//! Arguments without debug information, where all registers are known: BTF has the function's prototype, the
//! calling convention says where the arguments were, and the function's own code whether they still are.

mod aarch64;
mod convention;
mod flow;
mod x86_64;

use crate::VirtAddr;
use crate::bytes;
use crate::kernel::btf::Btf;
use crate::kernel::machine::Machine;
use crate::kernel::registers;
use crate::kernel::types::{Prototype, Type, TypeId, Types, Value};
use crate::linux::{Linux, Place};

use super::{CallerBy, Frame, FrameKind};

use convention::Place as Passed;
use flow::{Holders, State};

/// What is said of all frames but those of exceptions.
pub const NOT_INTERRUPTED: &str = "not where an exception was taken: only a vmlinux can tell";

/// More bytes than any function has that is worth it.
const MAX_CODE: usize = 64 << 10;

/// An argument.
#[derive(Clone, Debug, PartialEq)]
pub struct Argument {
    /// Its name; empty when the types have none.
    pub name: String,
    /// Its type, in C.
    pub kind: String,
    /// How C declares it.
    pub declaration: String,
    /// Its value; `None` when it is not known.
    pub value: Option<Value>,
    /// Where it is from, or why it is not known.
    pub from: String,
}

/// The arguments of the function at `frame`, which `caller` called.
///
/// # Errors
/// Why they cannot be told, as a sentence.
pub fn arguments(
    linux: &Linux<'_, '_>,
    frame: &Frame,
    caller: Option<&Frame>,
) -> Result<Vec<Argument>, String> {
    if frame.kind != FrameKind::Registers {
        return Err(NOT_INTERRUPTED.to_owned());
    }
    let place = linux.place(frame.pc).ok_or("the function is not known")?;
    if let Some((function, part)) = place.name.split_once('.') {
        return Err(format!("the compiler made .{part} of {function}, with parameters of its own"));
    }
    let of_module;
    let types = match &place.module {
        None => linux.kernel().types().map_err(|error| error.to_string())?,
        Some(module) => {
            of_module = linux.module_types(module)?;
            &*of_module
        }
    };
    let prototype = prototype(types, &place.name)?;
    let state = state(linux, frame.pc, &place);
    let machine = linux.kernel().machine();
    let stack = first_on_stack(machine, frame, caller, state.as_ref());
    let there = There { linux, frame, state, stack };
    let mut places = convention::places(types, machine, &prototype).into_iter();
    let one = |(name, kind): &(String, TypeId)| match (kind.0, places.next()) {
        // ...
        (0, _) => None,
        (_, passed) => Some(there.argument(types, name, *kind, passed.as_ref())),
    };
    Ok(prototype.parameters.iter().map_while(one).collect())
}

/// The prototype of the function called `name`.
fn prototype(types: &Btf<'_>, name: &str) -> Result<Prototype, String> {
    let functions = types.named(name, |it| matches!(it, Type::Function(..)));
    let prototypes = functions.into_iter().filter_map(|id| match types.get(id) {
        Type::Function(_, prototype) => match types.get(prototype) {
            Type::Prototype(it) => Some((types.declare(prototype, name), it)),
            _ => None,
        },
        _ => None,
    });
    let mut prototypes: Vec<(String, Prototype)> = prototypes.collect();
    prototypes.dedup_by(|one, other| one.0 == other.0);
    match prototypes.len() {
        0 => Err(format!("BTF does not describe {name}")),
        1 => Ok(prototypes.swap_remove(0).1),
        _ => Err(format!("several functions are called {name}, with different parameters")),
    }
}

/// What the function's code leaves of its arguments at `pc`.
fn state(linux: &Linux<'_, '_>, pc: VirtAddr, place: &Place) -> Option<State> {
    let start = pc.back(place.offset);
    let end = linux.kernel().image_symbol(pc).map_or(u64::MAX, |symbol| symbol.end.0);
    let length = usize::try_from(end.saturating_sub(start.0)).unwrap_or(MAX_CODE).min(MAX_CODE);
    let code = linux.kernel().memory().bytes_up_to(start, length);
    match linux.kernel().machine() {
        Machine::X86_64 => {
            let decode = |at| x86_64::decode(&code, start.0, at);
            flow::state_at(start.0, pc.0, &x86_64::ARGUMENTS, decode)
        }
        Machine::Aarch64 => {
            let words: Vec<u32> =
                code.chunks_exact(4).filter_map(|it| bytes::u32_at(it, 0)).collect();
            let decode = |at| aarch64::decode(&words, start.0, at);
            flow::state_at(start.0, pc.0, &aarch64::ARGUMENTS, decode)
        }
    }
}

/// Where the first argument on the stack is.
fn first_on_stack(
    machine: Machine,
    frame: &Frame,
    caller: Option<&Frame>,
    state: Option<&State>,
) -> Option<VirtAddr> {
    match machine {
        // Behind the return address, which the unwinder found.
        Machine::X86_64 => caller
            .filter(|it| it.kind == FrameKind::ReturnAddress && frame.caller == CallerBy::Tables)
            .map(|caller| caller.at.offset(8)),
        // Where the stack pointer was at the start.
        Machine::Aarch64 => {
            let moved = state?.stack?;
            let now = frame.registers.get(registers::stack_pointer(machine))?;
            Some(VirtAddr(now.wrapping_sub(moved as u64)))
        }
    }
}

/// What arguments are looked for in.
struct There<'a, 'k, 'd> {
    linux: &'a Linux<'k, 'd>,
    frame: &'a Frame,
    state: Option<State>,
    stack: Option<VirtAddr>,
}

/// Bytes and where they are from; or why there are none.
type Read = Result<(Vec<u8>, String), String>;

impl There<'_, '_, '_> {
    fn argument(
        &self,
        types: &Btf<'_>,
        name: &str,
        kind: TypeId,
        passed: Option<&Passed>,
    ) -> Argument {
        let size = types.size_of(kind);
        let read = match passed.zip(size) {
            Some((passed, size)) => self.read(passed, size),
            None => Err("how it was passed cannot be told".to_owned()),
        };
        let (value, from) = match read {
            Ok((raw, from)) => (Some(types.value(kind, &raw)), from),
            Err(why) => (None, why),
        };
        let (declaration, kind) = (types.declare(kind, name), types.type_name(kind));
        Argument { name: name.to_owned(), kind, declaration, value, from }
    }

    fn read(&self, passed: &Passed, size: usize) -> Read {
        match passed {
            Passed::Registers { first, count } => {
                let mut bytes = Vec::new();
                let mut from = Vec::new();
                for index in *first..first + count {
                    let left = size.saturating_sub(bytes.len());
                    let (value, place) = self.register(index, left)?;
                    bytes.extend(value.to_le_bytes());
                    from.push(place);
                }
                Ok((bytes, from.join(" and ")))
            }
            Passed::Stack(distance) => {
                let start = self.stack.ok_or("where it is on the stack cannot be told")?;
                self.memory(start.offset(*distance), size)
            }
            Passed::Copy(address) => {
                let (raw, from) = self.read(address, 8)?;
                let at = bytes::u64_at(&raw, 0).ok_or("its address is not known")?;
                let (raw, place) = self.memory(VirtAddr(at), size)?;
                Ok((raw, format!("{place}, by {from}")))
            }
        }
    }

    fn memory(&self, at: VirtAddr, size: usize) -> Read {
        let raw = self.linux.kernel().memory().bytes(at, size);
        let raw = raw.map_err(|_| format!("at {at:x}, which is not in the dump"))?;
        Ok((raw.into_owned(), format!("at {at:x}")))
    }

    /// The argument register with this place among them, or one that it was copied to; `size` bytes of it are
    /// wanted.
    fn register(&self, index: usize, size: usize) -> Result<(u64, String), String> {
        let machine = self.linux.kernel().machine();
        let numbers: &[u16] = match machine {
            Machine::X86_64 => &x86_64::ARGUMENTS,
            Machine::Aarch64 => &aarch64::ARGUMENTS,
        };
        let number = *numbers.get(index).ok_or("there is no such register")?;
        let name = |number| registers::name(machine, number);
        let held = self.state.as_ref().and_then(|state| state.held.get(index));
        let Some(&Holders { whole, low }) = held else {
            return Err(format!("whether {} still has it cannot be told", name(number)));
        };
        let holders = if size <= 4 { low } else { whole };
        let itself = [number].into_iter().chain(0..32).find(|it| holders >> it & 1 != 0);
        let holder = itself.ok_or_else(|| format!("{} was overwritten", name(number)))?;
        let value = self.frame.registers.get(holder);
        let value = value.ok_or_else(|| format!("{} is not known", name(holder)))?;
        let from = match holder == number {
            true => name(number),
            false => format!("{}, a copy of {}", name(holder), name(number)),
        };
        Ok((value, from))
    }
}
