//! arm64 stacks in a kernel made of a few pages.
//!
//! The kernel's image is 64 KiB at [`BASE`], 48 bits of address, pages of 4 KiB. Its functions have
//! real prologues where that matters, for the unwinder reads them.

use super::*;
use crate::linux::stacks::Stack;

const BASE: u64 = 0xffff_8000_0801_0000;
const TABLES: u64 = 0xc000;
const BTF: u64 = 0x4000;

const INNER: u64 = BASE + 0x100;
const MIDDLE: u64 = BASE + 0x200;
const ENTRY: u64 = BASE + 0x300;
const THREAD: u64 = BASE + 0x400;
const LEAF: u64 = BASE + 0x500;
const FRAMED: u64 = BASE + 0x600;
const UNCLEAR: u64 = BASE + 0x700;

const SYMBOLS: [(u64, &str); 11] = [
    (BASE, "T_text"),
    (INNER, "tinner"),
    (MIDDLE, "tmiddle"),
    (ENTRY, "tel1h_64_irq"),
    (THREAD, "tret_from_fork"),
    (LEAF, "tleaf"),
    (FRAMED, "tframed"),
    (UNCLEAR, "tunclear"),
    (BASE + BTF, "D__start_BTF"),
    (BASE + BTF + 0x800, "D__stop_BTF"),
    (BASE + 0x10000, "D_end"),
];

const TASK_STACK: u64 = BASE + 0x8000;
const IRQ_STACK: u64 = BASE + 0xa000;
const OVERFLOW_STACK: u64 = BASE + 0xb000;

const KERNEL_MODE: u64 = 0x6040_0005;
/// Offset of the record in struct pt_regs, and the size of that structure.
const RECORD: u64 = 304;
const PT_REGS: u64 = 336;

/// Every address bit above the 48 that are translated may hold a signature.
const MASK: u64 = 0xffff << 48;

struct World {
    memory: FakeMemory,
    signs: bool,
}

impl World {
    fn new() -> World {
        World::with_record_kind(false)
    }

    /// With `kinds`, records in struct pt_regs say what they are (6.13 on).
    fn with_record_kind(kinds: bool) -> World {
        let mut memory = FakeMemory::new(0x10000);
        put_symbols(&mut memory, BASE, &SYMBOLS);
        let slot = |level: u32| (BASE >> (12 + 9 * level)) % 512 * 8;
        memory.put_u64(TABLES + slot(3), (TABLES + 0x1000) | 3);
        memory.put_u64(TABLES + 0x1000 + slot(2), (TABLES + 0x2000) | 3);
        memory.put_u64(TABLES + 0x2000 + slot(1), (TABLES + 0x3000) | 3);
        for page in 0..16 {
            memory.put_u64(TABLES + 0x3000 + slot(0) + page * 8, page << 12 | 3);
        }
        let record: &[_] =
            if kinds { &[("record", 0, None), ("type", 16, None)] } else { &[("record", 0, None)] };
        let registers =
            [("orig_x0", 272, None), ("syscallno", 280, None), ("stackframe", 304, Some("meta"))];
        let types = [
            ("meta", 24, record),
            ("pt_regs", 336, &registers),
            ("cpu_context", 104, &[("fp", 80, None), ("sp", 88, None), ("pc", 96, None)]),
            ("thread_struct", 104, &[("cpu_context", 0, Some("cpu_context"))]),
            ("task_struct", 256, &[("thread", 128, Some("thread_struct"))]),
        ];
        memory.put(BTF, &btf(&types));
        let mut world = World { memory, signs: false };
        world.code(LEAF, &[0xd503_201f; 8]);
        // paciasp; stp x29, x30, [sp, #-32]!; mov x29, sp; nop...; ldp x29, x30, [sp], #32; ret
        let framed = [0xd503_233f, 0xa9be_7bfd, 0x9100_03fd, 0xd503_201f, 0xa8c2_7bfd, 0xd65f_03c0];
        world.code(FRAMED, &framed);
        // cbz x0, +2; mov x29, sp; nop
        world.code(UNCLEAR, &[0xb400_0040, 0x9100_03fd, 0xd503_201f, 0xd65f_03c0]);
        world
    }

    fn code(&mut self, at: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.put(at - BASE, &bytes);
    }

    fn put(&mut self, virt: u64, value: u64) {
        self.memory.put_u64(virt - BASE, value);
    }

    fn record(&mut self, at: u64, next: u64, lr: u64) {
        self.put(at, next);
        self.put(at + 8, lr);
    }

    /// struct pt_regs at `at`, with the record that the entry code makes when the kernel itself was
    /// interrupted.
    fn exception(&mut self, at: u64, registers: &[u64; 34]) {
        for (index, &word) in registers.iter().enumerate() {
            self.put(at + index as u64 * 8, word);
        }
        self.record(at + RECORD, registers[29], registers[32]);
    }

    /// struct pt_regs at the end of the task's stack, by which user mode entered; returns its record.
    fn entered(&mut self) -> u64 {
        let at = TASK_STACK + 0x1000 - PT_REGS;
        self.exception(at, &registers(0x40_1000, 0x40_2000, 0x7fff_0000, 0x1234));
        self.put(at + 33 * 8, 0x1000);
        self.put(at + 272, 7);
        self.put(at + 280, 64);
        self.record(at + RECORD, 0, 0);
        at + RECORD
    }

    fn unwind(&self, registers: &[u64; 34]) -> Trace {
        let raw: Vec<u8> = registers.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.from(Start::Registers(&raw))
    }

    fn from(&self, start: Start<'_>) -> Trace {
        let info = format!(
            "SYMBOL(swapper_pg_dir)={:x}\nPAGESIZE=4096\nNUMBER(VA_BITS)=48\n\
             NUMBER(kimage_voffset)={BASE:#x}\nNUMBER(TCR_EL1_T1SZ)=0x10\n\
             NUMBER(KERNELPACMASK)={:#x}\n",
            BASE + TABLES,
            if self.signs { MASK } else { 0 },
        );
        let info = info + &symbol_lines(BASE);
        with_unwinder(&self.memory, EM_AARCH64, &info, |unwinder| unwinder.unwind(start, &stacks()))
    }
}

/// Registers of the kernel: pc, lr, sp, x29.
fn registers(pc: u64, lr: u64, sp: u64, fp: u64) -> [u64; 34] {
    let mut words = [0; 34];
    (words[29], words[30], words[31], words[32], words[33]) = (fp, lr, sp, pc, KERNEL_MODE);
    words
}

fn stacks() -> Stacks {
    let stack = |name: &str, start: u64| Stack {
        name: name.to_owned(),
        start: VirtAddr(start),
        end: VirtAddr(start + 0x1000),
    };
    Stacks::only(vec![
        stack("task", TASK_STACK),
        stack("IRQ", IRQ_STACK),
        stack("overflow", OVERFLOW_STACK),
    ])
}

/// A CPU that stopped in `framed`, whose own record is at `fp`.
fn in_framed(fp: u64) -> [u64; 34] {
    registers(FRAMED + 12, 0, fp, fp)
}

#[test]
fn records_are_followed_to_user_mode() {
    let mut world = World::new();
    let last = world.entered();
    world.record(TASK_STACK + 0x100, TASK_STACK + 0x140, MIDDLE + 8);
    world.record(TASK_STACK + 0x140, last, INNER + 8);
    let trace = world.unwind(&in_framed(TASK_STACK + 0x100));
    assert_eq!(pcs(&trace), [FRAMED + 12, MIDDLE + 8, INNER + 8]);
    assert_eq!(trace.frames[1].at, VirtAddr(TASK_STACK + 0x108));
    let End::UserMode(user) = &trace.end else { panic!("{:?}", trace.end) };
    assert!(user.user);
    let value = |name: &str| user.registers.iter().find(|it| it.name == name).unwrap().value;
    assert_eq!((value("PC"), value("SP"), value("LR")), (0x40_1000, 0x7fff_0000, 0x40_2000));
    assert_eq!((value("ORIG_X0"), value("SYSCALLNO"), value("PSTATE")), (7, 64, 0x1000));
}

#[test]
fn kernel_thread_ends_where_no_one_entered() {
    let mut world = World::new();
    let last = TASK_STACK + 0x1000 - PT_REGS + RECORD;
    world.record(TASK_STACK + 0x100, last, THREAD + 8);
    let trace = world.unwind(&in_framed(TASK_STACK + 0x100));
    assert_eq!((pcs(&trace).len(), trace.end), (2, End::KernelThread));
}

#[test]
fn signatures_are_taken_off_return_addresses() {
    let mut world = World::new();
    let last = world.entered();
    world.record(TASK_STACK + 0x100, last, (MIDDLE + 8) & !MASK | 0x5a85 << 48);
    let start = in_framed(TASK_STACK + 0x100);
    // A kernel that does not sign says so: then the address is what it is, and no function.
    assert!(why(&world.unwind(&start)).contains("not an address of the kernel's text"));
    world.signs = true;
    assert_eq!(pcs(&world.unwind(&start)), [FRAMED + 12, MIDDLE + 8]);
}

#[test]
fn interrupted_function_follows_with_its_registers_on_its_own_stack() {
    let mut world = World::new();
    let last = world.entered();
    let exception = TASK_STACK + 0x200;
    world.exception(exception, &in_framed(exception + PT_REGS));
    world.record(exception + PT_REGS, last, INNER + 8);
    world.record(IRQ_STACK + 0x100, IRQ_STACK + 0x200, MIDDLE + 8);
    world.record(IRQ_STACK + 0x200, exception + RECORD, ENTRY + 8);
    let trace = world.unwind(&in_framed(IRQ_STACK + 0x100));
    let expected = [FRAMED + 12, MIDDLE + 8, ENTRY + 8, FRAMED + 12, INNER + 8];
    assert_eq!(pcs(&trace), expected);
    let interrupted = &trace.frames[3];
    assert_eq!(interrupted.lookup_pc(), VirtAddr(FRAMED + 12));
    assert_eq!(interrupted.caller, CallerBy::Tables);
    let saved = interrupted.exception.as_ref().unwrap();
    assert_eq!((saved.at, saved.user, saved.registers[0].name), (VirtAddr(exception), false, "PC"));
}

#[test]
fn caller_of_an_interrupted_leaf_is_in_its_link_register() {
    let mut world = World::new();
    let last = world.entered();
    // x29 is still that of `middle`, which called the leaf.
    world.exception(
        TASK_STACK + 0x100,
        &registers(LEAF + 8, MIDDLE + 8, TASK_STACK + 0x250, TASK_STACK + 0x260),
    );
    world.record(TASK_STACK + 0x260, last, INNER + 8);
    world.record(IRQ_STACK + 0x100, TASK_STACK + 0x100 + RECORD, ENTRY + 8);
    let trace = world.unwind(&in_framed(IRQ_STACK + 0x100));
    assert_eq!(pcs(&trace), [FRAMED + 12, ENTRY + 8, LEAF + 8, MIDDLE + 8, INNER + 8]);
    assert_eq!(trace.frames[2].caller, CallerBy::LinkRegister);
    assert_eq!(trace.frames[3].kind, FrameKind::ReturnAddress);
}

#[test]
fn function_interrupted_before_its_frame_is_treated_as_a_leaf() {
    let mut world = World::new();
    let last = world.entered();
    world.record(TASK_STACK + 0x260, last, INNER + 8);
    for (instruction, whole) in [(0, 3), (1, 3), (2, 3), (3, 2), (4, 2), (5, 3)] {
        let pc = FRAMED + instruction * 4;
        let trace =
            world.unwind(&registers(pc, MIDDLE + 8, TASK_STACK + 0x240, TASK_STACK + 0x260));
        assert_eq!(pcs(&trace).len(), whole, "at instruction {instruction}");
        assert_eq!(pcs(&trace).last(), Some(&(INNER + 8)));
    }
}

#[test]
fn where_the_code_does_not_tell_the_call_before_the_link_register_does() {
    let mut world = World::new();
    let last = world.entered();
    world.record(TASK_STACK + 0x260, last, INNER + 8);
    let start = registers(UNCLEAR + 8, MIDDLE + 8, TASK_STACK + 0x240, TASK_STACK + 0x260);
    let trace = world.unwind(&start);
    assert_eq!(pcs(&trace), [UNCLEAR + 8, INNER + 8]);
    assert_eq!(trace.frames[0].caller, CallerBy::Uncertain);
    world.code(MIDDLE + 4, &[0x9400_0000 | ((UNCLEAR - (MIDDLE + 4)) / 4) as u32]);
    let trace = world.unwind(&start);
    assert_eq!(pcs(&trace), [UNCLEAR + 8, MIDDLE + 8, INNER + 8]);
    assert_eq!(trace.frames[0].caller, CallerBy::LinkRegister);
}

#[test]
fn record_with_the_link_registers_address_is_the_functions_own() {
    let mut world = World::new();
    let last = world.entered();
    world.code(MIDDLE + 4, &[0x9400_0000 | ((UNCLEAR - (MIDDLE + 4)) / 4) as u32]);
    // `unclear` has made its record and called nothing yet.
    world.record(TASK_STACK + 0x240, TASK_STACK + 0x260, MIDDLE + 8);
    world.record(TASK_STACK + 0x260, last, INNER + 8);
    let trace =
        world.unwind(&registers(UNCLEAR + 8, MIDDLE + 8, TASK_STACK + 0x240, TASK_STACK + 0x240));
    assert_eq!(pcs(&trace), [UNCLEAR + 8, MIDDLE + 8, INNER + 8]);
    assert_eq!(trace.frames[0].caller, CallerBy::Tables);
}

#[test]
fn function_that_calls_itself_may_have_lost_a_frame_and_says_so() {
    let mut world = World::new();
    let last = world.entered();
    // bl unclear, in `unclear` itself
    world.code(UNCLEAR + 16, &[0x97ff_fffc]);
    world.record(TASK_STACK + 0x260, last, INNER + 8);
    let trace =
        world.unwind(&registers(UNCLEAR + 8, UNCLEAR + 20, TASK_STACK + 0x240, TASK_STACK + 0x260));
    assert_eq!(pcs(&trace), [UNCLEAR + 8, INNER + 8]);
    assert_eq!(trace.frames[0].caller, CallerBy::Uncertain);
}

#[test]
fn call_of_a_null_pointer_shows_who_called() {
    let mut world = World::new();
    let last = world.entered();
    world.code(MIDDLE + 4, &[0xd63f_0020]); // blr x1
    world.record(TASK_STACK + 0x260, last, INNER + 8);
    let trace = world.unwind(&registers(0, MIDDLE + 8, TASK_STACK + 0x240, TASK_STACK + 0x260));
    assert_eq!(pcs(&trace), [0, MIDDLE + 8, INNER + 8]);
}

#[test]
fn overflown_stack_is_found_behind_the_overflow_stack() {
    let mut world = World::new();
    let last = world.entered();
    // The stack pointer ran out of the stack; the records did not.
    let exception = OVERFLOW_STACK + 0x200;
    world.exception(exception, &registers(FRAMED + 12, 0, TASK_STACK - 0x40, TASK_STACK + 0x20));
    world.record(TASK_STACK + 0x20, TASK_STACK + 0x80, MIDDLE + 8);
    world.record(TASK_STACK + 0x80, last, MIDDLE + 8);
    world.record(OVERFLOW_STACK + 0x100, exception + RECORD, ENTRY + 8);
    let trace = world.unwind(&in_framed(OVERFLOW_STACK + 0x100));
    let expected = [FRAMED + 12, ENTRY + 8, FRAMED + 12, MIDDLE + 8, MIDDLE + 8];
    assert_eq!(pcs(&trace), expected);
    assert!(matches!(trace.end, End::UserMode(_)));
}

#[test]
fn newer_kernels_say_which_records_are_exceptions() {
    let mut world = World::with_record_kind(true);
    let last = world.entered();
    world.put(last + 16, 1);
    let exception = TASK_STACK + 0x200;
    world.exception(exception, &in_framed(exception + PT_REGS));
    world.record(exception + RECORD, 0, 0);
    world.put(exception + RECORD + 16, 2);
    world.record(exception + PT_REGS, last, INNER + 8);
    world.record(IRQ_STACK + 0x100, exception + RECORD, ENTRY + 8);
    let start = in_framed(IRQ_STACK + 0x100);
    let trace = world.unwind(&start);
    assert_eq!(pcs(&trace), [FRAMED + 12, ENTRY + 8, FRAMED + 12, INNER + 8]);
    assert!(matches!(trace.end, End::UserMode(_)));
    world.put(exception + RECORD + 16, 9);
    assert!(why(&world.unwind(&start)).contains("unknown kind 9"));
}

#[test]
fn task_that_does_not_run_starts_from_what_it_saved() {
    let mut world = World::new();
    let last = world.entered();
    let task = BASE + 0x6000;
    world.put(task + 128 + 80, TASK_STACK + 0x100);
    world.put(task + 128 + 88, TASK_STACK + 0x100);
    world.put(task + 128 + 96, MIDDLE + 8);
    world.record(TASK_STACK + 0x100, last, INNER + 8);
    let trace = world.from(Start::Task(VirtAddr(task)));
    assert_eq!(pcs(&trace), [MIDDLE + 8, INNER + 8]);
    assert_eq!(trace.frames[0].kind, FrameKind::ReturnAddress);
    // One that never ran is at the start of ret_from_fork, with no frames above.
    world.put(task + 128 + 96, THREAD);
    world.put(task + 128 + 80, last);
    let trace = world.from(Start::Task(VirtAddr(task)));
    assert_eq!((pcs(&trace), trace.frames[0].kind), (vec![THREAD], FrameKind::Registers));
}

#[test]
fn cpu_that_was_in_user_mode_has_no_frames_of_the_kernel() {
    let mut user = registers(0x40_1000, 0, 0x7fff_0000, 0);
    user[33] = 0;
    let trace = World::new().unwind(&user);
    assert!(trace.frames.is_empty() && matches!(trace.end, End::UserMode(_)));
}

#[test]
fn records_that_lead_back_end_the_trace() {
    let mut world = World::new();
    world.record(TASK_STACK + 0x100, TASK_STACK + 0x140, MIDDLE + 8);
    world.record(TASK_STACK + 0x140, TASK_STACK + 0x100, MIDDLE + 8);
    let trace = world.unwind(&in_framed(TASK_STACK + 0x100));
    assert!(why(&trace).contains("would not be further up"), "{trace:?}");
    world.record(TASK_STACK + 0x140, TASK_STACK + 0x140, MIDDLE + 8);
    assert!(why(&world.unwind(&in_framed(TASK_STACK + 0x100))).contains("further up"));
}

#[test]
fn stacks_that_lead_back_to_each_other_are_left_once() {
    let mut world = World::new();
    world.record(IRQ_STACK + 0x100, TASK_STACK + 0x100, MIDDLE + 8);
    world.record(TASK_STACK + 0x100, IRQ_STACK + 0x200, MIDDLE + 8);
    world.record(IRQ_STACK + 0x200, TASK_STACK + 0x200, MIDDLE + 8);
    let trace = world.unwind(&in_framed(IRQ_STACK + 0x100));
    assert!(why(&trace).contains("already left"), "{trace:?}");
}

#[test]
fn record_outside_of_all_stacks_or_askew_ends_the_trace() {
    let mut world = World::new();
    world.record(TASK_STACK + 0x100, BASE + 0xf00, MIDDLE + 8);
    world.record(BASE + 0xf00, 0, MIDDLE + 8);
    let trace = world.unwind(&in_framed(TASK_STACK + 0x100));
    assert!(why(&trace).contains("no stack of this CPU"), "{trace:?}");
    let trace = world.unwind(&in_framed(TASK_STACK + 0x104));
    assert!(why(&trace).contains("not aligned"), "{trace:?}");
}

proptest::proptest! {
    #[test]
    fn damaged_stacks_never_panic_and_always_end(
        words in proptest::collection::vec((0u64..0x400, 0usize..8, proptest::num::u64::ANY), 64),
    ) {
        let mut world = World::new();
        let likely = [LEAF, MIDDLE, ENTRY, UNCLEAR, FRAMED, TASK_STACK, IRQ_STACK, 0];
        for (at, which, value) in words {
            let value = if value % 3 == 0 { value } else { likely[which] + value % 0x400 / 8 * 8 };
            world.put(TASK_STACK + at / 2 * 8, value);
            world.put(IRQ_STACK + at / 2 * 8, value);
        }
        let trace = world.unwind(&in_framed(IRQ_STACK + 8));
        proptest::prop_assert!(trace.frames.len() <= MAX_FRAMES);
    }
}
