//! Lines and inlined functions, from the debug information of a vmlinux.
//!
//! Only the compilation units that a wanted address lies in are looked at: `.debug_aranges` tells
//! which (DWARF 5, 6.1.2). In a unit, whole functions are skipped until the right one comes.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::ops::ControlFlow;

use gimli::{
    Attribute, AttributeValue, DebugAranges, DebugInfoOffset, DebuggingInformationEntry, Dwarf,
    EndianSlice, EntriesTreeNode, LittleEndian, Unit, UnitOffset, UnitRef, constants as dw,
};

use crate::VirtAddr;

use super::vmlinux::Vmlinux;

type Reader<'a> = EndianSlice<'a, LittleEndian>;

/// Bound for nested blocks and for chains of references.
const MAX_DEPTH: usize = 64;

/// A place in the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// File, relative to the root of the kernel's source when that can be told.
    pub file: Option<String>,
    /// Line; 0 when the compiler did not say.
    pub line: u64,
}

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
    dwarf: Dwarf<Reader<'a>>,
    aranges: DebugAranges<Reader<'a>>,
    /// How far KASLR moved the kernel.
    offset: u64,
    units: OnceCell<Vec<(u64, u64, DebugInfoOffset)>>,
    /// What was found before: most tasks sleep in the same few functions.
    known: RefCell<HashMap<VirtAddr, Vec<SourceFrame>>>,
}

impl<'a> DebugInfo<'a> {
    /// The debug information in `vmlinux`, for a kernel that was moved by `offset`.
    #[must_use]
    pub fn new(vmlinux: &'a Vmlinux, offset: u64) -> DebugInfo<'a> {
        let reader = |name: &str| EndianSlice::new(vmlinux.section(name), LittleEndian);
        let load = |id: gimli::SectionId| Ok::<_, gimli::Error>(reader(id.name()));
        let dwarf = Dwarf::load(load).unwrap_or_default();
        let aranges = DebugAranges::from(reader(".debug_aranges"));
        let (units, known) = (OnceCell::new(), RefCell::default());
        DebugInfo { dwarf, aranges, offset, units, known }
    }

    /// The functions at the instruction `pc`, innermost first. Empty when nothing is known of it.
    #[must_use]
    pub fn frames(&self, pc: VirtAddr) -> Vec<SourceFrame> {
        if let Some(frames) = self.known.borrow().get(&pc) {
            return frames.clone();
        }
        let frames = self.try_frames(pc.0.wrapping_sub(self.offset)).ok().flatten();
        let frames = frames.unwrap_or_default();
        self.known.borrow_mut().insert(pc, frames.clone());
        frames
    }

    fn try_frames(&self, pc: u64) -> gimli::Result<Option<Vec<SourceFrame>>> {
        let Some(offset) = self.unit_of(pc) else { return Ok(None) };
        let unit = self.dwarf.unit(self.dwarf.unit_header(offset)?)?;
        let unit = unit.unit_ref(&self.dwarf);
        let mut position = line_of(unit, pc)?.unwrap_or_default();
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

    fn unit_of(&self, pc: u64) -> Option<DebugInfoOffset> {
        let units = self.units.get_or_init(|| self.read_aranges());
        let after = units.partition_point(|&(start, _, _)| start <= pc);
        let (start, length, offset) = *units.get(after.checked_sub(1)?)?;
        (pc - start < length).then_some(offset)
    }

    /// Address, length and unit of every range, sorted; what cannot be read is left out.
    fn read_aranges(&self) -> Vec<(u64, u64, DebugInfoOffset)> {
        let mut units = Vec::new();
        let mut headers = self.aranges.headers();
        while let Ok(Some(header)) = headers.next() {
            let mut entries = header.entries();
            while let Ok(Some(entry)) = entries.next() {
                units.push((entry.address(), entry.length(), header.debug_info_offset()));
            }
        }
        units.sort_unstable_by_key(|&(start, _, _)| start);
        units
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
        let mut units = self.dwarf.units();
        while let Some(header) = units.next()? {
            if let Some(inside) = offset.to_unit_offset(&header) {
                let unit: Unit<Reader<'a>> = self.dwarf.unit(header)?;
                return self.name(&unit.unit_ref(&self.dwarf), inside, depth);
            }
        }
        Ok(None)
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
            let call = if inlined { Some(call_site(unit, entry)?) } else { None };
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

fn call_site<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    entry: &DebuggingInformationEntry<Reader<'a>>,
) -> gimli::Result<Position> {
    let number = |name| entry.attr(name).and_then(Attribute::udata_value);
    let index = match entry.attr_value(dw::DW_AT_call_file) {
        Some(AttributeValue::FileIndex(index)) => Some(index),
        _ => number(dw::DW_AT_call_file),
    };
    let file = index.map(|index| file_name(unit, index)).transpose()?.flatten();
    Ok(Position { file, line: number(dw::DW_AT_call_line).unwrap_or(0) })
}

/// The row of the line table that `pc` is in.
fn line_of(unit: UnitRef<'_, Reader<'_>>, pc: u64) -> gimli::Result<Option<Position>> {
    let Some(program) = unit.line_program.clone() else { return Ok(None) };
    let mut rows = program.rows();
    let mut last: Option<(u64, u64, u64)> = None;
    while let Some((_, row)) = rows.next_row()? {
        if let Some((address, file, line)) = last
            && address <= pc
            && pc < row.address()
        {
            return Ok(Some(Position { file: file_name(unit, file)?, line }));
        }
        let line = row.line().map_or(0, u64::from);
        last = (!row.end_sequence()).then(|| (row.address(), row.file_index(), line));
    }
    Ok(None)
}

fn file_name(unit: UnitRef<'_, Reader<'_>>, index: u64) -> gimli::Result<Option<String>> {
    let Some(program) = &unit.line_program else { return Ok(None) };
    let header = program.header();
    let Some(file) = header.file(index) else { return Ok(None) };
    let text =
        |value| Ok::<_, gimli::Error>(unit.attr_string(value)?.to_string_lossy().into_owned());
    let name = text(file.path_name())?;
    let directory = file.directory(header).map(text).transpose()?.unwrap_or_default();
    let base = unit.comp_dir.map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Some(tidy(&base, &directory, &name)))
}

/// Puts a path together, resolves `.` and `..` in it, and leaves away the directories that it shares
/// with the one the kernel was built in: that much is the root of the source, or below it.
fn tidy(base: &str, directory: &str, name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for path in [base, directory, name] {
        if path.starts_with('/') {
            parts.clear();
        }
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                part => parts.push(part),
            }
        }
    }
    let root = base.split('/').filter(|part| !part.is_empty());
    let shared = root.zip(&parts).take_while(|(root, part)| root == *part).count();
    match shared {
        0 => format!("/{}", parts.join("/")),
        _ => parts.split_off(shared.min(parts.len() - 1)).join("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_relative_to_the_source() {
        let tree = "/build/linux-6.1";
        assert_eq!(tidy(tree, "kernel", "panic.c"), "kernel/panic.c");
        assert_eq!(tidy(tree, "./arch/x86/include/asm", "a.h"), "arch/x86/include/asm/a.h");
        let out = "/build/linux-6.1/debian/build";
        assert_eq!(tidy(out, "/build/linux-6.1/arch/x86", "entry.S"), "arch/x86/entry.S");
        assert_eq!(tidy(out, "../../kernel", "panic.c"), "kernel/panic.c");
        assert_eq!(tidy(tree, "/usr/include", "stdio.h"), "/usr/include/stdio.h");
        assert_eq!(tidy("", "", ""), "/");
    }
}
