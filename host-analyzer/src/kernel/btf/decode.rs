//! Types taken apart: what each is made of, for those who print types and values.

use crate::bytes::u32_at;

use super::{Btf, MEMBER, RECORD, Record, TypeId, kind};

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

/// Bits of the word behind an integer's record (include/uapi/linux/btf.h, 6.12).
const INTEGER_SIGNED: u32 = 1 << 24;
const INTEGER_BOOL: u32 = 1 << 26;

impl Btf<'_> {
    /// What the type `id` is; [`Type::Void`] for what cannot be read.
    #[must_use]
    pub fn get(&self, id: TypeId) -> Type {
        self.record(id).and_then(|record| self.decode(record)).unwrap_or(Type::Void)
    }

    /// The type behind typedefs and qualifiers, and its number.
    #[must_use]
    pub fn bare(&self, mut id: TypeId) -> (TypeId, Type) {
        for _ in 0..super::MAX_DEPTH {
            match self.get(id) {
                Type::Typedef(_, next) | Type::Qualified(_, next) | Type::Tagged(next) => id = next,
                other => return (id, other),
            }
        }
        (id, Type::Void)
    }

    /// The types that `name` names, of the kinds that `wanted` accepts; those that are described come
    /// before those that are only declared.
    #[must_use]
    pub fn named(&self, name: &str, wanted: impl Fn(&Type) -> bool) -> Vec<TypeId> {
        let Some(at) = self.text_offset(name) else { return Vec::new() };
        let ids = (0..self.starts.len() as u32).map(|index| TypeId(index + 1));
        let called = |id: &TypeId| self.record(*id).is_some_and(|record| record.name == at);
        let mut found: Vec<TypeId> =
            ids.filter(called).filter(|id| wanted(&self.get(*id))).collect();
        found.sort_by_key(|id| matches!(self.get(*id), Type::Declared(..)));
        found
    }

    /// Names of structures, unions, enumerations and typedefs.
    pub fn type_names(&self) -> impl Iterator<Item = String> + '_ {
        let records = self.starts.iter().filter_map(|&at| self.record_at(at as usize));
        let names = records.filter(|record| {
            matches!(
                record.kind,
                kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 | kind::TYPEDEF
            )
        });
        names.map(|record| self.name(record.name)).filter(|name| !name.is_empty())
    }

    fn decode(&self, record: Record) -> Option<Type> {
        let name = || self.name(record.name);
        let size = record.size_or_type as usize;
        let other = TypeId(record.size_or_type);
        Some(match record.kind {
            kind::INT => self.integer(record)?,
            kind::FLOAT => Type::Float(name(), size),
            kind::PTR => Type::Pointer(other),
            kind::ARRAY => {
                self.array(record).map(|(element, count)| Type::Array(element, count))?
            }
            kind::STRUCT | kind::UNION => Type::Structure(self.members(record)?),
            kind::ENUM | kind::ENUM64 => Type::Enumeration(self.values(record)?),
            kind::FWD => Type::Declared(name(), record.flag),
            kind::TYPEDEF => Type::Typedef(name(), other),
            kind::CONST => Type::Qualified("const", other),
            kind::VOLATILE => Type::Qualified("volatile", other),
            kind::RESTRICT => Type::Qualified("restrict", other),
            kind::TYPE_TAG => Type::Tagged(other),
            kind::FUNC => Type::Function(name(), other),
            kind::VAR => Type::Variable(name(), other),
            kind::FUNC_PROTO => Type::Prototype(self.prototype(record)?),
            _ => return None,
        })
    }

    fn integer(&self, record: Record) -> Option<Type> {
        let encoding = u32_at(self.types_bytes()?, record.at + RECORD)?;
        Some(Type::Integer(Integer {
            name: self.name(record.name),
            size: record.size_or_type as usize,
            signed: encoding & INTEGER_SIGNED != 0,
            boolean: encoding & INTEGER_BOOL != 0,
        }))
    }

    fn members(&self, record: Record) -> Option<Structure> {
        let types = self.types_bytes()?;
        let member = |index: usize| {
            let at = record.at + RECORD + index * MEMBER;
            let place = u32_at(types, at + 8)?;
            // With the flag set, the upper byte is the width of a bit field.
            let (bits, width) =
                if record.flag { (place & 0x00ff_ffff, place >> 24) } else { (place, 0) };
            let kind = TypeId(u32_at(types, at + 4)?);
            Some(Member { name: self.name(u32_at(types, at)?), kind, bits: bits as usize, width })
        };
        Some(Structure {
            name: self.name(record.name),
            union: record.kind == kind::UNION,
            size: record.size_or_type as usize,
            members: (0..record.length).map(member).collect::<Option<_>>()?,
        })
    }

    fn values(&self, record: Record) -> Option<Enumeration> {
        let types = self.types_bytes()?;
        let wide = record.kind == kind::ENUM64;
        let value = |index: usize| {
            let at = record.at + RECORD + index * if wide { 12 } else { 8 };
            let low = u32_at(types, at + 4)?;
            let value = match (wide, record.flag) {
                (true, _) => (u64::from(u32_at(types, at + 8)?) << 32 | u64::from(low)) as i64,
                (false, true) => i64::from(low as i32),
                // Before 6.0 nothing says that an enumeration has a sign.
                (false, false) => i64::from(low),
            };
            Some((self.name(u32_at(types, at)?), value))
        };
        Some(Enumeration {
            name: self.name(record.name),
            size: record.size_or_type as usize,
            signed: record.flag,
            values: (0..record.length).map(value).collect::<Option<_>>()?,
        })
    }

    fn prototype(&self, record: Record) -> Option<Prototype> {
        let types = self.types_bytes()?;
        let parameter = |index: usize| {
            let at = record.at + RECORD + index * 8;
            Some((self.name(u32_at(types, at)?), TypeId(u32_at(types, at + 4)?)))
        };
        let parameters = (0..record.length).map(parameter).collect::<Option<_>>()?;
        Some(Prototype { returns: TypeId(record.size_or_type), parameters })
    }

    fn types_bytes(&self) -> Option<&[u8]> {
        self.data.get(self.types.clone())
    }

    fn name(&self, offset: u32) -> String {
        self.text(offset).map(|text| String::from_utf8_lossy(text).into_owned()).unwrap_or_default()
    }
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
