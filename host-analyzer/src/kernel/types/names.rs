//! Types written down in C.

use std::cell::Cell;

use super::{MAX_DEPTH, Prototype, Structure, Type, TypeId, Types};

/// More types than any declaration has in it. Depth alone is no bound: prototypes that have themselves twice
/// as a parameter double with every level.
const MAX_TYPES: u32 = 4096;

/// How deep a declaration has become, and how many more types it may have.
#[derive(Clone, Copy)]
struct Walk<'w> {
    depth: u32,
    left: &'w Cell<u32>,
}

/// A declaration of `name`, so far, with the type `id`.
pub(super) fn declare<T: Types + ?Sized>(types: &T, id: TypeId, name: String) -> String {
    declared(types, id, name, Walk { depth: 0, left: &Cell::new(MAX_TYPES) })
}

/// Declarators grow from the name outwards: what points, counts or takes arguments stands around
/// what has been written so far.
fn declared<T: Types + ?Sized>(types: &T, id: TypeId, so_far: String, walk: Walk<'_>) -> String {
    if walk.depth > MAX_DEPTH || walk.left.get() == 0 {
        return format!("(endless type) {so_far}");
    }
    walk.left.set(walk.left.get() - 1);
    let walk = Walk { depth: walk.depth + 1, ..walk };
    let next = |id, so_far| declared(types, id, so_far, walk);
    match types.get(id) {
        Type::Pointer(to) => {
            let binds_less = matches!(tagless(types, to), Type::Array(..) | Type::Prototype(_));
            next(to, if binds_less { format!("(*{so_far})") } else { format!("*{so_far}") })
        }
        Type::Array(element, count) => next(element, format!("{so_far}[{count}]")),
        Type::Prototype(prototype) => {
            let parameters = parameters(types, &prototype, walk);
            next(prototype.returns, format!("{so_far}({parameters})"))
        }
        Type::Tagged(inner) => next(inner, so_far),
        Type::Qualified(word, inner) => match tagless(types, inner) {
            // What qualifies a pointer stands behind its star.
            Type::Pointer(_) => next(inner, join(word, &so_far)),
            _ => format!("{word} {}", next(inner, so_far)),
        },
        named => join(&name_of(&named), &so_far),
    }
}

fn parameters<T: Types + ?Sized>(types: &T, prototype: &Prototype, walk: Walk<'_>) -> String {
    if prototype.parameters.is_empty() {
        return "void".to_owned();
    }
    let one = |(name, id): &(String, TypeId)| match id.0 {
        0 => "...".to_owned(),
        _ => declared(types, *id, name.clone(), walk),
    };
    prototype.parameters.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The type behind the remarks that do not change it.
fn tagless<T: Types + ?Sized>(types: &T, mut id: TypeId) -> Type {
    for _ in 0..MAX_DEPTH {
        match types.get(id) {
            Type::Tagged(inner) => id = inner,
            other => return other,
        }
    }
    Type::Void
}

fn join(word: &str, rest: &str) -> String {
    if rest.is_empty() { word.to_owned() } else { format!("{word} {rest}") }
}

fn name_of(named: &Type) -> String {
    let anonymous = |name: &str| if name.is_empty() { "{...}".to_owned() } else { name.to_owned() };
    match named {
        Type::Integer(integer) => integer.name.clone(),
        Type::Float(name, _)
        | Type::Typedef(name, _)
        | Type::Function(name, _)
        | Type::Variable(name, _) => name.clone(),
        Type::Structure(Structure { name, union, .. }) => {
            format!("{} {}", if *union { "union" } else { "struct" }, anonymous(name))
        }
        Type::Declared(name, union) => {
            format!("{} {name}", if *union { "union" } else { "struct" })
        }
        Type::Enumeration(enumeration) => format!("enum {}", anonymous(&enumeration.name)),
        _ => "void".to_owned(),
    }
}
