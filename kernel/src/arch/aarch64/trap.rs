//! Exceptions: those at reads of old memory become "unreadable", all others end in the reboot path.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::reset;
use crate::stack::Stack;

/// Size of the stack of exceptions in bytes.
const STACK_SIZE: usize = 8 * 1024;

/// SErrors after which the payload gives up: one that comes again and again would let nothing else
/// run.
const MAX_SERRORS: u32 = 100_000;

/// The stack of exceptions, which the processor changes to by itself.
pub(super) static STACK: Stack<STACK_SIZE> = Stack::new();

unsafe extern "C" {
    /// The vector table.
    pub(super) static trap_vectors: u8;
    static copy_old_begin: u8;
    static copy_old_end: u8;
    static copy_old_failed: u8;
    #[link_name = "copy_old"]
    fn copy_old_asm(to: *mut u8, from: *const u8, size: usize) -> u64;
    fn copy_word(to: *mut u32, from: *const u32) -> u64;
}

/// Registers as `trap.s` leaves them on the stack; behind them lie the 32 vector registers.
#[derive(Clone, Copy)]
#[repr(C)]
struct Frame {
    x: [u64; 31],
    /// The stack of the interrupted code, if it was not an exception's.
    sp: u64,
    elr: u64,
    spsr: u64,
    esr: u64,
    far: u64,
    /// Which of the sixteen entries of the vector table.
    entry: u64,
}

/// Bytes on the stack: [`Frame`] and the vector registers.
const FRAME_SIZE: usize = 304 + 32 * 16;

const _: () = assert!(size_of::<Frame>() <= 304);

global_asm!(include_str!("trap.s"), handler = sym handle, frame_size = const FRAME_SIZE);

/// What the entries of the vector table are for, with the payload's code on the stack of EL0.
mod entry {
    pub const SYNCHRONOUS: u64 = 0;
    pub const SERROR: u64 = 3;
    /// From here on: exceptions of the handler itself.
    pub const FROM_HANDLER: u64 = 4;
}

/// Exception class of a data abort at this exception level (ESR_EL1.EC; DDI 0487, D17.2.37).
const DATA_ABORT: u64 = 0x25;

/// Catches every exception from now on: the vector table is in force since the first instructions;
/// now the handler gets its stack, and SErrors are let through. To be called once.
pub fn init() {
    // SAFETY: the payload itself runs on the stack pointer of EL0. With the handler in place, an
    // SError that has been pending since before the panic is let pass.
    unsafe {
        asm!(
            "msr spsel, #1", "mov sp, {}", "msr spsel, #0", "msr daifclr, #4", "isb",
            in(reg) STACK.top(),
            options(nostack, preserves_flags),
        );
    }
}

/// Copies `into.len()` bytes at `from`, an address in the window of old memory. Returns whether no
/// exception happened; otherwise `into` holds anything.
///
/// # Safety
/// `from` must be mapped for that many bytes, or not mapped at all.
pub unsafe fn copy_old(into: &mut [u8], from: *const u8) -> bool {
    // SAFETY: the destination is `into`; the source is the caller's promise, and an abort there is
    // caught by `handle`.
    unsafe { copy_old_asm(into.as_mut_ptr(), from, into.len()) == 0 }
}

/// Reads a device register that may be kept from us. `None` when that was an exception.
///
/// # Safety
/// `from` must be mapped as device memory, and aligned.
pub(super) unsafe fn read_register(from: *const u32) -> Option<u32> {
    let mut value = 0;
    // SAFETY: the destination is ours; the source is the caller's promise, and an abort there is
    // caught by `handle`.
    (unsafe { copy_word(&mut value, from) } == 0).then_some(value)
}

extern "C" fn handle(frame: &mut Frame) {
    static SERRORS: AtomicU32 = AtomicU32::new(0);

    let failed_copy = is_copying(frame);
    match frame.entry {
        entry::SYNCHRONOUS if failed_copy && frame.esr >> 26 == DATA_ABORT => {}
        // Of old memory being read, or of something that the dead kernel began: it may be weeks
        // old, and nothing of ours is lost that could be named.
        entry::SERROR if SERRORS.fetch_add(1, Ordering::Relaxed) < MAX_SERRORS => {}
        _ => give_up(frame),
    }
    if failed_copy {
        frame.elr = &raw const copy_old_failed as u64;
    }
}

/// Whether the exception came at one of the instructions that copy old memory.
fn is_copying(frame: &Frame) -> bool {
    let begin = &raw const copy_old_begin as u64;
    let end = &raw const copy_old_end as u64;
    (begin..end).contains(&frame.elr)
}

fn give_up(frame: &Frame) -> ! {
    static GIVING_UP: AtomicBool = AtomicBool::new(false);

    if GIVING_UP.swap(true, Ordering::Relaxed) || frame.entry >= entry::FROM_HANDLER {
        // An exception on the way out: nothing can be trusted any more.
        reset::at_once();
    }
    let Frame { x, sp, elr, spsr, esr, far, entry } = *frame;
    let base = &raw const super::entry::__image_start as u64;
    crate::say!("exception {entry} in the payload, ESR {esr:#x}");
    crate::say!("PC {elr:#018x} (image {:+#x})  PSTATE {spsr:#x}", elr.wrapping_sub(base));
    crate::say!("SP {sp:#018x}  FAR {far:#018x}");
    for (first, four) in x.chunks(4).enumerate().map(|(row, four)| (row * 4, four)) {
        let value = |index: usize| four.get(index).copied().unwrap_or(0);
        crate::say!(
            "X{first:<2} {:016x} {:016x} {:016x} {:016x}",
            value(0),
            value(1),
            value(2),
            value(3)
        );
    }
    crate::finish_after_failure()
}
