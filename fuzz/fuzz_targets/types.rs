//! BTF: indexed, looked up, written down in C, and with values; and that of a module on top of it.

#![no_main]

use host_analyzer::kernel::btf::Btf;
use host_analyzer::kernel::types::{TypeId, Types};
use libfuzzer_sys::fuzz_target;

/// The texts of names: a type's name is commonly one of them.
const TEXTS: &[u8] = b"\0int\0task_struct\0comm\0next\0.data..percpu\0orc_entry\0end\0";

/// A blob whose types are `types`.
fn blob(types: &[u8], texts: &[u8]) -> Vec<u8> {
    let (types_size, texts_size) = (types.len() as u32, texts.len() as u32);
    let mut blob = vec![0x9f, 0xeb, 1, 0];
    let header = [24, 0, types_size, types_size, texts_size];
    blob.extend(header.iter().flat_map(|word| word.to_le_bytes()));
    blob.extend_from_slice(types);
    blob.extend_from_slice(texts);
    blob
}

fn look_at(types: &Btf<'_>, raw: &[u8]) {
    let count = types.len().min(64) as u32;
    for id in (0..=count + 1).map(TypeId) {
        let _ = (
            types.size_of(id),
            types.declare(id, "name").len(),
            types.bare(id),
            types.array_of(id),
        );
        // Damaged ones are as large as a walk may be: a few suffice.
        if id.0 < 4 || id.0 == count {
            let _ = types.value(id, &raw[..raw.len().min(256)]);
        }
        if let Some(field) = types.member_of(id, "next.next") {
            let _ = types.member_at(&field, raw);
        }
    }
    let _ = (types.member("task_struct", "comm"), types.structure("orc_entry"));
    let _ = (types.named("int", |_| true), types.variables(".data..percpu"));
    let _ = types.type_names().count();
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    if kind & 1 == 0 {
        let _ = Btf::parse(bytes.into()).map(|types| look_at(&types, bytes));
        return;
    }
    let at = bytes.len().min(usize::from(kind >> 1) * 4);
    let (base, split) = bytes.split_at(at);
    let Ok(types) = Btf::parse(blob(base, TEXTS).into()) else { return };
    look_at(&types, bytes);
    if let Ok(both) = types.with_more(&blob(split, b"more\0")) {
        look_at(&both, bytes);
    }
});
