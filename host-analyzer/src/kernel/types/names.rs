//! Types written down in C.

use super::{MAX_DEPTH, Prototype, Structure, Type, TypeId, Types};

/// Declarators grow from the name outwards: what points, counts or takes arguments stands around
/// what has been written so far.
pub(super) fn declare<T: Types + ?Sized>(
    types: &T,
    id: TypeId,
    so_far: String,
    depth: u32,
) -> String {
    if depth > MAX_DEPTH {
        return format!("(endless type) {so_far}");
    }
    let next = |id, so_far| declare(types, id, so_far, depth + 1);
    match types.get(id) {
        Type::Pointer(to) => {
            let binds_less = matches!(tagless(types, to), Type::Array(..) | Type::Prototype(_));
            next(to, if binds_less { format!("(*{so_far})") } else { format!("*{so_far}") })
        }
        Type::Array(element, count) => next(element, format!("{so_far}[{count}]")),
        Type::Prototype(prototype) => {
            let parameters = parameters(types, &prototype, depth);
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

fn parameters<T: Types + ?Sized>(types: &T, prototype: &Prototype, depth: u32) -> String {
    if prototype.parameters.is_empty() {
        return "void".to_owned();
    }
    let one = |(name, id): &(String, TypeId)| match id.0 {
        0 => "...".to_owned(),
        _ => declare(types, *id, name.clone(), depth + 1),
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
