//! Types taken out of their records.

use crate::bytes::u32_at;

use crate::kernel::types::{
    Enumeration, Integer, Member, Prototype, Structure, Type, TypeId, Types,
};

use super::{Btf, MEMBER, RECORD, Record, kind};

/// Bits of the word behind an integer's record (include/uapi/linux/btf.h, 6.12).
const INTEGER_SIGNED: u32 = 1 << 24;
const INTEGER_BOOL: u32 = 1 << 26;

impl Types for Btf<'_> {
    fn get(&self, id: TypeId) -> Type {
        self.record(id).and_then(|record| self.decode(record)).unwrap_or(Type::Void)
    }

    fn size_of(&self, id: TypeId) -> Option<usize> {
        self.size_at_depth(id, 0)
    }
}

impl Btf<'_> {
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
