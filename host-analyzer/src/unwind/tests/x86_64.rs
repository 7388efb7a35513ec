//! x86_64 stacks in a kernel made of a few pages.
//!
//! The kernel's image is 64 KiB at [`BASE`]; its symbol table has five functions, whose code is
//! never looked at except for calls, and its unwind tables a rule for each.

use super::*;
use crate::linux::stacks::Stack;

const BASE: u64 = 0xffff_ffff_8100_0000;

/// Functions: start in the image and ORC flags (version 1) with the stack pointer's offset.
const INNER: u64 = BASE + 0x100;
const MIDDLE: u64 = BASE + 0x200;
const ENTRY: u64 = BASE + 0x300;
const THREAD: u64 = BASE + 0x400;
const LEFT_OUT: u64 = BASE + 0x500;

const CALL_FROM_SP: u16 = 0x005;
const SAVED_REGISTERS: u16 = 0x105;
const END_OF_STACK: u16 = 0x400;
const NO_RULE: u16 = 0;

const RULES: [(u64, i16, u16); 5] = [
    (INNER, 16, CALL_FROM_SP),
    (MIDDLE, 24, CALL_FROM_SP),
    (ENTRY, 0, SAVED_REGISTERS),
    (THREAD, 0, END_OF_STACK),
    (LEFT_OUT, 0, NO_RULE),
];

const SYMBOLS: [(u64, &str); 10] = [
    (BASE, "T_text"),
    (INNER, "tinner"),
    (MIDDLE, "tmiddle"),
    (ENTRY, "tentry"),
    (THREAD, "tthread"),
    (LEFT_OUT, "tleft_out"),
    (BASE + 0x3000, "D__start_orc_unwind_ip"),
    (BASE + 0x3014, "D__stop_orc_unwind_ip"),
    (BASE + 0x3100, "D__start_orc_unwind"),
    (BASE + 0x311e, "D__stop_orc_unwind"),
];

const STACK: u64 = BASE + 0x8000;
const IRQ_STACK: u64 = BASE + 0xa000;
const TABLES: u64 = 0xc000;
/// struct orc_entry with the member `end`, so that the tables are known to be of version 1.
const BTF: u64 = 0x4000;

struct World {
    memory: FakeMemory,
}

impl World {
    fn new() -> World {
        let mut memory = FakeMemory::new(0x10000);
        memory.mapped(BASE, TABLES);
        let mut world = World { memory };
        world.symbols();
        world.rules();
        world.types();
        world
    }

    fn symbols(&mut self) {
        let (end, btf) = (BASE + 0x10000, BASE + BTF);
        let mut all = SYMBOLS.to_vec();
        all.extend([(btf, "D__start_BTF"), (btf + 0x100, "D__stop_BTF"), (end, "D_end")]);
        put_symbols(&mut self.memory, BASE, &all);
    }

    fn rules(&mut self) {
        for (index, (start, offset, flags)) in RULES.into_iter().enumerate() {
            let place = 0x3000 + index as u64 * 4;
            let relative = start.wrapping_sub(BASE + place) as i32;
            self.memory.put(place, &relative.to_le_bytes());
            let entry = [offset.to_le_bytes(), [0; 2], flags.to_le_bytes()].concat();
            self.memory.put(0x3100 + index as u64 * 6, &entry);
        }
    }

    fn types(&mut self) {
        let types = [
            ("orc_entry", 6, &[("end", 0, None)][..]),
            ("thread_struct", 32, &[("sp", 24, None)]),
            ("task_struct", 64, &[("thread", 32, Some("thread_struct"))]),
        ];
        self.memory.put(BTF, &btf(&types));
    }

    fn put(&mut self, virt: u64, value: u64) {
        self.memory.put_u64(virt - BASE, value);
    }

    /// struct pt_regs at `at`.
    fn registers(&mut self, at: u64, ip: u64, cs: u64, sp: u64) {
        for (index, value) in saved(ip, cs, sp).into_iter().enumerate() {
            self.put(at + index as u64 * 8, value);
        }
    }

    /// Unwinds from registers, on the two stacks.
    fn unwind(&self, ip: u64, sp: u64) -> Trace {
        let raw: Vec<u8> = saved(ip, 0x10, sp).iter().flat_map(|word| word.to_le_bytes()).collect();
        self.with_unwinder(|unwinder| unwinder.unwind(Start::Registers(&raw), &stacks()))
    }

    /// The same, when nothing is known of the stacks.
    fn unwind_anywhere(&self, ip: u64, sp: u64) -> Trace {
        let raw: Vec<u8> = saved(ip, 0x10, sp).iter().flat_map(|word| word.to_le_bytes()).collect();
        let start = Start::Registers(&raw);
        self.with_unwinder(|unwinder| unwinder.unwind(start, &Stacks::default()))
    }

    fn with_unwinder(&self, run: impl FnOnce(&dyn Unwinder) -> Trace) -> Trace {
        let info = format!(
            "SYMBOL(swapper_pg_dir)={:x}\nNUMBER(phys_base)={}\n",
            BASE + TABLES,
            -0x100_0000
        );
        with_unwinder(&self.memory, EM_X86_64, &(info + &symbol_lines(BASE)), run)
    }
}

fn saved(ip: u64, cs: u64, sp: u64) -> [u64; 21] {
    let mut words = [0; 21];
    (words[16], words[17], words[19]) = (ip, cs, sp);
    words
}

fn stacks() -> Stacks {
    let stack = |name: &str, start: u64| Stack {
        name: name.to_owned(),
        start: VirtAddr(start),
        end: VirtAddr(start + 0x1000),
    };
    Stacks::only(vec![stack("task", STACK), stack("IRQ", IRQ_STACK)])
}

#[test]
fn calls_are_followed_to_user_mode() {
    let mut world = World::new();
    world.put(STACK + 0x108, MIDDLE + 5); // inner: frame of 16
    world.put(STACK + 0x120, ENTRY + 5); // middle: frame of 24
    world.registers(STACK + 0x128, 0x47_b7a0, 0x33, 0x7fff_0000);
    let trace = world.unwind(INNER + 2, STACK + 0x100);
    assert_eq!(pcs(&trace), [INNER + 2, MIDDLE + 5, ENTRY + 5]);
    let End::UserMode(user) = &trace.end else { panic!("{:?}", trace.end) };
    assert!(user.user);
    assert_eq!((user.registers[0].name, user.registers[0].value), ("RIP", 0x47_b7a0));
    assert_eq!(trace.frames[1].at, VirtAddr(STACK + 0x108));
}

#[test]
fn stack_that_is_not_known_is_climbed_and_never_descended() {
    let mut world = World::new();
    world.put(STACK + 0x108, MIDDLE + 5);
    world.put(STACK + 0x120, ENTRY + 5);
    world.registers(STACK + 0x128, MIDDLE, 0x10, STACK + 0x200);
    world.put(STACK + 0x210, THREAD + 5);
    let whole = world.unwind_anywhere(INNER + 2, STACK + 0x100);
    assert_eq!(pcs(&whole), [INNER + 2, MIDDLE + 5, ENTRY + 5, MIDDLE, THREAD + 5]);
    world.registers(STACK + 0x128, MIDDLE, 0x10, STACK + 0x80);
    let torn = world.unwind_anywhere(INNER + 2, STACK + 0x100);
    assert_eq!(pcs(&torn), [INNER + 2, MIDDLE + 5, ENTRY + 5]);
}

#[test]
fn interrupted_function_is_a_frame_of_its_own_on_its_own_stack() {
    let mut world = World::new();
    world.put(IRQ_STACK + 0x108, ENTRY + 5);
    world.registers(IRQ_STACK + 0x110, MIDDLE, 0x10, STACK + 0x200);
    world.put(STACK + 0x210, THREAD + 5);
    let trace = world.unwind(INNER + 2, IRQ_STACK + 0x100);
    assert_eq!(pcs(&trace), [INNER + 2, ENTRY + 5, MIDDLE, THREAD + 5]);
    // Its address is the instruction itself: the rule of the function before must not be taken.
    assert_eq!(trace.frames[2].lookup_pc(), VirtAddr(MIDDLE));
    assert!(trace.frames[2].exception.is_some());
    assert_eq!(trace.end, End::KernelThread);
}

#[test]
fn return_address_after_the_last_instruction_belongs_to_the_caller() {
    let mut world = World::new();
    world.put(STACK + 0x108, ENTRY); // middle ends with the call: its return address is entry
    world.put(STACK + 0x120, THREAD + 5);
    let trace = world.unwind(INNER + 2, STACK + 0x100);
    assert_eq!(pcs(&trace), [INNER + 2, ENTRY, THREAD + 5]);
}

#[test]
fn caller_of_a_function_without_a_rule_is_found_by_its_call() {
    let mut world = World::new();
    let after_call = MIDDLE + 0x20;
    let displacement = (LEFT_OUT as i64 - after_call as i64) as i32;
    world.memory.put(after_call - 5 - BASE, &[0xe8]);
    world.memory.put(after_call - 4 - BASE, &displacement.to_le_bytes());
    world.put(STACK + 0x110, ENTRY + 5); // in the text, but it follows no call of left_out
    world.put(STACK + 0x140, after_call);
    world.put(STACK + 0x158, THREAD + 5);
    let trace = world.unwind(LEFT_OUT + 8, STACK + 0x100);
    assert_eq!(pcs(&trace), [LEFT_OUT + 8, after_call, THREAD + 5]);
    assert_eq!(trace.frames[0].caller, CallerBy::CallSite);
    assert_eq!(trace.end, End::KernelThread);
}

#[test]
fn function_without_a_rule_and_without_a_call_ends_the_trace_and_says_so() {
    let trace = World::new().unwind(LEFT_OUT + 8, STACK + 0x100);
    let End::Stuck(why) = &trace.end else { panic!("{:?}", trace.end) };
    assert!(why.contains("unwind tables say nothing"), "{why}");
}

#[test]
fn task_that_does_not_run_starts_from_what_it_saved() {
    let mut world = World::new();
    world.put(STACK + 0x130, INNER + 2); // return address above r15 r14 r13 r12 bx bp
    world.put(STACK + 0x140, THREAD + 5);
    let task = BASE + 0x5000;
    world.put(task + 32 + 24, STACK + 0x100);
    let start = Start::Task(VirtAddr(task));
    let trace = world.with_unwinder(|unwinder| unwinder.unwind(start, &stacks()));
    assert_eq!(pcs(&trace), [INNER + 2, THREAD + 5]);
    assert_eq!(trace.frames[0].kind, FrameKind::ReturnAddress);
}

#[test]
fn call_of_a_null_pointer_shows_who_called() {
    let mut world = World::new();
    world.put(STACK + 0x100, MIDDLE + 5);
    world.put(STACK + 0x118, THREAD + 5);
    let trace = world.unwind(0, STACK + 0x100);
    assert_eq!(pcs(&trace), [0, MIDDLE + 5, THREAD + 5]);
}

#[test]
fn stacks_that_lead_back_to_each_other_are_left_once() {
    let mut world = World::new();
    world.registers(IRQ_STACK + 0x100, ENTRY + 5, 0x10, STACK + 0x100);
    world.registers(STACK + 0x100, ENTRY + 5, 0x10, IRQ_STACK + 0x100);
    let trace = world.unwind(ENTRY + 5, IRQ_STACK + 0x100);
    let End::Stuck(why) = &trace.end else { panic!("{:?}", trace.end) };
    assert!(why.contains("already left"), "{why}");
}

#[test]
fn stack_pointer_outside_of_all_stacks_ends_the_trace() {
    let mut world = World::new();
    world.registers(STACK + 0x100, MIDDLE + 5, 0x10, BASE + 0xf00);
    let trace = world.unwind(ENTRY + 5, STACK + 0x100);
    let End::Stuck(why) = &trace.end else { panic!("{:?}", trace.end) };
    assert!(why.contains("no stack of this CPU"), "{why}");
    assert_eq!(trace.frames.len(), 1);
}

proptest::proptest! {
    #[test]
    fn damaged_stacks_never_panic_and_always_end(
        words in proptest::collection::vec((0u64..0x400, 0usize..8, proptest::num::u64::ANY), 64),
    ) {
        let mut world = World::new();
        let likely = [INNER + 2, MIDDLE + 5, ENTRY + 5, ENTRY, LEFT_OUT + 1, STACK, IRQ_STACK, 0];
        for (at, which, value) in words {
            let value = if value % 3 == 0 { value } else { likely[which] + value % 0x400 / 8 * 8 };
            world.put(STACK + at / 2 * 8, value);
            world.put(IRQ_STACK + at / 2 * 8, value);
        }
        let trace = world.unwind(ENTRY + 5, STACK + 8);
        proptest::prop_assert!(trace.frames.len() <= MAX_FRAMES);
    }
}
