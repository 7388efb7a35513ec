//! Exceptions: those at reads of old memory become "unreadable", all others lead to [`crate::rescue`].

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use drivers::mmio::{Access, Width};

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
    static device_begin: u8;
    static device_end: u8;
    static device_failed: u8;
    fn load_byte(from: *const u8) -> u32;
    fn load_half(from: *const u8) -> u32;
    fn load_word(from: *const u8) -> u32;
    fn store_byte(to: *mut u8, value: u32);
    fn store_half(to: *mut u8, value: u32);
    fn store_word(to: *mut u8, value: u32);
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

/// ESR_EL1.WnR of a data abort: it was a write.
const WRITE: u64 = 1 << 6;

/// Catches every exception from now on: vector table and stack are in place since the first
/// instructions, and now SErrors are let through. To be called once, with caches on.
pub fn init() {
    // SAFETY: the handler is in place. An SError that has been pending since before the panic is let
    // pass.
    unsafe { asm!("msr daifclr, #4", "isb", options(nostack, preserves_flags)) };
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

/// The way to device registers. One that the bus refuses, because its device is switched off or
/// absent, reads as all ones.
pub static DEVICE_ACCESS: Access = Access {
    load: |at, width| {
        // SAFETY: the caller's promise, and an abort is caught by `handle`.
        unsafe {
            match width {
                Width::Byte => load_byte(at),
                Width::Half => load_half(at),
                Width::Word => load_word(at),
            }
        }
    },
    store: |at, width, value| {
        // SAFETY: likewise.
        unsafe {
            match width {
                Width::Byte => store_byte(at, value),
                Width::Half => store_half(at, value),
                Width::Word => store_word(at, value),
            }
        }
    },
};

extern "C" fn handle(frame: &mut Frame) {
    static SERRORS: AtomicU32 = AtomicU32::new(0);

    let is_data_abort = frame.esr >> 26 == DATA_ABORT;
    let copying = frame.is_between(&raw const copy_old_begin, &raw const copy_old_end);
    let at_device = frame.is_between(&raw const device_begin, &raw const device_end);
    match frame.entry {
        // A copy writes to our own memory: only its reads may fail.
        entry::SYNCHRONOUS if is_data_abort && copying && frame.esr & WRITE == 0 => {
            frame.elr = &raw const copy_old_failed as u64;
        }
        entry::SYNCHRONOUS if is_data_abort && at_device => {
            frame.elr = &raw const device_failed as u64;
        }
        // Of old memory being read, or of something that the dead kernel began: it may be weeks
        // old, and nothing of ours is lost that could be named.
        entry::SERROR if SERRORS.load(Ordering::Relaxed) < MAX_SERRORS => {
            SERRORS.store(SERRORS.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            if copying {
                frame.elr = &raw const copy_old_failed as u64;
            }
        }
        _ => give_up(frame),
    }
}

impl Frame {
    /// Whether the exception came at one of the instructions from `begin` to `end`.
    fn is_between(&self, begin: *const u8, end: *const u8) -> bool {
        (begin as u64..end as u64).contains(&self.elr)
    }
}

fn give_up(frame: &Frame) -> ! {
    static GIVING_UP: AtomicBool = AtomicBool::new(false);

    // There is one processor; an exclusive access would need caches, which may not be on yet.
    if frame.entry >= entry::FROM_HANDLER || GIVING_UP.load(Ordering::Relaxed) {
        // An exception on the way out: nothing can be trusted any more.
        reset::at_once();
    }
    GIVING_UP.store(true, Ordering::Relaxed);
    // SAFETY: what was interrupted does not go on.
    unsafe { crate::console::take_from_abandoned() };
    let Frame { x, sp, elr, spsr, esr, far, entry } = *frame;
    let base = crate::image::range().start;
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
    if crate::rescue::leads_on() {
        GIVING_UP.store(false, Ordering::Relaxed);
    }
    crate::rescue::after_failure()
}
