//! Objects of the dead kernel as trees of values, by their types.

use std::cell::Cell;

use crate::VirtAddr;

use super::{MAX_DEPTH, Member, Type, TypeId, Types, bit_field, integer};

/// More values than anything that is looked at has in it. Depth alone is no bound: in damaged types a structure
/// may be a member of itself twice, and double with every level.
const MAX_VALUES: u32 = 1 << 18;

/// How deep the way into a value has become, and how many more may be seen.
#[derive(Clone, Copy)]
pub(super) struct Walk<'w> {
    depth: u32,
    left: &'w Cell<u32>,
}

/// What a walk may see at most.
pub(super) fn budget() -> Cell<u32> {
    Cell::new(MAX_VALUES)
}

impl<'w> Walk<'w> {
    pub(super) fn new(left: &'w Cell<u32>) -> Walk<'w> {
        Walk { depth: 0, left }
    }

    fn down(self) -> Walk<'w> {
        Walk { depth: self.depth + 1, ..self }
    }

    /// Whether another value may be looked at; counts it.
    fn goes_on(self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        self.depth <= MAX_DEPTH && left != 0
    }
}

/// A value, and what it is made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An integer.
    Integer {
        /// The number.
        number: i128,
        /// Size of its type, in bytes.
        size: usize,
    },
    /// An integer of 128 bits, its sign unknown: the contents of a vector register.
    Wide(u128),
    /// A truth value, 0 or 1.
    Boolean(bool),
    /// A constant of an enumeration; without a name when none has this value.
    Constant(Option<String>, i128),
    /// A floating-point number.
    Float(f64),
    /// A pointer to data.
    Pointer(VirtAddr),
    /// A pointer to characters.
    TextPointer(VirtAddr),
    /// A pointer to a function.
    CodePointer(VirtAddr),
    /// An array of characters.
    Text(Vec<u8>),
    /// Members of a structure, with their names (empty for nameless ones) and offsets in bytes.
    Structure(Vec<(String, usize, Value)>),
    /// Elements of an array.
    Array(Vec<Value>),
    /// What cannot be told: why.
    Unknown(&'static str),
}

/// The value of the type `id` in `raw`, at this depth of structures within structures.
pub(super) fn of<T: Types + ?Sized>(types: &T, id: TypeId, raw: &[u8], walk: Walk<'_>) -> Value {
    const CUT: Value = Value::Unknown("not all of it could be read");
    if !walk.goes_on() {
        return Value::Unknown("too deep, or too large");
    }
    let (_, kind) = types.bare(id);
    let scalar = |size: usize, signed| raw.get(..size).and_then(|raw| integer(raw, signed));
    match kind {
        Type::Integer(it) => match scalar(it.size, it.signed) {
            Some(number) if it.boolean && number < 2 => Value::Boolean(number == 1),
            Some(number) if it.size == 16 => Value::Wide(number as u128),
            Some(number) => Value::Integer { number, size: it.size },
            None => CUT,
        },
        Type::Enumeration(it) => scalar(it.size, it.signed).map_or(CUT, |number| {
            let named = it.values.into_iter().find(|(_, value)| i128::from(*value) == number);
            Value::Constant(named.map(|(name, _)| name), number)
        }),
        Type::Float(_, size) => float(raw, size).map_or(CUT, Value::Float),
        Type::Pointer(to) => match scalar(8, false) {
            Some(number) => pointer(types, to, VirtAddr(number as u64)),
            None => CUT,
        },
        Type::Array(element, count) => array(types, element, count, raw, walk),
        Type::Structure(structure) => {
            let member = |member: &Member| {
                (member.name.clone(), member.bits / 8, of_member(types, member, raw, walk))
            };
            Value::Structure(structure.members.iter().map(member).collect())
        }
        Type::Declared(..) => Value::Unknown("its type is not described"),
        _ => Value::Unknown("of no type that has values"),
    }
}

/// The value of a member of the structure in `raw`.
pub(super) fn of_member<T: Types + ?Sized>(
    types: &T,
    member: &Member,
    raw: &[u8],
    walk: Walk<'_>,
) -> Value {
    let rest = raw.get(member.bits / 8..).unwrap_or_default();
    if member.width == 0 {
        return of(types, member.kind, rest, walk.down());
    }
    if !walk.goes_on() {
        return Value::Unknown("too deep, or too large");
    }
    let (_, kind) = types.bare(member.kind);
    let signed = matches!(&kind, Type::Integer(it) if it.signed);
    let number = bit_field(raw, member.bits, member.width, signed);
    match (number, kind) {
        (Some(number), Type::Integer(it)) if it.boolean => Value::Boolean(number == 1),
        (Some(number), Type::Enumeration(it)) => {
            let named = it.values.into_iter().find(|(_, value)| i128::from(*value) == number);
            Value::Constant(named.map(|(name, _)| name), number)
        }
        (Some(number), Type::Integer(it)) => Value::Integer { number, size: it.size },
        _ => Value::Unknown("not all of it could be read"),
    }
}

fn array<T: Types + ?Sized>(
    types: &T,
    element: TypeId,
    count: usize,
    raw: &[u8],
    walk: Walk<'_>,
) -> Value {
    let (_, kind) = types.bare(element);
    if let Type::Integer(it) = &kind
        && it.size == 1
        && it.name == "char"
        && let Some(text) = raw.get(..count)
    {
        return Value::Text(text.to_vec());
    }
    let size = types.size_of(element).unwrap_or(0);
    // Elements beyond the end of what there is are not counted out: a count may be nonsense.
    let there = raw.len().checked_div(size).map_or(0, |there| there.min(count));
    let one =
        |index: usize| of(types, element, raw.get(index * size..).unwrap_or_default(), walk.down());
    let mut elements: Vec<Value> = (0..there).map(one).collect();
    if there < count {
        elements.push(Value::Unknown("the rest could not be read"));
    }
    Value::Array(elements)
}

fn pointer<T: Types + ?Sized>(types: &T, to: TypeId, at: VirtAddr) -> Value {
    match types.bare(to).1 {
        Type::Prototype(_) => Value::CodePointer(at),
        Type::Integer(it) if it.size == 1 && it.name == "char" => Value::TextPointer(at),
        _ => Value::Pointer(at),
    }
}

fn float(raw: &[u8], size: usize) -> Option<f64> {
    match size {
        4 => Some(f32::from_le_bytes(crate::bytes::array(raw, 0)?).into()),
        8 => Some(f64::from_le_bytes(crate::bytes::array(raw, 0)?)),
        _ => None,
    }
}
