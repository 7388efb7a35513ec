//! Types as debug information describes them (DWARF 5, chapter 5). A type's number is the offset of its
//! entry in .debug_info.

use gimli::{
    Attribute, AttributeValue, DebuggingInformationEntry, DwTag, UnitOffset, UnitRef,
    constants as dw,
};

use crate::kernel::types::{
    Enumeration, Integer, Member, Prototype, Structure, Type, TypeId, Types,
};

use super::{DebugInfo, MAX_DEPTH, Reader};

type Entry<'a> = DebuggingInformationEntry<Reader<'a>>;

impl Types for DebugInfo<'_> {
    fn get(&self, id: TypeId) -> Type {
        self.decoded(id).ok().flatten().unwrap_or(Type::Void)
    }

    fn size_of(&self, id: TypeId) -> Option<usize> {
        self.size_at_depth(id, 0)
    }
}

impl<'a> DebugInfo<'a> {
    fn size_at_depth(&self, id: TypeId, depth: usize) -> Option<usize> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.get(id) {
            Type::Integer(it) => Some(it.size),
            Type::Float(_, size) => Some(size),
            Type::Enumeration(it) => Some(it.size),
            Type::Structure(it) => Some(it.size),
            Type::Pointer(_) => Some(8),
            Type::Array(element, count) => {
                self.size_at_depth(element, depth + 1)?.checked_mul(count)
            }
            Type::Typedef(_, inner) | Type::Qualified(_, inner) | Type::Tagged(inner) => {
                self.size_at_depth(inner, depth + 1)
            }
            _ => None,
        }
    }

    fn decoded(&self, id: TypeId) -> gimli::Result<Option<Type>> {
        let offset = id.0 as usize;
        let Some(unit) = self.units.with_entry(offset)? else { return Ok(None) };
        let Some(offset) = gimli::DebugInfoOffset(offset).to_unit_offset(&unit.header) else {
            return Ok(None);
        };
        let unit = unit.unit_ref(&self.units.dwarf);
        let entry = unit.entry(offset)?;
        let name = || own_name(unit, &entry);
        let inner = || type_of(unit, &entry);
        Ok(Some(match entry.tag() {
            dw::DW_TAG_base_type => base(name()?, &entry),
            dw::DW_TAG_pointer_type => Type::Pointer(inner()),
            dw::DW_TAG_const_type => Type::Qualified("const", inner()),
            dw::DW_TAG_volatile_type => Type::Qualified("volatile", inner()),
            dw::DW_TAG_restrict_type => Type::Qualified("restrict", inner()),
            dw::DW_TAG_atomic_type => Type::Qualified("_Atomic", inner()),
            dw::DW_TAG_typedef => Type::Typedef(name()?, inner()),
            dw::DW_TAG_array_type => Type::Array(inner(), elements(unit, offset)?),
            tag @ (dw::DW_TAG_structure_type | dw::DW_TAG_union_type) => {
                let union = tag == dw::DW_TAG_union_type;
                match entry.attr(dw::DW_AT_declaration) {
                    Some(_) => Type::Declared(name()?, union),
                    None => Type::Structure(structure(unit, &entry, name()?, union)?),
                }
            }
            dw::DW_TAG_enumeration_type => Type::Enumeration(enumeration(unit, &entry, name()?)?),
            dw::DW_TAG_subroutine_type => Type::Prototype(prototype(unit, &entry)?),
            _ => return Ok(None),
        }))
    }
}

/// The type that an entry refers to; 0, void, when it refers to none.
pub(super) fn type_of<'a>(unit: UnitRef<'_, Reader<'a>>, entry: &Entry<'a>) -> TypeId {
    let offset = match entry.attr_value(dw::DW_AT_type) {
        Some(AttributeValue::UnitRef(offset)) => {
            offset.to_debug_info_offset(&unit.header).map(|it| it.0)
        }
        Some(AttributeValue::DebugInfoRef(offset)) => Some(offset.0),
        _ => None,
    };
    TypeId(offset.and_then(|offset| u32::try_from(offset).ok()).unwrap_or(0))
}

/// The name that stands in an entry itself; empty when there is none.
pub(super) fn own_name<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    entry: &Entry<'a>,
) -> gimli::Result<String> {
    let Some(name) = entry.attr_value(dw::DW_AT_name) else { return Ok(String::new()) };
    Ok(unit.attr_string(name)?.to_string_lossy().into_owned())
}

fn number(entry: &Entry<'_>, name: gimli::DwAt) -> Option<u64> {
    entry.attr(name).and_then(Attribute::udata_value)
}

fn size(entry: &Entry<'_>) -> usize {
    number(entry, dw::DW_AT_byte_size).and_then(|it| usize::try_from(it).ok()).unwrap_or(0)
}

fn base(name: String, entry: &Entry<'_>) -> Type {
    let size = size(entry);
    let encoding = match entry.attr_value(dw::DW_AT_encoding) {
        Some(AttributeValue::Encoding(encoding)) => encoding,
        _ => dw::DW_ATE_unsigned,
    };
    match encoding {
        dw::DW_ATE_float => Type::Float(name, size),
        _ => Type::Integer(Integer {
            name,
            size,
            signed: matches!(encoding, dw::DW_ATE_signed | dw::DW_ATE_signed_char),
            boolean: encoding == dw::DW_ATE_boolean,
        }),
    }
}

/// Calls `with` with every entry directly below another one.
pub(super) fn children<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    offset: UnitOffset,
    mut with: impl FnMut(DwTag, &Entry<'a>) -> gimli::Result<()>,
) -> gimli::Result<()> {
    let mut tree = unit.entries_tree(Some(offset))?;
    let mut children = tree.root()?.children();
    while let Some(child) = children.next()? {
        with(child.entry().tag(), child.entry())?;
    }
    Ok(())
}

/// Number of elements of an array, over all its dimensions: the product.
fn elements<'a>(unit: UnitRef<'_, Reader<'a>>, offset: UnitOffset) -> gimli::Result<usize> {
    let mut product = 1usize;
    children(unit, offset, |tag, entry| {
        if tag == dw::DW_TAG_subrange_type {
            let last = number(entry, dw::DW_AT_upper_bound).map(|last| last.wrapping_add(1));
            // Without either, an array of unknown size at the end of a structure.
            let count = number(entry, dw::DW_AT_count).or(last).unwrap_or(0);
            product = product.saturating_mul(usize::try_from(count).unwrap_or(usize::MAX));
        }
        Ok(())
    })?;
    Ok(product)
}

fn structure<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    entry: &Entry<'a>,
    name: String,
    union: bool,
) -> gimli::Result<Structure> {
    let mut members = Vec::new();
    children(unit, entry.offset(), |tag, entry| {
        if tag == dw::DW_TAG_member {
            let kind = type_of(unit, entry);
            let (bits, width) = place(entry);
            members.push(Member { name: own_name(unit, entry)?, kind, bits, width });
        }
        Ok(())
    })?;
    Ok(Structure { name, union, size: size(entry), members })
}

/// Offset of a member in bits, and the width of a bit field. Before DWARF 4 (2.2 of its list of changes)
/// bit fields were counted from the most significant bit of their storage unit.
fn place(entry: &Entry<'_>) -> (usize, u32) {
    let attribute = |name| number(entry, name).unwrap_or(0);
    let start = attribute(dw::DW_AT_data_member_location).saturating_mul(8);
    let width = attribute(dw::DW_AT_bit_size);
    let bits = match (number(entry, dw::DW_AT_data_bit_offset), number(entry, dw::DW_AT_bit_offset))
    {
        (Some(bits), _) => bits,
        (None, Some(from_top)) => {
            let unit = attribute(dw::DW_AT_byte_size).saturating_mul(8);
            start.wrapping_add(unit).wrapping_sub(from_top).wrapping_sub(width)
        }
        (None, None) => start,
    };
    (usize::try_from(bits).unwrap_or(usize::MAX / 16), u32::try_from(width).unwrap_or(0))
}

fn enumeration<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    entry: &Entry<'a>,
    name: String,
) -> gimli::Result<Enumeration> {
    let mut values = Vec::new();
    let signed = matches!(
        entry.attr_value(dw::DW_AT_encoding),
        Some(AttributeValue::Encoding(dw::DW_ATE_signed))
    );
    children(unit, entry.offset(), |tag, entry| {
        if tag == dw::DW_TAG_enumerator {
            let value = entry.attr(dw::DW_AT_const_value);
            let value = value.and_then(|it| match it.value() {
                AttributeValue::Sdata(value) => Some(value),
                _ => it.udata_value().map(|value| value as i64),
            });
            values.push((own_name(unit, entry)?, value.unwrap_or(0)));
        }
        Ok(())
    })?;
    let signed = signed || values.iter().any(|&(_, value)| value < 0);
    Ok(Enumeration { name, size: size(entry), signed, values })
}

fn prototype<'a>(unit: UnitRef<'_, Reader<'a>>, entry: &Entry<'a>) -> gimli::Result<Prototype> {
    let mut parameters = Vec::new();
    children(unit, entry.offset(), |tag, entry| {
        match tag {
            dw::DW_TAG_formal_parameter => {
                parameters.push((own_name(unit, entry)?, type_of(unit, entry)));
            }
            dw::DW_TAG_unspecified_parameters => parameters.push((String::new(), TypeId(0))),
            _ => {}
        }
        Ok(())
    })?;
    Ok(Prototype { returns: type_of(unit, entry), parameters })
}
