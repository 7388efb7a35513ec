//! Lines, inlined functions and variables, from the debug information of a vmlinux.
//!
//! Only the compilation units that a wanted address lies in are looked at: `.debug_aranges` tells
//! which (DWARF 5, 6.1.2). In a unit, whole functions are skipped until the right one comes.

mod calls;
mod expressions;
mod frames;
mod lines;
mod types;
mod units;
mod variables;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::ControlFlow;

use gimli::{
    AttributeValue, DebugInfoOffset, DebuggingInformationEntry, EndianSlice, EntriesTreeNode,
    LittleEndian, UnitOffset, UnitRef, constants as dw,
};

use crate::VirtAddr;

use super::machine::Machine;
use super::registers::Registers;
use super::virt::VirtualMemory;
use super::vmlinux::Vmlinux;

use frames::CallFrames;
use units::Units;

pub use expressions::{Missing, Origin, View, World};
pub use frames::Caller;
pub use lines::Position;
pub use variables::{Variable, Variables};

type Reader<'a> = EndianSlice<'a, LittleEndian>;

/// Bound for nested blocks and for chains of references.
const MAX_DEPTH: usize = 64;

/// A function at an address: an inlined one, or the one that the others were inlined into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFrame {
    /// The function's name.
    pub function: Option<String>,
    /// Whether it is inlined into the next one.
    pub inlined: bool,
    /// Where in it the address is.
    pub position: Position,
}

/// The debug information of a vmlinux.
pub struct DebugInfo<'a> {
    units: Units<'a>,
    calls: CallFrames<'a>,
    /// How far KASLR moved the kernel.
    offset: u64,
    /// What was found before: most tasks sleep in the same few functions.
    known: RefCell<HashMap<VirtAddr, Vec<SourceFrame>>>,
}

impl<'a> DebugInfo<'a> {
    /// The debug information in `vmlinux`, for a kernel that was moved by `offset`.
    #[must_use]
    pub fn new(vmlinux: &'a Vmlinux, offset: u64) -> DebugInfo<'a> {
        let (units, calls) = (Units::new(vmlinux), CallFrames::new(vmlinux));
        DebugInfo { units, calls, offset, known: RefCell::default() }
    }

    /// An address of the running kernel as the vmlinux has it.
    fn unmoved(&self, at: VirtAddr) -> u64 {
        at.0.wrapping_sub(self.offset)
    }

    /// What leads from a frame at `lookup` with these registers to its caller, by call frame information.
    #[must_use]
    pub fn caller(
        &self,
        machine: Machine,
        memory: &VirtualMemory<'_>,
        lookup: VirtAddr,
        registers: &Registers,
    ) -> Option<Caller> {
        self.calls.caller(machine, memory, self.unmoved(lookup), registers)
    }

    /// The functions at the instruction `pc`, innermost first. Empty when nothing is known of it.
    #[must_use]
    pub fn frames(&self, pc: VirtAddr) -> Vec<SourceFrame> {
        if let Some(frames) = self.known.borrow().get(&pc) {
            return frames.clone();
        }
        let frames = self.try_frames(self.unmoved(pc)).ok().flatten();
        let frames = frames.unwrap_or_default();
        self.known.borrow_mut().insert(pc, frames.clone());
        frames
    }

    fn try_frames(&self, pc: u64) -> gimli::Result<Option<Vec<SourceFrame>>> {
        let Some(unit) = self.units.with_code(pc)? else { return Ok(None) };
        let unit = unit.unit_ref(&self.units.dwarf);
        let mut position = lines::of_instruction(unit, pc)?.unwrap_or_default();
        let mut frames = Vec::new();
        // From the innermost function outwards: each one's line is where the next was called.
        for scope in self.scopes(unit, pc)?.into_iter().rev() {
            let function = self.name(&unit, scope.offset, 0)?;
            let outer = scope.call.clone().unwrap_or_default();
            let inlined = scope.call.is_some();
            let position = std::mem::replace(&mut position, outer);
            frames.push(SourceFrame { function, inlined, position });
        }
        if frames.is_empty() {
            frames.push(SourceFrame { function: None, inlined: false, position });
        }
        Ok(Some(frames))
    }

    /// The function that `pc` is in, then what is inlined there, from the outermost inwards.
    fn scopes(&self, unit: UnitRef<'_, Reader<'a>>, pc: u64) -> gimli::Result<Vec<Scope>> {
        let mut scopes = Vec::new();
        let mut tree = unit.entries_tree(None)?;
        let _ = descend(unit, tree.root()?, pc, 0, &mut scopes)?;
        Ok(scopes)
    }

    /// The name of a function, by way of the entry that it is an instance of.
    fn name(
        &self,
        unit: &UnitRef<'_, Reader<'a>>,
        offset: UnitOffset,
        depth: usize,
    ) -> gimli::Result<Option<String>> {
        let entry = unit.entry(offset)?;
        if let Some(name) = entry.attr_value(dw::DW_AT_name) {
            return Ok(Some(unit.attr_string(name)?.to_string_lossy().into_owned()));
        }
        let origin = entry
            .attr_value(dw::DW_AT_abstract_origin)
            .or_else(|| entry.attr_value(dw::DW_AT_specification));
        match origin {
            _ if depth > MAX_DEPTH => Ok(None),
            Some(AttributeValue::UnitRef(offset)) => self.name(unit, offset, depth + 1),
            Some(AttributeValue::DebugInfoRef(offset)) => self.name_elsewhere(offset, depth + 1),
            _ => Ok(None),
        }
    }

    /// The name of an entry of another unit (link-time optimization puts them there).
    fn name_elsewhere(
        &self,
        offset: DebugInfoOffset,
        depth: usize,
    ) -> gimli::Result<Option<String>> {
        let Some(unit) = self.units.with_entry(offset.0)? else { return Ok(None) };
        let Some(inside) = offset.to_unit_offset(&unit.header) else { return Ok(None) };
        self.name(&unit.unit_ref(&self.units.dwarf), inside, depth)
    }
}

/// A function or an inlined instance of one.
struct Scope {
    offset: UnitOffset,
    /// Where it was called, for an inlined one.
    call: Option<Position>,
}

/// Looks below `node` for the entries around `pc`. Breaks once a function was found.
fn descend<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    node: EntriesTreeNode<'_, '_, Reader<'a>>,
    pc: u64,
    depth: usize,
    scopes: &mut Vec<Scope>,
) -> gimli::Result<ControlFlow<()>> {
    if depth > MAX_DEPTH {
        return Ok(ControlFlow::Break(()));
    }
    let mut children = node.children();
    while let Some(child) = children.next()? {
        let entry = child.entry();
        let inlined = match entry.tag() {
            dw::DW_TAG_subprogram => false,
            dw::DW_TAG_inlined_subroutine => true,
            dw::DW_TAG_lexical_block => {
                if covers(unit, entry, pc)? {
                    return descend(unit, child, pc, depth + 1, scopes);
                }
                continue;
            }
            _ => continue,
        };
        if covers(unit, entry, pc)? {
            let call = if inlined { Some(lines::of_call(unit, entry)?) } else { None };
            scopes.push(Scope { offset: entry.offset(), call });
            let _ = descend(unit, child, pc, depth + 1, scopes)?;
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn covers<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    entry: &DebuggingInformationEntry<Reader<'a>>,
    pc: u64,
) -> gimli::Result<bool> {
    let mut ranges = unit.die_ranges(entry)?;
    while let Some(range) = ranges.next()? {
        if range.begin <= pc && pc < range.end {
            return Ok(true);
        }
    }
    Ok(false)
}
