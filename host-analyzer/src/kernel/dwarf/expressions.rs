//! Expressions of debug information (DWARF 5, 2.5 and 2.6), evaluated in the frames of a stack.

use gimli::{
    AttributeValue, EvaluationResult, Expression, Location, Piece, UnitOffset, UnitRef, Value,
    ValueType, constants as dw,
};

use crate::VirtAddr;
use crate::kernel::machine::Machine;
use crate::kernel::registers::Registers;
use crate::kernel::virt::VirtualMemory;

use super::{DebugInfo, Reader};

/// Bound for what one expression computes, and for expressions that need others.
const MAX_STEPS: u32 = 10_000;
const MAX_DEPTH: usize = 16;

/// A frame, as expressions see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Its program counter: an instruction, or a return address.
    pub pc: VirtAddr,
    /// The address to look up instead: one byte back for return addresses.
    pub lookup: VirtAddr,
    /// What is known of its registers.
    pub registers: Registers,
    /// Its canonical frame address, if it is known.
    pub cfa: Option<u64>,
    /// Whether the next frame is known to be that of its caller: not one that it interrupted, and found
    /// where call frame information says that the return address is.
    pub has_caller: bool,
}

/// What expressions are evaluated in.
#[derive(Clone, Copy)]
pub struct World<'w, 'd> {
    /// The kernel's memory.
    pub memory: &'w VirtualMemory<'d>,
    /// Its architecture.
    pub machine: Machine,
    /// The frames of a stack, innermost first.
    pub frames: &'w [View],
}

/// Where a value is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A register of the frame, by its number.
    Register(u16),
    /// Memory.
    Memory(VirtAddr),
    /// Memory at an address that is as [`Origin::LikelyEntry`].
    LikelyMemory(VirtAddr),
    /// It was computed from registers and memory.
    Computed,
    /// It was computed from what the caller passed when it called.
    Entry,
    /// The same, if the caller called this very function, and not another that ended in a jump here.
    LikelyEntry,
    /// It is the same always.
    Constant,
    /// Its parts are in several places.
    Parts,
    /// The same, and some of them are as [`Origin::LikelyEntry`].
    LikelyParts,
}

/// Why a value is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// At this instruction the compiler kept it nowhere.
    OptimizedOut,
    /// It was in a register of which this frame's value is not known: a callee may have used it.
    Register(u16),
    /// It is in memory that is not in the dump.
    Memory(VirtAddr),
    /// It depends on what the caller passed, and that is not known.
    Entry,
    /// The debug information cannot be read, or says it in a way that is not supported.
    Unclear,
}

impl From<gimli::Error> for Missing {
    fn from(_: gimli::Error) -> Missing {
        Missing::Unclear
    }
}

/// Where an expression stands: in which function of which frame.
#[derive(Clone, Copy)]
pub(super) struct Context<'u, 'a> {
    pub unit: UnitRef<'u, Reader<'a>>,
    /// The function that others were inlined into.
    pub function: UnitOffset,
    pub frame: usize,
    /// How many expressions wait for this one.
    pub depth: usize,
}

/// Where a variable is.
pub(super) struct Found<'a> {
    pieces: Vec<Piece<Reader<'a>>>,
    /// Where its value is from, when that is no place.
    computed: Origin,
}

impl<'a> DebugInfo<'a> {
    /// What an expression says.
    pub(super) fn evaluate(
        &self,
        world: World<'_, '_>,
        context: Context<'_, 'a>,
        expression: Expression<Reader<'a>>,
    ) -> Result<Found<'a>, Missing> {
        if context.depth > MAX_DEPTH {
            return Err(Missing::Unclear);
        }
        let frame = world.frames.get(context.frame).ok_or(Missing::Unclear)?;
        let unit = context.unit;
        let typed = |kind, value| Ok::<_, Missing>(Value::from_u64(base_type(unit, kind)?, value)?);
        let mut computed = Origin::Computed;
        let mut evaluation = expression.evaluation(unit.encoding());
        evaluation.set_max_iterations(MAX_STEPS);
        let mut state = evaluation.evaluate()?;
        loop {
            state = match state {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, base_type } => {
                    let value = frame.registers.get(register.0);
                    let value = value.ok_or(Missing::Register(register.0))?;
                    evaluation.resume_with_register(typed(base_type, value)?)?
                }
                EvaluationResult::RequiresMemory { address, size, base_type, .. } => {
                    let raw = read(world, address, usize::from(size.min(8)))?;
                    let mut word = [0; 8];
                    word[..raw.len()].copy_from_slice(&raw);
                    evaluation.resume_with_memory(typed(base_type, u64::from_le_bytes(word))?)?
                }
                EvaluationResult::RequiresCallFrameCfa => {
                    evaluation.resume_with_call_frame_cfa(frame.cfa.ok_or(Missing::Unclear)?)?
                }
                EvaluationResult::RequiresFrameBase => {
                    evaluation.resume_with_frame_base(self.frame_base(world, context)?)?
                }
                EvaluationResult::RequiresEntryValue(inner) => {
                    let (value, certain) = self.passed(world, context, inner)?;
                    computed = match certain && computed != Origin::LikelyEntry {
                        true => Origin::Entry,
                        false => Origin::LikelyEntry,
                    };
                    evaluation.resume_with_entry_value(Value::Generic(value))?
                }
                EvaluationResult::RequiresRelocatedAddress(address) => {
                    let moved = address.wrapping_add(self.offset);
                    evaluation.resume_with_relocated_address(moved)?
                }
                EvaluationResult::RequiresIndexedAddress { index, relocate } => {
                    let moved = if relocate { self.offset } else { 0 };
                    let address = unit.address(index)?.wrapping_add(moved);
                    evaluation.resume_with_indexed_address(address)?
                }
                EvaluationResult::RequiresBaseType(kind) => {
                    evaluation.resume_with_base_type(base_type(unit, kind)?)?
                }
                _ => return Err(Missing::Unclear),
            };
        }
        Ok(Found { pieces: evaluation.result(), computed })
    }

    /// The number that an expression comes to, and where it is from.
    pub(super) fn number(
        &self,
        world: World<'_, '_>,
        context: Context<'_, 'a>,
        expression: Expression<Reader<'a>>,
    ) -> Result<(u64, Origin), Missing> {
        let found = self.evaluate(world, context, expression)?;
        let [Piece { size_in_bits: None, location, .. }] = found.pieces.as_slice() else {
            return Err(Missing::Unclear);
        };
        match *location {
            Location::Value { value } => Ok((bits_of(value), found.computed)),
            Location::Address { address } => Ok((address, found.computed)),
            Location::Register { register } => {
                let frame = world.frames.get(context.frame).ok_or(Missing::Unclear)?;
                let value = frame.registers.get(register.0);
                Ok((value.ok_or(Missing::Register(register.0))?, Origin::Register(register.0)))
            }
            _ => Err(Missing::Unclear),
        }
    }

    /// DW_AT_frame_base of the function.
    fn frame_base(&self, world: World<'_, '_>, context: Context<'_, 'a>) -> Result<u64, Missing> {
        let entry = context.unit.entry(context.function)?;
        match entry.attr_value(dw::DW_AT_frame_base) {
            Some(AttributeValue::Exprloc(expression)) => {
                let context = Context { depth: context.depth + 1, ..context };
                self.number(world, context, expression).map(|(base, _)| base)
            }
            _ => Err(Missing::Unclear),
        }
    }
}

impl Found<'_> {
    /// The `size` bytes that are there, and where.
    pub(super) fn bytes(
        &self,
        world: World<'_, '_>,
        frame: &View,
        size: usize,
    ) -> Result<(Vec<u8>, Origin), Missing> {
        if let [piece @ Piece { size_in_bits: None, .. }] = self.pieces.as_slice() {
            return self.part(world, frame, piece, size);
        }
        let mut bytes = Vec::with_capacity(size);
        for piece in &self.pieces {
            let bits = piece.size_in_bits.ok_or(Missing::Unclear)?;
            let part = usize::try_from(bits / 8).map_err(|_| Missing::Unclear)?;
            // Bit fields that lie in registers of their own.
            if bits % 8 != 0 || part > size - bytes.len() {
                return Err(Missing::Unclear);
            }
            bytes.extend(self.part(world, frame, piece, part)?.0);
        }
        match bytes.len() == size && size != 0 {
            true if self.computed == Origin::LikelyEntry => Ok((bytes, Origin::LikelyParts)),
            true => Ok((bytes, Origin::Parts)),
            false => Err(Missing::OptimizedOut),
        }
    }

    fn part(
        &self,
        world: World<'_, '_>,
        frame: &View,
        piece: &Piece<Reader<'_>>,
        size: usize,
    ) -> Result<(Vec<u8>, Origin), Missing> {
        if piece.bit_offset.is_some_and(|bits| bits != 0) {
            return Err(Missing::Unclear);
        }
        let word = |value: u64| {
            let raw = value.to_le_bytes();
            raw.get(..size).map(<[u8]>::to_vec).ok_or(Missing::Unclear)
        };
        match piece.location {
            Location::Empty => Err(Missing::OptimizedOut),
            // What it would point to was optimized out.
            Location::ImplicitPointer { .. } => Err(Missing::OptimizedOut),
            Location::Register { register } => {
                let value = frame.registers.get(register.0);
                let value = value.ok_or(Missing::Register(register.0))?;
                Ok((word(value)?, Origin::Register(register.0)))
            }
            Location::Address { address } => {
                let at = match self.computed {
                    Origin::LikelyEntry => Origin::LikelyMemory(VirtAddr(address)),
                    _ => Origin::Memory(VirtAddr(address)),
                };
                Ok((read(world, address, size)?, at))
            }
            Location::Value { value } => Ok((word(bits_of(value))?, self.computed)),
            Location::Bytes { value } => {
                let raw = value.slice().get(..size).ok_or(Missing::Unclear)?;
                Ok((raw.to_vec(), Origin::Constant))
            }
        }
    }
}

fn read(world: World<'_, '_>, address: u64, size: usize) -> Result<Vec<u8>, Missing> {
    /// More than any variable on a kernel's stack has.
    const MOST: usize = 64 << 10;
    let at = VirtAddr(address);
    let bytes = world.memory.bytes(at, size.min(MOST)).map_err(|_| Missing::Memory(at))?;
    Ok(bytes.into_owned())
}

/// The type of a value on the stack of an expression; entry 0 stands for a number as wide as an address.
fn base_type(unit: UnitRef<'_, Reader<'_>>, kind: UnitOffset) -> Result<ValueType, Missing> {
    match kind {
        UnitOffset(0) => Ok(ValueType::Generic),
        _ => ValueType::from_entry(&unit.entry(kind)?)?.ok_or(Missing::Unclear),
    }
}

fn bits_of(value: Value) -> u64 {
    match value {
        Value::F32(number) => u64::from(number.to_bits()),
        Value::F64(number) => number.to_bits(),
        other => other.to_u64(u64::MAX).unwrap_or(0),
    }
}
