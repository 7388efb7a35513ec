//! Whole cards, of kernels made by hand.

use std::boxed::Box;
use std::format;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::String;
use std::vec::Vec;

use super::memory::BUDGET;
use super::report::LOG_COST;
use super::testing::{BASE, HEADERS, World, at};
use super::{CARD_BLOCK, Card, Sink};
use crate::Machine;

const CALL: u16 = 0x005;

/// A kernel that panicked on its second CPU by way of a module.
pub(crate) fn panicked() -> World {
    let mut world = World::x86_64();
    let text = at::TEXT;
    world.put_symbols(&[
        (at::ORC_IPS, "R__start_orc_unwind_ip"),
        (at::ORC_IPS + 20, "R__stop_orc_unwind_ip"),
        (at::ORC, "R__start_orc_unwind"),
        (at::TYPES, "R__start_BTF"),
        (at::TYPES + 0x1000, "R__stop_BTF"),
        (at::DATA, "D__per_cpu_offset"),
        (at::DATA + 0x100, "Bpanic_cpu"),
        (at::DATA + 0x108, "dmodules"),
        (at::DATA + 0x120, "Drunqueues"),
        (at::DATA + 0x180, "btainted_mask"),
        (text, "T_stext"),
        (text + 0x10, "T__crash_kexec"),
        (text + 0x100, "Tpanic"),
        (text + 0x200, "tcpu_idle"),
        (text + 0x300, "Tentry"),
        (text + 0x400, "T_etext"),
    ]);
    // Undefined, a frame of 16 bytes, one of 8, the end of the stack, struct pt_regs.
    world.put_orc(&[
        (text + 0x10, 0, 0),
        (text + 0x100, 24, CALL),
        (text + 0x200, 0, 0x400),
        (text + 0x300, 0, 0x105),
        (text + 0x400, 0, 0),
    ]);
    world.put_types(&[
        ("task_struct", &[("pid", 8), ("comm", 16)]),
        ("rq", &[("curr", 8)]),
        ("module_layout", &[("base", 0), ("text_size", 12)]),
        ("mod_kallsyms", &[("symtab", 0), ("num_symtab", 8), ("strtab", 16)]),
        ("mod_arch_specific", &[("num_orcs", 0), ("orc_unwind_ip", 8), ("orc_unwind", 16)]),
        (
            "module",
            &[("list", 8), ("name", 24), ("core_layout", 80), ("kallsyms", 96), ("arch", 104)],
        ),
    ]);
    put_tasks(&mut world);
    put_module(&mut world);
    put_stack(&mut world);
    world.put_log();
    world.log(1_000_000, "an old line");
    world.log(
        3_184_000,
        "BUG: kernel NULL pointer dereference, address: 0000000000000008\n#PF: read",
    );
    world.log(3_184_100, "CPU: 1 PID: 42 Comm: in smod Tainted: G O 6.1.0-test #1");
    world.log(3_185_000, "Kernel panic - not syncing: Fatal \x1bexception");
    world.log(3_185_500, "---[ end Kernel panic - not syncing: Fatal exception ]---");
    world
}

fn put_tasks(world: &mut World) {
    world.put_u64(at::DATA + 8, 0x1000);
    world.put_u32(at::DATA + 0x100, 1);
    world.put_u64(at::DATA + 0x180, 1 << 12);
    let task = at::DATA + 0x2000;
    world.put_u64(at::DATA + 0x120 + 0x1000 + 8, BASE + task);
    world.put_u32(task + 8, 42);
    world.put(task + 16, b"insmod");
}

fn put_module(world: &mut World) {
    let (list, module) = (at::DATA + 0x108, at::MODULE);
    world.put_u64(list, BASE + module + 8);
    world.put_u64(module + 8, BASE + list);
    world.put(module + 24, b"bad");
    world.put_u64(module + 80, BASE + module + 0x1000);
    world.put_u32(module + 92, 0x1000);
    world.put_u64(module + 96, BASE + module + 0x200);
    world.put_u32(module + 104, 1);
    world.put_u64(module + 112, BASE + module + 0x300);
    world.put_u64(module + 120, BASE + module + 0x380);
    world.put_u32(module + 0x300, 0x1000 - 0x300);
    world.put(module + 0x380, &[8, 0, 0, 0, CALL as u8, 0]);
    // mod_kallsyms, and four symbols: an undefined one, a mark of the assembler, two functions.
    for (slot, value) in [0x400, 4, 0x500].into_iter().enumerate() {
        let value = if slot == 1 { value } else { BASE + module + value };
        world.put_u64(module + 0x200 + slot as u64 * 8, value);
    }
    for (index, (name, section, value)) in
        [(1u32, 0u8, 0x1010), (4, 1, 0x1020), (7, 1, 0x1000), (16, 1, 0x1080)]
            .into_iter()
            .enumerate()
    {
        let symbol = module + 0x400 + index as u64 * 24;
        world.put_u32(symbol, name);
        world.put(symbol + 6, &[section]);
        world.put_u64(symbol + 8, BASE + module + value);
    }
    world.put(module + 0x500, b"\0no\0$x\0bad_init\0after\0");
}

/// __crash_kexec <- panic <- bad_init <- entry <- user mode.
fn put_stack(world: &mut World) {
    let text = at::TEXT;
    let call = text + 0x150;
    let distance = (text + 0x10) as i64 - call as i64;
    world.put(call - 5, &[0xe8]);
    world.put_u32(call - 4, distance as u32);
    let stack = at::STACK + 0x1000;
    world.put_u64(stack + 0x10, BASE + text + 0x250);
    world.put_u64(stack + 0x18, BASE + call);
    world.put_u64(stack + 0x20 + 16, BASE + at::MODULE + 0x1040);
    world.put_u64(stack + 0x38, BASE + text + 0x320);
    world.put_u64(stack + 0x40 + 17 * 8, 0x33);
    world.cpu(0, &[(16, BASE + text + 0x208), (17, 0x10), (19, BASE + at::STACK)]);
    world.cpu(42, &[(16, BASE + text + 0x20), (17, 0x10), (19, BASE + stack), (5, 0x1234)]);
}

const CARD: &str = "\
kernel   6.1.0-test
panic    [    3.185000] Kernel panic - not syncing: Fatal ?exception
cause    [    3.184000] BUG: kernel NULL pointer dereference, address: 0000000000000008
time     2026-11-23 04:55:05 UTC, 3.185 s after boot
task     CPU 1, PID 42, command \"insmod\", task_struct ffffffff810a2000
taint    GO (0x1000)
call trace of CPU 1
  __crash_kexec+0x10/0xf0
  panic+0x50/0x100
  bad_init+0x40/0x80 [bad]
  entry+0x20/0x100
  (entered from user mode)
registers of CPU 1
  rip ffffffff81100020  rsp ffffffff81201000  rfl 0000000000000000
  rax 0000000000000000  rbx 0000000000001234  rcx 0000000000000000
";

#[test]
fn card_says_why_where_and_who() {
    let card = panicked().card();
    let begin: String = card.lines().take(15).map(|line| format!("{line}\n")).collect();
    assert_eq!(begin, CARD, "{card}");
    assert!(card.contains("log, its end\n[    1.000000] an old line\n"), "{card}");
    assert!(card.contains("\n[    3.184000] #PF: read\n"), "every line has its time");
    assert!(card.contains("\nCPU 0: PID 0, in cpu_idle+0x8/0x100\n"), "{card}");
    assert!(card.ends_with("  gs  0000000000000000\n"), "{card}");
    let (first, second) = panicked().cards();
    assert_eq!(first, second, "the same on the console and on the disk");
}

#[test]
fn without_a_symbol_table_the_log_says_who_it_was() {
    let mut world = panicked();
    world.info = world.info.replace("SYMBOL(kallsyms_names)", "x");
    let card = world.card();
    assert!(card.contains("task     CPU 1, PID 42, command \"in smod\" (by the log)\n"), "{card}");
    assert!(card.contains("taint    G O (by the log)\n"), "{card}");
    assert!(card.contains("  0xffffffff81100020 (no symbol)\n"), "{card}");
    assert!(card.contains("(stopped: the kernel's unwind tables were not found)"), "{card}");
    assert!(card.contains("an old line"), "{card}");
}

#[test]
fn without_vmcoreinfo_there_are_registers_still() {
    let mut world = panicked();
    world.info.clear();
    let card = world.card();
    assert!(
        card.starts_with("kernel   unknown: no VMCOREINFO\npanic    unknown: the log"),
        "{card}"
    );
    assert!(card.contains("VMCOREINFO does not say where the page tables are"), "{card}");
    assert!(card.contains("  rip ffffffff81100020 "), "{card}");
    assert!(card.contains("no log: VMCOREINFO does not describe it\n"), "{card}");
}

#[test]
fn without_registers_there_is_a_log_still() {
    let mut world = panicked();
    world.cpus.iter_mut().for_each(Vec::clear);
    let card = world.card();
    assert!(card.contains("no CPU saved its registers: no call trace\n"), "{card}");
    assert!(card.contains("an old line"), "{card}");
}

#[test]
fn cpu_that_saved_nothing_keeps_its_number() {
    let mut world = panicked();
    world.cpus[0].clear();
    let card = world.card();
    assert!(card.contains("call trace of CPU 1\n"), "{card}");
    assert!(!card.contains("CPU 0"), "{card}");
}

#[test]
fn newest_records_are_shown_when_the_log_is_full() {
    let mut world = panicked();
    for second in 4..40 {
        world.log(second * 1_000_000, &format!("line {second} {}", "x".repeat(900)));
    }
    let card = world.card();
    assert!(card.contains("] line 39 ") && card.contains("] line 31 "), "{card}");
    assert!(!card.contains("] line 24 "), "8 KiB are enough");
    assert!(card.contains("panic    no such message in the log"), "it is no longer there");
}

#[test]
fn cause_is_the_most_telling_line_and_not_an_old_one() {
    let cause = |lines: &[(u64, &str)]| {
        let mut world = panicked();
        for &(second, line) in lines {
            world.log(second * 1_000_000, line);
        }
        let card = world.card();
        card.lines().find_map(|line| line.strip_prefix("cause    ")).map(String::from)
    };
    let bug = [(50, "kernel BUG at mm/slub.c:1!"), (50, "invalid opcode: 0000 [#1] SMP")];
    assert_eq!(cause(&bug).as_deref(), Some("[   50.000000] kernel BUG at mm/slub.c:1!"));
    let arm64 = [
        (50, "kernel BUG at mm/slub.c:1!"),
        (50, "Internal error: Oops - BUG: 00000000f2000800 [#1] SMP"),
    ];
    assert_eq!(cause(&arm64).as_deref(), Some("[   50.000000] kernel BUG at mm/slub.c:1!"));
    let trap = [(50, "divide error: 0000 [#1] SMP")];
    assert_eq!(cause(&trap).as_deref(), Some("[   50.000000] divide error: 0000 [#1] SMP"));
    assert_eq!(cause(&[(99, "sysrq: Trigger a crash")]), None, "that one was survived");
}

#[test]
fn card_ends_where_its_block_does() {
    let mut world = panicked();
    for _ in 0..200 {
        world.cpu(7, &[(16, BASE + at::TEXT + 0x208), (17, 0x10)]);
    }
    let card = world.card();
    assert!(card.len() <= CARD_BLOCK as usize);
    assert!(card.ends_with("\n(no room for more)\n"), "{}", card.len());
    assert!(card.contains("CPU 201: PID 7, in cpu_idle"), "what each did comes before registers");
}

/// Stores the addresses of its symbols as kernels with absolute per-CPU symbols do.
fn with_absolute_per_cpu(mut world: World, symbols: u64) -> World {
    for place in (at::OFFSETS..).step_by(4).take(symbols as usize) {
        let bytes = world.memory[place as usize..].first_chunk().unwrap();
        let offset = i32::from_le_bytes(*bytes);
        world.put_u32(place, (-1 - offset) as u32);
    }
    world
}

/// Numbers that look like chance, and are the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    /// Puts a few wrong bytes somewhere into `bytes`.
    fn damage(&mut self, bytes: &mut [u8]) {
        let value = [
            0,
            u64::MAX,
            self.below(1 << 31) as u64,
            BASE + self.below(4 << 20) as u64,
            1 << self.below(64),
        ];
        let (value, size) = (value[self.below(5)].to_le_bytes(), 1 + self.below(8));
        let at = self.below(bytes.len());
        bytes[at..].iter_mut().zip(&value[..size]).for_each(|(byte, wrong)| *byte = *wrong);
    }
}

/// Places in memory that the card is made of, 0x80 bytes each.
const SOURCES: [u64; 19] = [
    at::PAGE_TABLES + 0xf80,
    0x2f80,
    0x3000,
    at::NAMES,
    at::TOKENS,
    at::TOKEN_INDEX + 0x80,
    at::OFFSETS,
    at::ORC_IPS,
    at::ORC,
    at::TYPES,
    at::LOG,
    at::LOG + 0x100,
    at::LOG + 0x400,
    at::DATA,
    at::DATA + 0x100,
    at::STACK + 0x1000,
    at::MODULE,
    at::MODULE + 0x200,
    at::MODULE + 0x400,
];

/// Whatever is broken, a card comes of it, within its bounds and without reading more than it may.
#[test]
fn damaged_memory_costs_lines_and_nothing_else() {
    let base_relative = panicked();
    assert_eq!(with_absolute_per_cpu(panicked(), 16).card(), base_relative.card());
    let mut chance = Chance(1);
    for whole in [with_absolute_per_cpu(panicked(), 16), base_relative] {
        for round in 0..200 {
            let mut world = whole.clone();
            for _ in 0..1 + chance.below(6) {
                let at = SOURCES[chance.below(SOURCES.len())] as usize;
                chance.damage(&mut world.memory[at..at + 0x80]);
            }
            // Also what the kernel left outside of its memory, now and then.
            if round % 4 == 1 {
                let cpu = chance.below(world.cpus.len());
                chance.damage(&mut world.cpus[cpu]);
            }
            if round % 4 == 2 {
                let mut info = world.info.into_bytes();
                chance.damage(&mut info);
                world.info = String::from_utf8_lossy(&info).into_owned();
            }
            let (card, cost) = world.card_and_cost();
            assert!(card.len() <= CARD_BLOCK as usize);
            assert!(cost <= MOST, "{cost}");
            assert!(round % 4 == 1 || card.contains("  rip ffffffff81"), "{card}");
        }
    }
}

/// What a card may cost: for everything, as much again for what stands in for symbols, for the log
/// twice, and the notes of these few CPUs.
const MOST: u64 = 2 * BUDGET + 2 * LOG_COST + NOTES;
const NOTES: u64 = 64 << 10;

/// A stack of 40 functions of a module that claims as many symbols as there is memory for.
fn deep_in_a_large_module() -> World {
    const FRAMES: u64 = 40;
    let mut world = panicked();
    let (stack, table) = (at::STACK + 0x1000, at::STACK + 0x1_0000);
    for frame in 0..FRAMES {
        world.put_u64(stack + 0x38 + frame * 8, BASE + at::MODULE + 0x1041 + frame);
    }
    let entered = stack + 0x38 + FRAMES * 8;
    world.put_u64(entered, BASE + at::TEXT + 0x320);
    world.put_u64(entered + 8 + 17 * 8, 0x33);
    world.put_u64(at::MODULE + 0x200, BASE + table);
    world.put_u32(at::MODULE + 0x208, ((at::MODULE - table) / 24) as u32);
    world
}

#[test]
fn log_is_shown_whatever_the_symbols_of_a_module_cost() {
    let (card, cost) = deep_in_a_large_module().card_and_cost();
    assert!(card.contains("[bad]\n"), "{card}");
    let (above, log) = card.split_once("log, its end\n").unwrap();
    assert!(above.ends_with("(reading took too long: names and values are missing)\n"), "{card}");
    assert!(log.starts_with("[    1.000000] an old line\n"), "{card}");
    assert!(!log.contains("took too long"), "once is enough: {card}");
    assert!(cost <= BUDGET + 2 * LOG_COST + NOTES, "{cost}");
}

/// Where addresses that are not negative stand for themselves, a wrong one is far away from all others.
#[test]
fn symbol_that_became_absolute_costs_lines_and_nothing_else() {
    for symbol in 0..16 {
        for value in [0, 1 << 30] {
            let mut world = with_absolute_per_cpu(panicked(), 16);
            world.put_u32(at::OFFSETS + symbol * 4, value);
            let (card, cost) = world.card_and_cost();
            assert!(card.contains("  rip ffffffff81"), "{card}");
            assert!(cost <= MOST, "{cost}");
        }
    }
}

#[test]
fn symbols_of_a_module_are_read_once_for_all_frames_in_one_function() {
    let mut world = deep_in_a_large_module();
    let table = at::STACK + 0x1_0000;
    world.put_u32(table, 7);
    world.put(table + 6, &[1]);
    world.put_u64(table + 8, BASE + at::MODULE + 0x1000);
    let (card, cost) = world.card_and_cost();
    assert_eq!(card.matches("  bad_init+0x").count(), 41, "{card}");
    assert!(!card.contains("took too long"), "{card}");
    // 27 bytes' worth for each of 40960 symbols.
    assert!(cost < 3 << 20, "{cost}");
}

#[test]
fn cpu_whose_registers_cannot_be_read_keeps_its_number() {
    panicked().crash(|machine, source| {
        // The note of CPU 0.
        machine.poisoned.push(HEADERS + 0x10000);
        let mut card = Box::new(Card::new());
        card.make(machine, source, &mut [0; 8192], &mut crate::dump::Silence);
        assert!(card.text().contains("\ncall trace of CPU 1\n"), "{}", card.text());
        assert!(!card.text().contains("CPU 0"), "{}", card.text());
    });
}

/// Fails at its third line.
struct Broken(u32);

impl Sink for Broken {
    fn line(&mut self, _: &mut dyn Machine, _: &str) {
        self.0 += 1;
        assert!(self.0 < 3);
    }
}

#[test]
fn card_whose_making_failed_is_what_there_is_of_it_and_says_so() {
    panicked().crash(|machine, source| {
        let mut card = Box::new(Card::new());
        let made = catch_unwind(AssertUnwindSafe(|| {
            card.make(machine, source, &mut [0; 8192], &mut Broken(0));
        }));
        assert!(made.is_err());
        card.abandon();
        let (made, remark) = card.text().split_at(CARD.match_indices('\n').nth(2).unwrap().0 + 1);
        assert!(CARD.starts_with(made), "{made}");
        assert!(remark.starts_with("(the rest is missing") && remark.ends_with(")\n"), "{remark}");
    });
}

#[test]
fn remark_that_has_no_room_any_more_is_left_out_whole() {
    let mut card = Box::new(Card::new());
    for _ in 0..CARD_BLOCK {
        card.abandon();
    }
    let line = card.text().lines().next().unwrap().len() + 1;
    assert_eq!(card.text().len(), CARD_BLOCK as usize / line * line);
}
