//! A kernel whose symbol table has functions only.

use std::vec;
use std::vec::Vec;

use super::super::kallsyms::Kallsyms;
use super::super::testing::{BASE, World, at};
use super::*;

const TEXT_END: u64 = at::TEXT + 0x400;
const EXPORTS: u64 = 0x11_0000;
const NAMES: u64 = 0x11_8000;
const TYPE_SECTION: u64 = 0x12_0000;
/// Where `.data..percpu` begins, and what is in it.
const PER_CPU: u64 = at::DATA + 0x1000;
const VARIABLES: [(&str, u32); 3] = [("runqueues", 0x40), ("kstat", 0x80), ("irq_stack_ptr", 0xc0)];

/// A kernel with these exports: name and address, as offsets from [`BASE`]; `None` is padding.
fn world(exports: &[Option<(&str, u64)>]) -> World {
    let mut world = World::aarch64();
    let functions = ["tone", "ttwo", "tthree", "tfour", "tfive", "tsix", "tseven", "teight"];
    let mut symbols = vec![(at::TEXT, "T_stext")];
    symbols.extend((at::TEXT + 0x10..).step_by(16).zip(functions));
    symbols.push((TEXT_END, "T_etext"));
    world.put_symbols(&symbols);
    world.info += &std::format!("SYMBOL(init_uts_ns)={:x}\n", BASE + at::DATA);
    let (mut place, mut name_at) = (EXPORTS, NAMES);
    for export in exports {
        let Some((name, value)) = export else {
            place += 4;
            continue;
        };
        world.put(name_at, name.as_bytes());
        for (skip, target) in [(0, *value), (4, name_at)] {
            world.put_u32(place + skip, target.wrapping_sub(place + skip) as u32);
        }
        (place, name_at) = (place + ENTRY, name_at + 0x20);
    }
    put_types(&mut world);
    world
}

/// Types as large as a kernel's least, at their end the per-CPU variables.
fn put_types(world: &mut World) {
    let mut strings = vec![0];
    let mut name = |text: &str| {
        let at = strings.len() as u32;
        strings.extend_from_slice(text.as_bytes());
        strings.push(0);
        at
    };
    let integers = 5000;
    let mut types: Vec<u32> = (0..integers).flat_map(|_| [0, 1 << 24, 4, 32]).collect();
    for (text, _) in VARIABLES {
        types.extend([name(text), 14 << 24, 1, 0]);
    }
    types.extend([name(".data..percpu"), 15 << 24 | VARIABLES.len() as u32, 0x2000]);
    for (id, (_, offset)) in (integers + 1..).zip(VARIABLES) {
        types.extend([id, offset, 8]);
    }
    let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
    let sizes = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
    let sizes: Vec<u8> = sizes.iter().flat_map(|word| word.to_le_bytes()).collect();
    world.put(TYPE_SECTION, &[&TYPES[..4], &sizes, &types, &strings].concat());
}

const USUAL: [Option<(&str, u64)>; 8] = [
    Some(("__per_cpu_offset", at::DATA + 0x100)),
    Some(("init_task", at::DATA + 0x200)),
    Some(("init_uts_ns", at::DATA)),
    Some(("kstat", PER_CPU + 0x80)),
    None,
    None,
    Some(("nr_cpu_ids", at::DATA + 0x300)),
    Some(("zone", at::DATA + 0x400)),
];

fn found<const N: usize>(world: &World, names: &[&str; N]) -> [Option<u64>; N] {
    world.memory(|memory, old| {
        let hidden = Hidden::find(memory, &old.vmcoreinfo, BASE + TEXT_END);
        hidden.find_all(memory, names).map(|at| at.map(|at| at.wrapping_sub(BASE)))
    })
}

#[test]
fn exports_lead_to_variables_on_both_sides_of_the_one_that_is_known() {
    let names = ["__per_cpu_offset", "init_task", "nr_cpu_ids", "zone", "missing"];
    let expected = [0x100, 0x200, 0x300, 0x400].map(|skip| Some(at::DATA + skip));
    let found = found(&world(&USUAL), &names);
    assert_eq!(found[..4], expected);
    assert_eq!(found[4], None);
}

#[test]
fn types_and_an_exported_variable_lead_to_those_of_each_cpu() {
    let names = ["runqueues", "irq_stack_ptr", "__per_cpu_start", "__per_cpu_end", "__start_BTF"];
    let expected = [PER_CPU + 0x40, PER_CPU + 0xc0, PER_CPU, PER_CPU + 0x2000, TYPE_SECTION];
    assert_eq!(found(&world(&USUAL), &names), expected.map(Some));
}

#[test]
fn kernel_without_the_known_export_has_types_and_nothing_else() {
    let world = world(&[Some(("init_task", at::DATA))]);
    let names = ["init_task", "runqueues", "__per_cpu_start", "__start_BTF"];
    assert_eq!(found(&world, &names), [None, None, None, Some(TYPE_SECTION)]);
}

#[test]
fn facts_of_such_a_kernel_are_those_of_one_with_all_symbols() {
    world(&USUAL).crash(|machine, source| {
        let mut card = super::super::Card::new();
        let (mut memory, facts) = card.open(machine, source);
        assert_eq!(facts.per_cpu, Some(BASE + at::DATA + 0x100));
        assert_eq!(facts.run_queues, Some(BASE + PER_CPU + 0x40));
        let table = Kallsyms::find(&mut memory, &source.old.vmcoreinfo).unwrap();
        assert_eq!(table.find_all(&mut memory, &["init_task"]), [None], "not in the table");
        let init_task = facts.find_all(&mut memory, &["init_task"]);
        assert_eq!(init_task, [Some(BASE + at::DATA + 0x200)]);
    });
}

#[test]
fn damaged_tables_end_the_search() {
    let whole = world(&USUAL);
    for (place, step) in [(EXPORTS, 4), (NAMES, 8), (TYPE_SECTION, 4), (TYPE_SECTION + 0x1_3880, 4)]
    {
        for index in 0..32 {
            for value in [0, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
                let mut world = whole.clone();
                world.put_u32(place + index * step, value);
                // Whatever is found of them is somewhere.
                found(&world, &["runqueues", "init_task", "__start_BTF"]);
            }
        }
    }
}

#[test]
fn last_block_of_all_addresses_is_looked_through_to_its_end() {
    World::aarch64().memory(|memory, old| {
        let mut hidden = Hidden::new(&old.vmcoreinfo, u64::MAX);
        hidden.look_through(memory, u64::MAX - (BLOCK as u64 - 1), &[0; BLOCK], None);
        assert_eq!((hidden.types, hidden.anchor), (None, None));
        // Nor is anything read behind the last address.
        hidden.image.1 = u64::MAX;
        assert_eq!(hidden.find_modules(memory, 8, 0x20), None);
    });
}

/// Where the head of the list is, and a module near the image: it is linked at 8 and points to itself at
/// 0x20.
const HEAD: u64 = at::DATA + 0x800;
const LINK: u64 = 8;
const ITSELF: u64 = 0x20;

fn with_module() -> World {
    let mut world = world(&USUAL);
    let node = BASE + at::MODULE + LINK;
    world.put_u64(HEAD, node);
    world.put_u64(HEAD + 8, node);
    world.put_u64(at::MODULE + LINK, BASE + HEAD);
    world.put_u64(at::MODULE + LINK + 8, BASE + HEAD);
    world.put_u64(at::MODULE + ITSELF, BASE + at::MODULE);
    world
}

fn module_list(world: &World) -> Option<u64> {
    world.memory(|memory, old| {
        let mut hidden = Hidden::find(memory, &old.vmcoreinfo, BASE + TEXT_END);
        // The types are behind the data here.
        hidden.types = None;
        hidden.text_end = BASE + at::DATA;
        hidden.image = (BASE, BASE + at::MODULE);
        let found = hidden.find_modules(memory, LINK, ITSELF);
        assert_eq!(hidden.find_all(memory, &["modules"]), [found]);
        found.map(|at| at - BASE)
    })
}

#[test]
fn list_of_modules_is_found_by_a_module_that_points_to_itself() {
    assert_eq!(module_list(&with_module()), Some(HEAD));
    for (place, value) in [
        (at::MODULE + ITSELF, BASE),
        (at::MODULE + LINK + 8, BASE),
        (HEAD, u64::MAX - 7),
        (HEAD, 8),
    ] {
        let mut world = with_module();
        world.put_u64(place, value);
        assert_eq!(module_list(&world), None, "{place:#x}");
    }
}
