//! Page tables of every granule and width, in a few pages of memory.

use proptest::prelude::*;

use super::*;
use crate::testing::FakeMemory;

/// Where an address of all kinds of bits leads.
const VIRT: u64 = 0xffff_9abc_def6_789a;

const PAGE: u64 = VALID | TABLE;
const BLOCK: u64 = VALID;

/// Tables of four granules' worth of memory, linked for `virt` down to `leaf_level` (counted from the
/// last one), where `leaf` stands.
struct Tables {
    memory: FakeMemory,
    tables: Arm64PageTables,
}

fn linked(tables: Arm64PageTables, virt: u64, leaf_level: u32, leaf: u64) -> Tables {
    let granule = tables.granule;
    let size = 1u64 << granule.page_bits();
    let levels = granule.levels(tables.root_bits);
    let mut memory = FakeMemory::new((size * u64::from(levels + 1)) as usize);
    for level in leaf_level..levels {
        let shift = granule.page_bits() + granule.level_bits() * level;
        let bits =
            if level == levels - 1 { tables.root_bits - shift } else { granule.level_bits() };
        let slot = (virt >> shift) % (1 << bits) * 8;
        let entry = if level == leaf_level { leaf } else { (u64::from(level) * size) | PAGE };
        memory.put_u64(u64::from(level + 1) * size + slot, entry);
    }
    let root = PhysAddr(u64::from(levels) * size);
    Tables { memory, tables: Arm64PageTables { root, ..tables } }
}

fn tables(granule: Granule, bits: u32) -> Arm64PageTables {
    Arm64PageTables::new(PhysAddr(0), granule, bits).unwrap()
}

fn walk(tables: Arm64PageTables, level: u32, leaf: u64) -> Result<Mapping, ReadError> {
    let world = linked(tables, VIRT, level, leaf);
    world.tables.translate(&world.memory, VirtAddr(VIRT))
}

#[test]
fn every_granule_and_width_leads_to_its_page() {
    let widths = [
        (Granule::Size4K, 48, 4),
        (Granule::Size4K, 52, 5),
        (Granule::Size16K, 47, 3),
        (Granule::Size16K, 48, 4),
        (Granule::Size16K, 52, 4),
        (Granule::Size64K, 48, 3),
        (Granule::Size64K, 52, 3),
    ];
    for (granule, bits, levels) in widths {
        assert_eq!(granule.levels(bits), levels, "{granule:?} {bits}");
        let virt = if bits == 47 { VIRT | 1 << 47 } else { VIRT };
        let world =
            linked(tables(granule, bits), virt, 0, 0x8_7654_0000 | 0x0060_0000_0000_0403 | PAGE);
        let found = world.tables.translate(&world.memory, VirtAddr(virt)).unwrap();
        let size = 1 << granule.page_bits();
        assert_eq!(found.phys, PhysAddr(0x8_7654_0000 + virt % size), "{granule:?} {bits}");
        assert_eq!(found.length, size - virt % size);
    }
}

#[test]
fn narrow_addresses_need_fewer_levels() {
    assert_eq!(Granule::Size4K.levels(39), 3);
    assert_eq!(Granule::Size64K.levels(42), 2);
    assert_eq!(Granule::Size16K.levels(36), 2);
    let virt = 0xffff_ffbc_def6_789a;
    let world = linked(tables(Granule::Size4K, 39), virt, 0, 0x5000 | PAGE);
    let found = world.tables.translate(&world.memory, VirtAddr(virt)).unwrap();
    assert_eq!(found.phys, PhysAddr(0x589a));
}

#[test]
fn blocks_end_the_walk_early() {
    let sizes = [
        (Granule::Size4K, 48, 1, 2u64 << 20),
        (Granule::Size4K, 48, 2, 1 << 30),
        (Granule::Size4K, 52, 3, 512 << 30),
        (Granule::Size16K, 48, 1, 32 << 20),
        (Granule::Size16K, 52, 2, 64 << 30),
        (Granule::Size64K, 48, 1, 512 << 20),
        (Granule::Size64K, 52, 2, 4 << 40),
    ];
    for (granule, bits, level, size) in sizes {
        let found = walk(tables(granule, bits), level, BLOCK).unwrap();
        assert_eq!(found.phys, PhysAddr(VIRT % size), "{granule:?} {size:#x}");
        assert_eq!(found.length, size - VIRT % size);
    }
}

#[test]
fn blocks_larger_than_the_architecture_has_are_not_believed() {
    let refused = Err(ReadError::NotMapped(VirtAddr(VIRT)));
    assert_eq!(walk(tables(Granule::Size4K, 48), 3, BLOCK), refused);
    assert_eq!(walk(tables(Granule::Size16K, 48), 2, BLOCK), refused);
    // The mark of a block is reserved at the last level.
    assert_eq!(walk(tables(Granule::Size4K, 48), 0, BLOCK | 0x5000), refused);
}

#[test]
fn address_bits_above_48_lie_elsewhere_in_each_format() {
    // Bits 9:8 are address bits 51:50 with LPA2 only; else they say how a page is shared.
    let shared = 3 << 8;
    let page = |granule, bits, entry| walk(tables(granule, bits), 0, entry | PAGE).unwrap().phys.0;
    assert_eq!(page(Granule::Size4K, 48, 0x5000 | shared), 0x589a);
    assert_eq!(page(Granule::Size4K, 52, 0x5000 | shared), 0xc_0000_0000_589a);
    assert_eq!(page(Granule::Size4K, 52, 3 << 48 | 0x5000), 0x3_0000_0000_589a);
    assert_eq!(page(Granule::Size16K, 52, 0x8000 | 1 << 8), 0x4_0000_0000_b89a);
    // With 64 KiB granules they are bits 15:12, and 9:8 are never part of it.
    assert_eq!(page(Granule::Size64K, 48, 0xf000 | 0x2_0000 | shared), 0xf_0000_0002_789a);
    assert_eq!(page(Granule::Size64K, 52, 0x1000 | 0x2_0000 | shared), 0x1_0000_0002_789a);
}

#[test]
fn tables_above_48_bits_are_followed_too() {
    // The entry points to a table at bit 50, where the dump has nothing: it must not be taken for
    // the table at the same place below.
    let mut world = linked(tables(Granule::Size4K, 52), VIRT, 0, 0x5000 | PAGE);
    let slot = 5 * 0x1000 + (VIRT >> 48) % 16 * 8;
    world.memory.put_u64(slot, 0x4000 | 1 << 8 | PAGE);
    let found = world.tables.translate(&world.memory, VirtAddr(VIRT));
    assert_eq!(found, Err(ReadError::NoPageTable(VirtAddr(VIRT))));
}

#[test]
fn top_table_of_a_kernel_for_52_bits_is_used_from_its_end() {
    // 64 KiB granule: the same number of levels, so the index counts from the larger table's start.
    let wide = tables(Granule::Size64K, 48).built_for(52);
    assert_eq!(wide.root_bits, 52);
    assert_eq!(walk(wide, 0, 0x2_0000 | PAGE).unwrap().phys, PhysAddr(0x2_789a));
    // 4 KiB: 52 bits take a level more, and the kernel starts one level further down.
    assert_eq!(tables(Granule::Size4K, 48).built_for(52).root_bits, 48);
    assert_eq!(tables(Granule::Size16K, 47).built_for(52).root_bits, 47);
}

#[test]
fn addresses_outside_the_kernels_half_are_not_mapped() {
    let world = linked(tables(Granule::Size4K, 48), VIRT, 0, 0x5000 | PAGE);
    for at in [VIRT & 0x0000_ffff_ffff_ffff, VIRT & !(1 << 60), VIRT & !(1 << 48)] {
        let found = world.tables.translate(&world.memory, VirtAddr(at));
        assert_eq!(found, Err(ReadError::NotMapped(VirtAddr(at))));
    }
}

#[test]
fn process_has_the_other_half_of_the_addresses() {
    let low = 0x0000_2abc_def6_789a;
    let world = linked(tables(Granule::Size4K, 48), low, 0, 0x5000 | PAGE);
    let own = world.tables.of_process(world.tables.root);
    let found = own.translate(&world.memory, VirtAddr(low)).unwrap();
    assert_eq!(found.phys, PhysAddr(0x589a));
    // The upper byte is the process's own to use.
    assert_eq!(own.translate(&world.memory, VirtAddr(low | 0x12 << 56)).unwrap(), found);
    assert!(own.translate(&world.memory, VirtAddr(low | 1 << 50)).is_err());
    assert_eq!(world.tables.next_possible(VirtAddr(low)), VirtAddr(0xffff << 48));
    assert_eq!(world.tables.span(1), 2 << 20);
}

#[test]
fn absent_entry_and_absent_table_are_told_apart() {
    let narrow = tables(Granule::Size4K, 48);
    assert_eq!(walk(narrow, 0, 0x5000 | TABLE), Err(ReadError::NotMapped(VirtAddr(VIRT))));
    let gone = walk(narrow, 1, 0xffff_f000 | PAGE);
    assert_eq!(gone, Err(ReadError::NoPageTable(VirtAddr(VIRT))));
}

/// 6.12, built for 52 bits, on a CPU that has 48 (measured).
const INFO: &[u8] = b"PAGESIZE=4096\nSYMBOL(swapper_pg_dir)=ffffdc405b892000\n\
SYMBOL(_stext)=ffffdc405a010000\nNUMBER(VA_BITS)=52\nNUMBER(kimage_voffset)=0xffffdc4019e00000\n\
NUMBER(PHYS_OFFSET)=0xfff0a94380000000\nNUMBER(TCR_EL1_T1SZ)=0x10\n";

#[test]
fn width_is_what_the_cpu_was_told() {
    let tables = Arm64PageTables::from_vmcoreinfo(&Vmcoreinfo::new(INFO)).unwrap();
    assert_eq!((tables.bits, tables.root_bits), (48, 48));
    assert_eq!(tables.root, PhysAddr(0x41a9_2000));
}

#[test]
fn image_and_direct_map_are_found_by_arithmetic() {
    let tables = Arm64PageTables::from_vmcoreinfo(&Vmcoreinfo::new(INFO)).unwrap();
    let found = |at| tables.by_arithmetic(VirtAddr(at)).map(|phys| phys.0);
    assert_eq!(found(0xffff_dc40_5a01_0000), Some(0x4021_0000));
    // PHYS_OFFSET is that of a direct map that began 16 times lower.
    assert_eq!(found(0xffff_56bc_c000_0000), Some(0x4000_0000));
    assert_eq!(found(0xffff_8000_8000_0000), None);
    assert_eq!(found(0x0000_56bc_c000_0000), None);
}

#[test]
fn impossible_descriptions_are_refused() {
    let with = |from: &str, to: &str| {
        let text = String::from_utf8(INFO.to_vec()).unwrap().replace(from, to);
        Arm64PageTables::from_vmcoreinfo(&Vmcoreinfo::new(text.as_bytes())).map(|it| it.bits)
    };
    assert!(with("PAGESIZE=4096", "PAGESIZE=8192").is_err());
    assert!(with("T1SZ)=0x10", "T1SZ)=0x7f").is_err());
    assert!(with("T1SZ)=0x10", "T1SZ)=-1").is_err());
    assert!(with("NUMBER(kimage_voffset)", "x").is_err());
    // Kernels before 5.11 do not say; then it is what they were built for.
    assert_eq!(with("NUMBER(TCR_EL1_T1SZ)", "x").unwrap(), 52);
}

proptest! {
    #[test]
    fn garbage_tables_never_panic(
        entries in prop::collection::vec(any::<u64>(), 512),
        at: u64,
        bits in 25u32..=52,
        which in 0usize..3,
    ) {
        let granule = [Granule::Size4K, Granule::Size16K, Granule::Size64K][which];
        let mut memory = FakeMemory::new(0x10000);
        for page in 0..16 {
            for (index, entry) in entries.iter().enumerate() {
                memory.put_u64(page * 4096 + index as u64 * 8, entry & 0x0000_0000_ffff | 3);
            }
        }
        let tables = tables(granule, bits).built_for(52);
        let _ = tables.translate(&memory, VirtAddr(at | u64::MAX << bits));
        let _ = tables.by_arithmetic(VirtAddr(at));
    }
}
