//! The symbol table: named by VMCOREINFO, found by its shape, or handed over as it is.

#![no_main]

use host_analyzer::VirtAddr;
use host_analyzer::kernel::kallsyms::{Encoding, Kallsyms, Tables};
use host_analyzer::kernel::sparse::Sparse;
use host_analyzer::kernel::symbols::{self, Symbols};
use host_analyzer::kernel::vmcoreinfo::Vmcoreinfo;
use libfuzzer_sys::fuzz_target;
use tinykdump_fuzz::{VIRT, World};

/// Tokens that stand for themselves, one character each.
fn tokens() -> (Vec<u8>, Vec<u8>) {
    let texts = (0..=255u8).flat_map(|byte| [byte.max(b' '), 0]).collect();
    let places = (0..256u16).flat_map(|index| (index * 2).to_le_bytes()).collect();
    (texts, places)
}

fn look_at(table: &Kallsyms<'_>, address: u64) {
    for index in [0, 1, table.len() / 2, table.len()] {
        let _ = (table.address(index), table.name(index));
    }
    let _ = (Kallsyms::covering(table, VirtAddr(address)), Kallsyms::is_whole(table));
    let _ = (Kallsyms::find(table, &["ab", "init_task"]), Symbols::last(table));
    let mut seen = 0;
    Kallsyms::each(table, &mut |_, name, _| seen += name.len());
}

fuzz_target!(|bytes: &[u8]| {
    let [kind, count, names, word, rest @ ..] = bytes else { return };
    let base = VIRT + u64::from(*word) * 0x1111;
    let (texts, places) = tokens();
    if kind & 1 == 0 {
        let (names, addresses) = rest.split_at(rest.len().min(usize::from(*names)));
        let encoding = match kind >> 1 & 3 {
            0 => Encoding::Absolute,
            1 => Encoding::BaseRelative(base),
            2 => Encoding::AbsolutePercpu(base),
            _ => Encoding::PlaceRelative(VirtAddr(base)),
        };
        let (token_table, token_index) = match kind >> 3 & 1 {
            0 => (texts, places),
            _ => (rest.to_vec(), [rest, &places].concat()),
        };
        let table = Kallsyms::new(Tables {
            addresses: Sparse::whole(addresses),
            encoding,
            names: Sparse::whole(names),
            count: usize::from(*count),
            token_table: token_table.into(),
            token_index: token_index.into(),
        });
        table.iter().for_each(|table| look_at(table, base));
        return;
    }
    // In memory: addresses, base, number, names, markers, tokens, as the linker puts them.
    let mut world = World::default();
    world.put(0x4000, &texts);
    world.put(0x4200, &places);
    world.put_u64(0x1ff8, u64::from(*count));
    world.patch(0x1000, rest);
    let text = "SYMBOL(_stext)=ffff888000001000\nSYMBOL(kallsyms_names)=ffff888000002000\n\
        SYMBOL(kallsyms_num_syms)=ffff888000001ff8\nSYMBOL(kallsyms_token_table)=ffff888000004000\n\
        SYMBOL(kallsyms_token_index)=ffff888000004200\nSYMBOL(kallsyms_offsets)=ffff888000001000\n\
        SYMBOL(kallsyms_relative_base)=ffff888000001ff0\n";
    let text = if kind & 2 == 0 { text } else { "SYMBOL(_stext)=ffff888000001000\n" };
    let info = Vmcoreinfo::new(text.as_bytes());
    let memory = world.memory();
    if let Ok(table) = symbols::from_dump(&memory, &info) {
        look_at(&table, base);
    }
});
