//! Symbol tables in every encoding.

use std::format;
use std::string::String;
use std::vec::Vec;

use super::super::testing::{BASE, World, at};
use super::*;

fn world(symbols: &[(u64, &str)]) -> World {
    let mut world = World::x86_64();
    world.put_symbols(symbols);
    world
}

const FEW: [(u64, &str); 5] = [
    (0x10_0000, "T_stext"),
    (0x10_0010, "tread"),
    (0x10_0010, "Tvfs_read"),
    (0x10_0040, "twrite"),
    (0x10_0080, "D_edata"),
];

fn with<T>(world: &World, check: impl FnOnce(&Kallsyms, &mut KernelMemory<'_>) -> T) -> T {
    world.memory(|memory, old| {
        let table = Kallsyms::find(memory, &old.vmcoreinfo).expect("a symbol table");
        check(&table, memory)
    })
}

fn shown(world: &World, at: u64) -> Option<String> {
    with(world, |table, memory| {
        let symbol = table.covering(memory, BASE + at)?;
        let name = core::str::from_utf8(&symbol.name).unwrap();
        Some(format!("{name}+{:#x}/{:#x}", BASE + at - symbol.start, symbol.size))
    })
}

fn found(world: &World, name: &str) -> Option<u64> {
    with(world, |table, memory| table.find_all(memory, &[name])[0].map(|at| at - BASE))
}

#[test]
fn first_of_several_symbols_at_an_address_names_it() {
    let world = world(&FEW);
    assert_eq!(shown(&world, 0x10_003f).as_deref(), Some("read+0x2f/0x30"));
    assert_eq!(shown(&world, 0x10_0040).as_deref(), Some("write+0x0/0x40"));
    assert_eq!(shown(&world, 0x0f_ffff), None);
}

#[test]
fn names_are_found_whole_or_not_at_all() {
    let world = world(&FEW);
    assert_eq!(found(&world, "vfs_read"), Some(0x10_0010));
    assert_eq!(found(&world, "vfs_rea"), None);
    assert_eq!(found(&world, "vfs_read_"), None);
}

#[test]
fn every_encoding_yields_the_same_addresses() {
    let check = |world: &World| assert_eq!(found(world, "write"), Some(0x10_0040));
    check(&world(&FEW));

    let mut percpu = world(&FEW);
    for (index, (offset, _)) in (0..).zip(FEW) {
        percpu.put_u32(at::OFFSETS + index * 4, (-1 - offset as i32) as u32);
    }
    check(&percpu);

    let mut place = world(&FEW);
    for (index, (offset, _)) in (0..).zip(FEW) {
        let here = at::OFFSETS + index * 4;
        place.put_u32(here, (offset as i32 - here as i32) as u32);
    }
    place.info = place.info.replace("SYMBOL(kallsyms_relative_base)", "x");
    check(&place);

    let mut absolute = world(&FEW);
    for (index, (offset, _)) in (0..).zip(FEW) {
        absolute.put_u64(at::OFFSETS + index * 8, BASE + offset);
    }
    absolute.info = absolute.info.replace("kallsyms_offsets", "kallsyms_addresses");
    check(&absolute);
}

/// A thousand symbols, markers before the tokens, and the order of the names behind the addresses.
fn large() -> World {
    let names: Vec<String> = (0..1000)
        .map(|index| if index == 0 { "T_stext".into() } else { format!("tf{index:03}") })
        .collect();
    let symbols: Vec<_> =
        (0..).zip(&names).map(|(index, name)| (0x10_0000 + index * 16, name.as_str())).collect();
    let mut world = world(&symbols);
    let (mut offset, mut markers) = (0u32, Vec::new());
    for (index, name) in names.iter().enumerate() {
        if index % 256 == 0 {
            markers.extend_from_slice(&offset.to_le_bytes());
        }
        offset += 1 + name.len() as u32;
    }
    world.put(at::TOKENS - 16, &markers);
    let mut order: Vec<u32> = (0..1000).collect();
    order.sort_by_key(|&index| &names[index as usize][1..]);
    let order: Vec<u8> = order.iter().flat_map(|index| index.to_be_bytes()[1..].to_vec()).collect();
    world.put(at::OFFSETS + 4000, &order);
    world
}

#[test]
fn order_of_the_names_is_found_and_used() {
    let world = large();
    assert!(with(&world, |table, _| table.markers.is_some() && table.order.is_some()));
    assert_eq!(found(&world, "f999"), Some(0x10_0000 + 999 * 16));
    assert_eq!(found(&world, "f1000"), None);
    assert_eq!(shown(&world, 0x10_0000 + 700 * 16 + 5).as_deref(), Some("f700+0x5/0x10"));
}

#[test]
fn without_markers_and_order_names_are_found_all_the_same() {
    let mut world = large();
    world.put(at::TOKENS - 16, &[0xff; 16]);
    world.put(at::OFFSETS + 4000, &[0; 3000]);
    assert!(with(&world, |table, _| table.markers.is_none() && table.order.is_none()));
    assert_eq!(found(&world, "f999"), Some(0x10_0000 + 999 * 16));
    assert_eq!(shown(&world, 0x10_0000 + 700 * 16).as_deref(), Some("f700+0x0/0x10"));
}

#[test]
fn names_with_two_length_bytes_are_read() {
    let mut world = world(&FEW);
    let long =
        [&[7, b'T'][..], b"_stext", &[0x80 | 2, 1, b't'], &[b'x'; 129], &[5], b"tread"].concat();
    world.put(at::NAMES, &long);
    let name = with(&world, |table, memory| table.name(memory, 1)).unwrap().1;
    assert_eq!(name.len(), NAME - 1, "as much as is kept");
    assert_eq!(with(&world, |table, memory| table.name(memory, 2)).unwrap().1, b"read");
}

#[test]
fn tables_that_make_no_sense_are_none() {
    let is_none = |world: &World| {
        world.memory(|memory, old| Kallsyms::find(memory, &old.vmcoreinfo).is_none())
    };
    let mut other = world(&FEW);
    other.put_u32(at::OFFSETS, 0x10_0001);
    assert!(is_none(&other), "no encoding yields _stext");
    let mut many = world(&FEW);
    many.put_u32(at::OFFSETS - 16, u32::MAX);
    assert!(is_none(&many));
}

#[test]
fn name_that_would_end_beyond_all_addresses_is_none() {
    let mut world = world(&FEW);
    // The last page of all, at the end of this memory.
    world.put_u64(0x2000 + 511 * 8, 0x4003);
    world.put_u64(0x4000 + 511 * 8, 0x5003);
    world.put_u64(0x5000 + 511 * 8, 0x6003);
    world.put(0x6000 + 4093, &[0xff, 0xff, 5]);
    with(&world, |table, memory| {
        assert_eq!(table.split(memory, u64::MAX - 2), None);
        assert_eq!(table.split(memory, u64::MAX), None);
    });
}
