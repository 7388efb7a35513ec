//! Types and values of the dead kernel, wherever they are described: in BTF or in debug information.

mod names;
mod value;

use crate::kernel::btf::Field;

pub use value::Value;

/// Bound for chains of typedefs and for structures within structures.
const MAX_DEPTH: u32 = 32;

/// A type's number: in BTF that of its record, in debug information the offset of its entry. 0 is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TypeId(pub u32);

/// A description of types.
pub trait Types {
    /// What the type `id` is; [`Type::Void`] for what cannot be read.
    fn get(&self, id: TypeId) -> Type;

    /// Size of a type in bytes; 8 for pointers.
    fn size_of(&self, id: TypeId) -> Option<usize>;

    /// The type behind typedefs and qualifiers, and its number.
    fn bare(&self, mut id: TypeId) -> (TypeId, Type) {
        for _ in 0..MAX_DEPTH {
            match self.get(id) {
                Type::Typedef(_, next) | Type::Qualified(_, next) | Type::Tagged(next) => id = next,
                other => return (id, other),
            }
        }
        (id, Type::Void)
    }

    /// A declaration of `name` with the type `id`: `char *argv[4]`, `int (*handler)(int)`. Without a
    /// name, the type alone.
    fn declare(&self, id: TypeId, name: &str) -> String {
        names::declare(self, id, name.to_owned())
    }

    /// The name of a type.
    fn type_name(&self, id: TypeId) -> String {
        self.declare(id, "")
    }

    /// The value of the type `id` that is in `raw`. What lies beyond the end of `raw`, or is of a type
    /// that cannot be read, is [`Value::Unknown`].
    fn value(&self, id: TypeId, raw: &[u8]) -> Value {
        value::of(self, id, raw, value::Walk::new(&value::budget()))
    }

    /// The value of a member of the structure in `raw`.
    fn member_at(&self, field: &Field, raw: &[u8]) -> Value {
        let bits = field.offset * 8 + field.bit as usize;
        let member = Member { name: String::new(), kind: field.kind, bits, width: field.width };
        value::of_member(self, &member, raw, value::Walk::new(&value::budget()))
    }
}

/// What a type is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// No type at all, or one that cannot be read.
    Void,
    /// An integer, a character or a truth value.
    Integer(Integer),
    /// A floating-point number of this many bytes.
    Float(String, usize),
    /// A pointer.
    Pointer(TypeId),
    /// Elements of one type, and how many.
    Array(TypeId, usize),
    /// A structure or a union.
    Structure(Structure),
    /// Named constants.
    Enumeration(Enumeration),
    /// A structure or union (the flag) that is declared and not described.
    Declared(String, bool),
    /// Another name for a type.
    Typedef(String, TypeId),
    /// `const`, `volatile` or `restrict`.
    Qualified(&'static str, TypeId),
    /// What a function takes and returns.
    Prototype(Prototype),
    /// A function (its name), and its prototype.
    Function(String, TypeId),
    /// A variable, and its type.
    Variable(String, TypeId),
    /// A type with a remark that does not change it.
    Tagged(TypeId),
}

/// An integer type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Integer {
    /// Its name in C.
    pub name: String,
    /// Size in bytes.
    pub size: usize,
    /// Whether it has a sign.
    pub signed: bool,
    /// Whether it is a truth value.
    pub boolean: bool,
}

/// A structure or a union.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structure {
    /// Its name; empty when it has none.
    pub name: String,
    /// Whether it is a union.
    pub union: bool,
    /// Size in bytes.
    pub size: usize,
    /// Its members in their order.
    pub members: Vec<Member>,
}

/// A member of a structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name; empty when it has none.
    pub name: String,
    /// Its type.
    pub kind: TypeId,
    /// Offset from the structure's start, in bits.
    pub bits: usize,
    /// Width of a bit field in bits; 0 for others.
    pub width: u32,
}

/// An enumeration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enumeration {
    /// Its name; empty when it has none.
    pub name: String,
    /// Size in bytes.
    pub size: usize,
    /// Whether a value may be negative.
    pub signed: bool,
    /// Names and values.
    pub values: Vec<(String, i64)>,
}

/// A function's type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prototype {
    /// What it returns.
    pub returns: TypeId,
    /// Its parameters: names (empty where there are none) and types. Type 0 without a name at the end
    /// stands for `...`.
    pub parameters: Vec<(String, TypeId)>,
}

impl Type {
    /// The structure that it is, if it is one.
    #[must_use]
    pub fn structure(self) -> Option<Structure> {
        match self {
            Type::Structure(structure) => Some(structure),
            _ => None,
        }
    }
}

/// The integer in `raw`, which has 1, 2, 4, 8 or 16 bytes.
#[must_use]
pub fn integer(raw: &[u8], signed: bool) -> Option<i128> {
    let negative = signed && raw.last()? & 0x80 != 0;
    let mut wide = [if negative { 0xff } else { 0 }; 16];
    wide.get_mut(..raw.len()).filter(|wide| !wide.is_empty())?.copy_from_slice(raw);
    Some(i128::from_le_bytes(wide))
}

/// The bit field of `width` bits that begins at bit `first` of `raw`.
#[must_use]
pub fn bit_field(raw: &[u8], first: usize, width: u32, signed: bool) -> Option<i128> {
    let inside = first.checked_add(width as usize)? <= raw.len() * 8;
    let unused = 128u32.checked_sub(width).filter(|unused| inside && *unused < 128)?;
    let mut wide = [0; 16];
    for (to, from) in wide.iter_mut().zip(raw.get(first / 8..)?) {
        *to = *from;
    }
    let moved = u128::from_le_bytes(wide) >> (first % 8) << unused;
    Some(if signed { moved as i128 >> unused } else { (moved >> unused) as i128 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_have_the_sign_that_their_type_says() {
        assert_eq!(integer(&[0xff, 0xff], true), Some(-1));
        assert_eq!(integer(&[0xff, 0xff], false), Some(65535));
        assert_eq!(integer(&[0; 17], false), None);
        assert_eq!(integer(&[], false), None);
    }

    #[test]
    fn bit_fields_are_cut_out_across_bytes() {
        // Bits 6 to 9 of 0x0340 are 1101.
        assert_eq!(bit_field(&[0x40, 0x03], 6, 4, false), Some(13));
        assert_eq!(bit_field(&[0x40, 0x03], 6, 4, true), Some(-3));
        assert_eq!(bit_field(&[0x40], 9, 1, false), None);
        assert_eq!(bit_field(&[0x40], 0, 0, false), None);
    }
}
