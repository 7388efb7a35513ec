//! Entries of all versions.

use std::vec::Vec;

use super::super::testing::{BASE, World, at};
use super::*;

fn raw(sp_offset: i16, bp_offset: i16, flags: u16) -> [u8; 6] {
    let bytes = [sp_offset.to_le_bytes(), bp_offset.to_le_bytes(), flags.to_le_bytes()].concat();
    bytes.try_into().unwrap()
}

#[test]
fn ordinary_call_reads_alike_in_all_versions_but_for_the_numbers() {
    let entry = Entry {
        sp: Base::Sp,
        sp_offset: 24,
        bp: Base::PreviousSp,
        bp_offset: -16,
        kind: Kind::Call,
    };
    assert_eq!(Version::TwoBits.decode(raw(24, -16, 0x015)), Some(entry));
    assert_eq!(Version::ThreeBits.decode(raw(24, -16, 0x215)), Some(entry));
    assert_eq!(Version::Renumbered.decode(raw(24, -16, 0x283)), Some(entry));
}

#[test]
fn end_of_stack_and_unknown_places_are_told_apart() {
    let kind = |version: Version, flags| version.decode(raw(0, 0, flags)).unwrap().kind;
    assert_eq!(kind(Version::TwoBits, 1 << 10), Kind::EndOfStack, "to 6.2");
    assert_eq!(kind(Version::TwoBits, 1 << 11), Kind::EndOfStack, "6.3");
    assert_eq!(kind(Version::TwoBits, 0), Kind::Undefined);
    assert_eq!(kind(Version::ThreeBits, 0x100), Kind::EndOfStack);
    assert_eq!(kind(Version::Renumbered, 0), Kind::Undefined);
    assert_eq!(kind(Version::TwoBits, 0x105), Kind::Registers);
    assert_eq!(kind(Version::Renumbered, 0x403), Kind::HardwareFrame);
    assert_eq!(Version::ThreeBits.decode(raw(0, 0, 0x70f)), None);
    assert_eq!(Version::Renumbered.decode(raw(0, 0, 0x201)), None);
}

fn table(flags: u16) -> (World, Table) {
    let mut world = World::x86_64();
    let entries: Vec<_> =
        (0..100).map(|index| (0x10_0000 + index * 4, 8 * index as i16, flags)).collect();
    world.put_orc(&entries);
    let ips = (BASE + at::ORC_IPS, BASE + at::ORC_IPS + 400);
    let table = world.memory(|memory, _| Table::of_image(memory, ips, BASE + at::ORC)).unwrap();
    (world, table)
}

#[test]
fn version_is_told_by_what_most_entries_have_in_common() {
    assert_eq!(table(0x005).1.version, Version::TwoBits);
    assert_eq!(table(0x205).1.version, Version::ThreeBits);
    assert_eq!(table(0x203).1.version, Version::Renumbered);
}

#[test]
fn last_entry_that_begins_before_an_instruction_rules_it() {
    let (world, table) = table(0x205);
    let offset =
        |pc| world.memory(|memory, _| table.find(memory, BASE + pc)).map(|it| it.sp_offset);
    assert_eq!(offset(0x10_0003), Some(0));
    assert_eq!(offset(0x10_0004), Some(8));
    assert_eq!(offset(0x20_0000), Some(99 * 8));
    assert_eq!(offset(0x0f_ffff), None);
}

#[test]
fn table_that_would_fill_the_address_space_is_none() {
    World::x86_64().memory(|memory, _| {
        for end in [0, 1 << 40, u64::MAX] {
            assert!(Table::of_image(memory, (0, end), BASE + at::ORC).is_none());
        }
    });
}
