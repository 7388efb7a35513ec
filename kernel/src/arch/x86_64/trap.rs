//! Exceptions: those at reads of old memory become "unreadable", all others lead to [`crate::rescue`].

use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, Ordering};

pub use drivers::mmio::PLAIN as DEVICE_ACCESS;
use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::control::{Cr2, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::idt::InterruptDescriptorTable;
use x86_64::structures::tss::TaskStateSegment;

use super::reset;
use crate::stack::Stack;

const PAGE_FAULT: u64 = 14;
const NMI: u64 = 2;
const MACHINE_CHECK: u64 = 18;

/// Size of the stack for each kind of exception.
const STACK_SIZE: usize = 8 * 1024;

/// Number of kinds, those of [`TrapStack`].
const STACK_COUNT: usize = 4;

/// Stacks of exceptions: one each for the three that can come in the middle of another one, and
/// one for all others.
#[derive(Clone, Copy)]
#[repr(u16)]
enum TrapStack {
    Exception = 0,
    Nmi = 1,
    DoubleFault = 2,
    MachineCheck = 3,
}

pub(super) static STACKS: [Stack<STACK_SIZE>; STACK_COUNT] = [const { Stack::new() }; STACK_COUNT];
static TSS: Once<TaskStateSegment> = Once::new();
static GDT: Once<GlobalDescriptorTable> = Once::new();
static IDT: Once<InterruptDescriptorTable> = Once::new();

unsafe extern "C" {
    static trap_stubs: u8;
    static copy_old_begin: u8;
    static copy_old_end: u8;
    static copy_old_failed: u8;
    #[link_name = "copy_old"]
    fn copy_old_asm(to: *mut u8, from: *const u8, size: usize) -> u32;
}

global_asm!(include_str!("trap.s"), handler = sym handle);

/// The stack as `trap.s` leaves it: registers, vector, error code, and what the CPU pushed.
#[derive(Clone, Copy)]
#[repr(C)]
struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rcx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Catches every exception from now on. To be called once, before anything can go wrong.
pub fn init() {
    let tss = TSS.call_once(|| {
        let mut tss = TaskStateSegment::new();
        let mut tops = [VirtAddr::zero(); 7];
        for (top, stack) in tops.iter_mut().zip(&STACKS) {
            *top = VirtAddr::from_ptr(stack) + size_of_val(stack) as u64;
        }
        tss.interrupt_stack_table = tops;
        tss
    });
    let mut selectors = None;
    let gdt = GDT.call_once(|| {
        let mut gdt = GlobalDescriptorTable::new();
        let code = gdt.append(Descriptor::kernel_code_segment());
        let data = gdt.append(Descriptor::kernel_data_segment());
        let task = gdt.append(Descriptor::tss_segment(tss));
        selectors = Some((code, data, task));
        gdt
    });
    gdt.load();
    if let Some((code, data, task)) = selectors {
        // SAFETY: the selectors are of the table just loaded, flat code and data and the TSS.
        unsafe {
            CS::set_reg(code);
            SS::set_reg(data);
            DS::set_reg(data);
            ES::set_reg(data);
            load_tss(task);
        }
    }
    IDT.call_once(interrupt_table).load();
    // SAFETY: with the handler in place a machine check becomes an exception instead of a shutdown.
    unsafe { Cr4::update(|flags| flags.insert(Cr4Flags::MACHINE_CHECK_EXCEPTION)) };
}

fn interrupt_table() -> InterruptDescriptorTable {
    use TrapStack::{DoubleFault, Exception, MachineCheck, Nmi};

    let mut idt = InterruptDescriptorTable::new();
    macro_rules! set {
        ($($name:ident $vector:literal $stack:expr;)*) => {$(
            let stub = VirtAddr::from_ptr(&raw const trap_stubs) + 16u64 * $vector;
            // SAFETY: the stub for this vector, whose stack the TSS holds.
            unsafe { idt.$name.set_handler_addr(stub).set_stack_index($stack as u16) };
        )*};
    }
    set! {
        divide_error 0 Exception;
        debug 1 Exception;
        non_maskable_interrupt 2 Nmi;
        breakpoint 3 Exception;
        overflow 4 Exception;
        bound_range_exceeded 5 Exception;
        invalid_opcode 6 Exception;
        device_not_available 7 Exception;
        double_fault 8 DoubleFault;
        invalid_tss 10 Exception;
        segment_not_present 11 Exception;
        stack_segment_fault 12 Exception;
        general_protection_fault 13 Exception;
        page_fault 14 Exception;
        x87_floating_point 16 Exception;
        alignment_check 17 Exception;
        machine_check 18 MachineCheck;
        simd_floating_point 19 Exception;
        virtualization 20 Exception;
        cp_protection_exception 21 Exception;
        hv_injection_exception 28 Exception;
        vmm_communication_exception 29 Exception;
        security_exception 30 Exception;
    }
    idt
}

/// Copies `into.len()` bytes at `from`, an address in the window of old memory. Returns whether no
/// exception happened; otherwise `into` holds anything.
///
/// # Safety
/// `from` must be mapped for that many bytes, or not mapped at all.
pub unsafe fn copy_old(into: &mut [u8], from: *const u8) -> bool {
    // SAFETY: the destination is `into`; the source is the caller's promise, and a fault there is
    // caught by `handle`.
    unsafe { copy_old_asm(into.as_mut_ptr(), from, into.len()) == 0 }
}

extern "C" fn handle(frame: &mut Frame) {
    if frame.vector == NMI {
        // The dead kernel's watchdog, or somebody's button: the dump goes on.
        return;
    }
    if frame.vector == MACHINE_CHECK && acknowledge_machine_check() && !is_copying(frame) {
        // Broadcast from elsewhere, or found by a scrubber: nothing of ours is lost.
        return;
    }
    let expected = matches!(frame.vector, 12 | 13 | PAGE_FAULT | MACHINE_CHECK);
    if expected && is_copying(frame) {
        frame.rip = &raw const copy_old_failed as u64;
        return;
    }
    give_up(frame)
}

/// Whether the exception came at one of the instructions that copy old memory.
fn is_copying(frame: &Frame) -> bool {
    let begin = &raw const copy_old_begin as u64;
    let end = &raw const copy_old_end as u64;
    (begin..end).contains(&frame.rip)
}

/// Clears MCG_STATUS, so that the next machine check is an exception again and not a shutdown.
/// Returns whether the interrupted code can go on (its bit RIPV; Intel SDM 3B, 16.3.1.2).
fn acknowledge_machine_check() -> bool {
    const MCG_STATUS: u32 = 0x17a;
    const RESTART_IP_VALID: u64 = 1;
    let mut status = Msr::new(MCG_STATUS);
    // SAFETY: a machine check just happened, so the register exists.
    unsafe {
        let can_go_on = status.read() & RESTART_IP_VALID != 0;
        status.write(0);
        can_go_on
    }
}

fn give_up(frame: &Frame) -> ! {
    static GIVING_UP: AtomicBool = AtomicBool::new(false);

    if GIVING_UP.swap(true, Ordering::Relaxed) {
        // A fault on the way out: nothing can be trusted any more.
        reset::triple_fault();
    }
    // SAFETY: what was interrupted does not go on.
    unsafe { crate::console::take_from_abandoned() };
    let Frame { rip, rsp, rflags, rax, rbx, rcx, rdx, rsi, rdi, rbp, .. } = *frame;
    let Frame { r8, r9, r10, r11, r12, r13, r14, r15, vector, error, .. } = *frame;
    let base = crate::image::range().start;
    crate::say!("exception {vector} in the payload, error code {error:#x}");
    crate::say!("RIP {rip:#018x} (image {:+#x})  RFLAGS {rflags:#x}", rip.wrapping_sub(base));
    if vector == PAGE_FAULT {
        crate::say!("CR2 {:#018x}", Cr2::read_raw());
    }
    crate::say!("RAX {rax:016x}  RBX {rbx:016x}  RCX {rcx:016x}  RDX {rdx:016x}");
    crate::say!("RSI {rsi:016x}  RDI {rdi:016x}  RBP {rbp:016x}  RSP {rsp:016x}");
    crate::say!("R8  {r8:016x}  R9  {r9:016x}  R10 {r10:016x}  R11 {r11:016x}");
    crate::say!("R12 {r12:016x}  R13 {r13:016x}  R14 {r14:016x}  R15 {r15:016x}");
    if crate::rescue::leads_on() {
        GIVING_UP.store(false, Ordering::Relaxed);
    }
    crate::rescue::after_failure()
}
