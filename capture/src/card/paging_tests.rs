//! Page tables of every granule and width.

use super::*;

/// Where an address of all kinds of bits leads.
const VIRT: u64 = 0xffff_9abc_def6_789a;

fn arm64(page_size: u32, va_bits: u32, t1sz: u32) -> Tables {
    let mut info = Vmcoreinfo::empty();
    let text = std::format!(
        "PAGESIZE={page_size}\nNUMBER(VA_BITS)={va_bits}\nNUMBER(TCR_EL1_T1SZ)={t1sz}\n"
    );
    info.set(text.as_bytes());
    Tables::arm64(0x10_0000, &info).unwrap()
}

/// How an address is resolved: bits within a page, bits that all tables resolve, levels.
type Shape = (u32, u32, u32);

/// Walks to a leaf at the level `leaf_level`; all tables are at multiples of 1 MiB.
fn walk(
    tables: Tables,
    (page_bits, root_bits, levels): Shape,
    leaf_level: u32,
    leaf: u64,
) -> Option<(u64, u64)> {
    let level_bits = page_bits - 3;
    let mut level = levels;
    let mapping = tables.walk(VIRT, &mut |at| {
        level = level.checked_sub(1).expect("no more levels than there are");
        let shift = page_bits + level_bits * level;
        let bits = if level == levels - 1 { root_bits - shift } else { level_bits };
        assert_eq!(at % 0x10_0000, (VIRT >> shift) % (1 << bits) * 8, "level {level}");
        Some(if level == leaf_level { leaf } else { u64::from(level + 2) << 20 | 3 })
    });
    assert_eq!(level, leaf_level, "walked as far as the leaf");
    mapping.map(|mapping| (mapping.phys(VIRT).unwrap().0, mapping.size))
}

#[test]
fn every_granule_and_width_leads_to_its_page() {
    for (page_size, shape) in [
        (4096, (12, 48, 4)),
        (4096, (12, 52, 5)),
        (16384, (14, 47, 3)),
        (16384, (14, 48, 4)),
        (16384, (14, 52, 4)),
        (65536, (16, 48, 3)),
        (65536, (16, 52, 3)),
    ] {
        let (_, bits, _) = shape;
        let found = walk(arm64(page_size, bits, 64 - bits), shape, 0, 0x0060_0008_7654_0403);
        let size = u64::from(page_size);
        assert_eq!(found, Some((0x8_7654_0000 + VIRT % size, size)), "{page_size} {bits}");
    }
}

#[test]
fn blocks_end_the_walk_early_where_the_architecture_has_them() {
    for (page_size, shape, level, size) in [
        (4096, (12, 48, 4), 1, 2u64 << 20),
        (4096, (12, 48, 4), 2, 1 << 30),
        (4096, (12, 52, 5), 3, 512 << 30),
        (16384, (14, 48, 4), 1, 32 << 20),
        (65536, (16, 48, 3), 1, 512 << 20),
    ] {
        let (_, bits, _) = shape;
        let found = walk(arm64(page_size, bits, 64 - bits), shape, level, 1);
        assert_eq!(found, Some((VIRT % size, size)), "{page_size} {bits} {level}");
    }
    assert_eq!(walk(arm64(4096, 48, 16), (12, 48, 4), 3, 1), None);
    assert_eq!(walk(arm64(16384, 48, 16), (14, 48, 4), 2, 1), None);
    assert_eq!(walk(arm64(4096, 48, 16), (12, 48, 4), 0, 1), None, "reserved at the last level");
}

#[test]
fn address_bits_above_48_lie_elsewhere_in_each_format() {
    let page = |page_size, shape: Shape, entry: u64| {
        walk(arm64(page_size, shape.1, 64 - shape.1), shape, 0, entry | 3).unwrap().0
    };
    assert_eq!(page(4096, (12, 48, 4), 0x5300), 0x589a);
    assert_eq!(page(4096, (12, 52, 5), 0x5300), 0xc_0000_0000_589a);
    assert_eq!(page(65536, (16, 52, 3), 0x2_1300), 0x1_0000_0002_789a);
}

#[test]
fn top_table_of_a_kernel_for_52_bits_is_used_from_its_end() {
    // Pages of 64 KiB: the same number of levels; of 4 KiB: one less.
    let found = walk(arm64(65536, 52, 16), (16, 52, 3), 0, 0x2_0003);
    assert_eq!(found, Some((0x2_789a, 65536)));
    assert_eq!(walk(arm64(4096, 52, 16), (12, 48, 4), 0, 0x5003), Some((0x589a, 4096)));
}

#[test]
fn x86_pages_of_all_sizes_and_both_depths_are_found() {
    for shape in [(12, 48, 4), (12, 57, 5)] {
        let mut info = Vmcoreinfo::empty();
        let text = std::format!(
            "SYMBOL(swapper_pg_dir)=ffffffff80100000\nNUMBER(phys_base)=0\nNUMBER(pgtable_l5_enabled)={}\n",
            shape.2 - 4
        );
        info.set(text.as_bytes());
        let tables = Tables::find(Architecture::X86_64, &info).unwrap();
        assert_eq!(walk(tables, shape, 0, 1 << 63 | 0x5063), Some((0x589a, 4096)));
        let large = walk(tables, shape, 1, 0x20_00e3);
        assert_eq!(large, Some((0x20_0000 + VIRT % (2 << 20), 2 << 20)));
        let larger = walk(tables, shape, 2, 0x4000_00e3);
        assert_eq!(larger, Some((0x4000_0000 + VIRT % (1 << 30), 1 << 30)));
        assert_eq!(walk(tables, shape, 0, 0x5062), None, "not present");
        assert_eq!(tables.walk(0x1000, &mut |_| panic!("user space has other tables")), None);
    }
}

#[test]
fn impossible_widths_are_refused() {
    let refused = |text: &str| {
        let mut info = Vmcoreinfo::empty();
        info.set(text.as_bytes());
        Tables::arm64(0, &info).is_none()
    };
    assert!(refused("PAGESIZE=8192\nNUMBER(VA_BITS)=48\n"));
    assert!(refused("PAGESIZE=4096\n"));
    assert!(refused("PAGESIZE=4096\nNUMBER(TCR_EL1_T1SZ)=0x7f\n"));
    assert!(refused("PAGESIZE=4096\nNUMBER(TCR_EL1_T1SZ)=-9223372036854775808\n"));
}
