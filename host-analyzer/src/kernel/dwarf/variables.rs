//! Arguments and local variables of the functions at an instruction.

use gimli::{
    AttributeValue, DebuggingInformationEntry, EntriesTreeNode, UnitOffset, UnitRef,
    constants as dw,
};

use crate::kernel::types::{Type, TypeId, Types};

use super::expressions::{Context, Missing, Origin, World};
use super::types::{children, own_name, type_of};
use super::{DebugInfo, MAX_DEPTH, Reader, covers};

type Entry<'a> = DebuggingInformationEntry<Reader<'a>>;

/// An argument or a local variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name; empty when it has none.
    pub name: String,
    /// Its type.
    pub kind: TypeId,
    /// Its bytes, and where they are from.
    pub value: Result<(Vec<u8>, Origin), Missing>,
}

/// The variables of a function, inlined or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables {
    /// Its arguments in their order.
    pub arguments: Vec<Variable>,
    /// Its local variables, those of outer blocks first.
    pub locals: Vec<Variable>,
}

impl<'a> DebugInfo<'a> {
    /// The variables of the functions at `frame` of `world`: one set for each of [`DebugInfo::frames`], in
    /// the same order. Empty when nothing is known of that place.
    #[must_use]
    pub fn variables(&self, world: World<'_, '_>, frame: usize) -> Vec<Variables> {
        self.try_variables(world, frame).unwrap_or_default()
    }

    fn try_variables(&self, world: World<'_, '_>, frame: usize) -> gimli::Result<Vec<Variables>> {
        let Some(view) = world.frames.get(frame) else { return Ok(Vec::new()) };
        let pc = self.unmoved(view.lookup);
        let Some(unit) = self.units.with_code(pc)? else { return Ok(Vec::new()) };
        let unit = unit.unit_ref(&self.units.dwarf);
        let scopes = self.scopes(unit, pc)?;
        let Some(function) = scopes.first().map(|scope| scope.offset) else {
            return Ok(Vec::new());
        };
        let context = Context { unit, function, frame, depth: 0 };
        let one = |scope: &super::Scope| self.of_scope(world, context, scope.offset, pc);
        scopes.iter().rev().map(one).collect()
    }

    fn of_scope(
        &self,
        world: World<'_, '_>,
        context: Context<'_, 'a>,
        scope: UnitOffset,
        pc: u64,
    ) -> gimli::Result<Variables> {
        let unit = context.unit;
        let mut here = Declared::default();
        let mut tree = unit.entries_tree(Some(scope))?;
        collect(unit, tree.root()?, pc, 0, &mut here)?;
        let arguments = match origin(&unit.entry(scope)?) {
            Some(origin) => in_order(unit, origin, here.arguments)?,
            None => here.arguments,
        };
        let read = |at: &UnitOffset| self.variable(world, context, *at, pc);
        Ok(Variables {
            arguments: arguments.iter().map(read).collect::<gimli::Result<_>>()?,
            locals: here.locals.iter().map(read).collect::<gimli::Result<_>>()?,
        })
    }

    fn variable(
        &self,
        world: World<'_, '_>,
        context: Context<'_, 'a>,
        at: UnitOffset,
        pc: u64,
    ) -> gimli::Result<Variable> {
        let unit = context.unit;
        let entry = unit.entry(at)?;
        let (mut name, mut kind) = (own_name(unit, &entry)?, type_of(unit, &entry));
        let mut from = origin(&entry);
        for _ in 0..MAX_DEPTH {
            let Some(at) = from else { break };
            let outer = unit.entry(at)?;
            if name.is_empty() {
                name = own_name(unit, &outer)?;
            }
            if kind == TypeId(0) {
                kind = type_of(unit, &outer);
            }
            from = origin(&outer);
        }
        let value = self.contents(world, context, &entry, kind, pc);
        Ok(Variable { name, kind, value })
    }

    fn contents(
        &self,
        world: World<'_, '_>,
        context: Context<'_, 'a>,
        entry: &Entry<'a>,
        kind: TypeId,
        pc: u64,
    ) -> Result<(Vec<u8>, Origin), Missing> {
        let size = self.size_of(kind).ok_or(Missing::Unclear)?;
        if let Some(constant) = entry.attr_value(dw::DW_AT_const_value) {
            let bytes = constant_bytes(&constant, self.signed(kind));
            let bytes = bytes.get(..size).ok_or(Missing::Unclear)?;
            return Ok((bytes.to_vec(), Origin::Constant));
        }
        let unit = context.unit;
        let location = entry.attr_value(dw::DW_AT_location).ok_or(Missing::OptimizedOut)?;
        let expression = match location {
            AttributeValue::Exprloc(expression) => expression,
            list => {
                let mut places = unit.attr_locations(list)?.ok_or(Missing::Unclear)?;
                loop {
                    let place = places.next()?.ok_or(Missing::OptimizedOut)?;
                    if place.range.begin <= pc && pc < place.range.end {
                        break place.data;
                    }
                }
            }
        };
        let frame = world.frames.get(context.frame).ok_or(Missing::Unclear)?;
        self.evaluate(world, context, expression)?.bytes(world, frame, size)
    }

    fn signed(&self, kind: TypeId) -> bool {
        match self.bare(kind).1 {
            Type::Integer(it) => it.signed,
            Type::Enumeration(it) => it.signed,
            _ => false,
        }
    }
}

/// The bytes of a DW_AT_const_value. Forms of one to eight bytes do not say whether the first bit is a
/// sign (DWARF 5, 7.5.5): the type does.
fn constant_bytes(constant: &AttributeValue<Reader<'_>>, signed: bool) -> Vec<u8> {
    let unsigned = constant.udata_value();
    let with_sign = || constant.sdata_value().map(|number| number as u64);
    match (constant, unsigned.filter(|_| !signed).or_else(with_sign).or(unsigned)) {
        (AttributeValue::Block(data), _) => data.slice().to_vec(),
        (_, Some(number)) => number.to_le_bytes().to_vec(),
        _ => Vec::new(),
    }
}

/// Entries of variables.
#[derive(Default)]
struct Declared {
    arguments: Vec<UnitOffset>,
    locals: Vec<UnitOffset>,
}

/// Variables directly below `node`, and in the blocks below it that are around `pc`.
fn collect<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    node: EntriesTreeNode<'_, '_, Reader<'a>>,
    pc: u64,
    depth: usize,
    found: &mut Declared,
) -> gimli::Result<()> {
    if depth > MAX_DEPTH {
        return Ok(());
    }
    let mut children = node.children();
    while let Some(child) = children.next()? {
        let entry = child.entry();
        match entry.tag() {
            dw::DW_TAG_formal_parameter => found.arguments.push(entry.offset()),
            dw::DW_TAG_variable if entry.attr(dw::DW_AT_declaration).is_none() => {
                found.locals.push(entry.offset());
            }
            dw::DW_TAG_lexical_block if covers(unit, entry, pc)? => {
                collect(unit, child, pc, depth + 1, found)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// The entry of the same unit that this one is an instance of.
fn origin(entry: &Entry<'_>) -> Option<UnitOffset> {
    match entry.attr_value(dw::DW_AT_abstract_origin)? {
        AttributeValue::UnitRef(offset) => Some(offset),
        _ => None,
    }
}

/// The parameters of the function `declared`, in its order: the instance's own entry where it has one,
/// else that of the declaration, which has no value.
fn in_order<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    declared: UnitOffset,
    instances: Vec<UnitOffset>,
) -> gimli::Result<Vec<UnitOffset>> {
    let mut ordered = Vec::new();
    children(unit, declared, |tag, entry| {
        ordered.extend((tag == dw::DW_TAG_formal_parameter).then_some(entry.offset()));
        Ok(())
    })?;
    let origins = instances.iter().map(|&at| Ok(origin(&unit.entry(at)?)));
    let origins = origins.collect::<gimli::Result<Vec<_>>>()?;
    let instance = |parameter: UnitOffset| {
        let index = origins.iter().position(|origin| *origin == Some(parameter));
        index.map_or(parameter, |index| instances[index])
    };
    let mut ordered: Vec<UnitOffset> = ordered.into_iter().map(instance).collect();
    for at in instances {
        if !ordered.contains(&at) {
            ordered.push(at);
        }
    }
    Ok(ordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(constant: AttributeValue<Reader<'static>>, signed: bool) -> u64 {
        let bytes = constant_bytes(&constant, signed);
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    #[test]
    fn sign_of_a_constant_is_that_of_its_type_unless_its_form_has_one() {
        assert_eq!(word(AttributeValue::Data1(0x80), false), 0x80);
        assert_eq!(word(AttributeValue::Data1(0x80), true), 0xffff_ffff_ffff_ff80);
        assert_eq!(word(AttributeValue::Data4(0xffff_fff0), false), 0xffff_fff0);
        assert_eq!(word(AttributeValue::Sdata(-16), false), 0xffff_ffff_ffff_fff0);
        assert_eq!(word(AttributeValue::Udata(1 << 63), true), 1 << 63);
    }

    #[test]
    fn block_is_taken_as_it_is() {
        let block = gimli::EndianSlice::new(&[1, 2, 3], gimli::LittleEndian);
        assert_eq!(constant_bytes(&AttributeValue::Block(block), true), [1, 2, 3]);
    }
}
