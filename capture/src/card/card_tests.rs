//! Whole cards, of kernels made by hand.

use std::boxed::Box;
use std::format;
use std::string::String;
use std::vec::Vec;

use super::CARD_BLOCK;
use super::Card;
use super::testing::{BASE, HEADERS, World, at};

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

/// Whatever is broken, a card comes of it, within its bounds and in time.
#[test]
fn damaged_memory_costs_lines_and_nothing_else() {
    let whole = panicked();
    let mut state = 1u64;
    let mut random = |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let areas = [
        at::PAGE_TABLES,
        0x2000,
        0x3000,
        at::NAMES,
        at::TOKENS,
        at::TOKEN_INDEX,
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
    for _ in 0..100 {
        let mut world = whole.clone();
        for _ in 0..1 + random(6) {
            let place = areas[random(areas.len() as u64) as usize] + random(0x80);
            let value = [0, u64::MAX, random(1 << 31), BASE + random(4 << 20), 1 << random(64)];
            let value = value[random(5) as usize].to_le_bytes();
            world.put(place, &value[..1 + random(8) as usize]);
        }
        let card = world.card();
        assert!(card.len() <= CARD_BLOCK as usize);
        assert!(card.contains("  rip ffffffff81"), "{card}");
    }
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
