//! What callers passed: call sites (DWARF 5, 3.4; before, DWARF 4 with GNU's extensions).

use gimli::{
    AttributeValue, DebuggingInformationEntry, EntriesTreeNode, Expression, UnitOffset, UnitRef,
    constants as dw,
};

use crate::VirtAddr;

use super::expressions::{Context, Missing, Origin, World};
use super::{DebugInfo, MAX_DEPTH, Reader};

/// A call.
struct Call<'a> {
    /// Whether the compiler knew whom it calls.
    is_direct: bool,
    /// Whom it calls, when that is computed.
    target: Option<Expression<Reader<'a>>>,
    /// Where its parameters go, and their values.
    parameters: Vec<(Expression<Reader<'a>>, Expression<Reader<'a>>)>,
}

impl<'a> DebugInfo<'a> {
    /// What `wanted` (a register, commonly) was when the function of `context` was entered, by the call in
    /// its caller's frame; and whether it is certain that this call entered it.
    pub(super) fn passed(
        &self,
        world: World<'_, '_>,
        context: Context<'_, 'a>,
        wanted: Expression<Reader<'a>>,
    ) -> Result<(u64, bool), Missing> {
        let frames = world.frames;
        frames.get(context.frame).filter(|it| it.has_caller).ok_or(Missing::Entry)?;
        let caller = frames.get(context.frame + 1).ok_or(Missing::Entry)?;
        let unit = self.units.with_code(self.unmoved(caller.lookup))?.ok_or(Missing::Entry)?;
        let unit = unit.unit_ref(&self.units.dwarf);
        let function = self.scopes(unit, self.unmoved(caller.lookup))?;
        let function = function.first().ok_or(Missing::Entry)?.offset;
        let call = call_at(unit, function, self.unmoved(caller.pc))?.ok_or(Missing::Entry)?;
        let there = Context { unit, function, frame: context.frame + 1, depth: context.depth + 1 };
        let certain = self.entered_by(world, context, there, &call, caller.pc)?;
        let same = |location: &Expression<Reader<'a>>| location.0.slice() == wanted.0.slice();
        let value = call.parameters.iter().find(|(location, _)| same(location));
        let (_, value) = value.ok_or(Missing::Entry)?;
        let (value, from) = self.number(world, there, *value).map_err(|_| Missing::Entry)?;
        Ok((value, certain && from != Origin::LikelyEntry))
    }

    /// Whether it is certain that `call` entered the function of `context`; an error when it did not. A
    /// function that was reached by a jump at the end of another has other parameters than those that the
    /// call passed.
    fn entered_by(
        &self,
        world: World<'_, '_>,
        context: Context<'_, 'a>,
        there: Context<'_, 'a>,
        call: &Call<'a>,
        returns: VirtAddr,
    ) -> Result<bool, Missing> {
        let size = world.machine.direct_call_size();
        let code = world.memory.bytes(returns.back(size), size as usize).ok();
        let direct = code.and_then(|code| world.machine.direct_call(&code, returns));
        if direct.is_some_and(|target| self.begins(context, target).unwrap_or(false)) {
            return Ok(true);
        }
        if call.is_direct {
            return Err(Missing::Entry);
        }
        let target = call.target.map(|target| self.number(world, there, target));
        match target {
            Some(Ok((at, _))) if self.begins(context, VirtAddr(at))? => Ok(true),
            Some(Ok(_)) => Err(Missing::Entry),
            // Where it went is not known any more: with retpolines the compiler never says it.
            _ => Ok(makes_no_jumps(there.unit)),
        }
    }

    /// Whether the function of `context` begins at `at`.
    fn begins(&self, context: Context<'_, 'a>, at: VirtAddr) -> Result<bool, Missing> {
        let entry = context.unit.entry(context.function)?;
        let mut ranges = context.unit.die_ranges(&entry)?;
        while let Some(range) = ranges.next()? {
            if range.begin == self.unmoved(at) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether the unit was compiled so that no function ends in a jump to another: kernels that need their
/// frame pointers are (Makefile, 6.1: CONFIG_FRAME_POINTER).
fn makes_no_jumps(unit: UnitRef<'_, Reader<'_>>) -> bool {
    let producer = || {
        let mut entries = unit.entries();
        let root = entries.next_dfs().ok()??;
        unit.attr_string(root.attr_value(dw::DW_AT_producer)?).ok()
    };
    let flag = "-fno-optimize-sibling-calls";
    producer().is_some_and(|it| it.to_string_lossy().contains(flag))
}

/// The call in `function` that returns to `pc`.
fn call_at<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    function: UnitOffset,
    pc: u64,
) -> gimli::Result<Option<Call<'a>>> {
    let mut tree = unit.entries_tree(Some(function))?;
    search(unit, tree.root()?, pc, 0)
}

fn search<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    node: EntriesTreeNode<'_, '_, Reader<'a>>,
    pc: u64,
    depth: usize,
) -> gimli::Result<Option<Call<'a>>> {
    if depth > MAX_DEPTH {
        return Ok(None);
    }
    let mut children = node.children();
    while let Some(child) = children.next()? {
        let entry = child.entry();
        let found = match entry.tag() {
            dw::DW_TAG_call_site | dw::DW_TAG_GNU_call_site
                if returns_to(unit, entry)? == Some(pc) =>
            {
                let target =
                    expression(entry, [dw::DW_AT_call_target, dw::DW_AT_GNU_call_site_target]);
                let is_direct = [dw::DW_AT_call_origin, dw::DW_AT_abstract_origin]
                    .into_iter()
                    .any(|it| entry.attr(it).is_some());
                Some(Call { is_direct, target, parameters: parameters(child)? })
            }
            dw::DW_TAG_lexical_block | dw::DW_TAG_inlined_subroutine => {
                search(unit, child, pc, depth + 1)?
            }
            _ => None,
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn returns_to<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    entry: &DebuggingInformationEntry<Reader<'a>>,
) -> gimli::Result<Option<u64>> {
    let at = entry.attr_value(dw::DW_AT_call_return_pc);
    let at = at.or_else(|| entry.attr_value(dw::DW_AT_low_pc));
    at.map_or(Ok(None), |at| unit.attr_address(at))
}

fn parameters<'a>(
    call: EntriesTreeNode<'_, '_, Reader<'a>>,
) -> gimli::Result<Vec<(Expression<Reader<'a>>, Expression<Reader<'a>>)>> {
    let mut parameters = Vec::new();
    let mut children = call.children();
    while let Some(child) = children.next()? {
        let entry = child.entry();
        let location = expression(entry, [dw::DW_AT_location]);
        let value = expression(entry, [dw::DW_AT_call_value, dw::DW_AT_GNU_call_site_value]);
        parameters.extend(location.zip(value));
    }
    Ok(parameters)
}

fn expression<'a, const N: usize>(
    entry: &DebuggingInformationEntry<Reader<'a>>,
    names: [gimli::DwAt; N],
) -> Option<Expression<Reader<'a>>> {
    names.into_iter().find_map(|name| match entry.attr_value(name)? {
        AttributeValue::Exprloc(expression) => Some(expression),
        AttributeValue::Block(data) => Some(Expression(data)),
        _ => None,
    })
}
