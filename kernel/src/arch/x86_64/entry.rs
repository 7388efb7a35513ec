//! From the first instruction to [`crate::main`].

use core::arch::global_asm;
use core::arch::x86_64::__cpuid;
use core::cell::UnsafeCell;

use capture::options::MAX_COMMAND_LINE;
use drivers::PhysAddr;
use heapless::String;

use crate::arch::{clock, trap};
use crate::boot::BootInfo;

/// Size of the payload's stack in bytes.
const STACK_SIZE: usize = 20 * 1024;

/// A stack; below it lies a page that is never mapped, so that a stack that is too small faults.
#[repr(C, align(4096))]
pub(super) struct Stack<const SIZE: usize> {
    guard: UnsafeCell<[u8; GUARD_SIZE]>,
    bytes: UnsafeCell<[u8; SIZE]>,
}

/// Size of the page below a stack.
const GUARD_SIZE: usize = 4096;

// SAFETY: only the processor reaches the bytes, as its stack.
unsafe impl<const SIZE: usize> Sync for Stack<SIZE> {}

impl<const SIZE: usize> Stack<SIZE> {
    pub const fn new() -> Self {
        Stack { guard: UnsafeCell::new([0; GUARD_SIZE]), bytes: UnsafeCell::new([0; SIZE]) }
    }

    /// Address of the guard page.
    pub fn guard(&self) -> u64 {
        self.guard.get() as u64
    }

    /// Where the first push goes below.
    pub fn top(&self) -> u64 {
        self.bytes.get() as u64 + SIZE as u64
    }
}

/// The stack of everything but exceptions.
pub(super) static STACK: Stack<STACK_SIZE> = Stack::new();

unsafe extern "C" {
    pub(super) static __image_start: u8;
    pub(super) static __rodata_start: u8;
    pub(super) static __data_start: u8;
    pub(super) static __image_end: u8;
    static __bss_start: u8;
    static __bss_end: u8;
    static __rela_start: u8;
    static __rela_end: u8;
}

global_asm!(
    include_str!("entry.s"),
    bss_start = sym __bss_start,
    bss_end = sym __bss_end,
    image_start = sym __image_start,
    rela_start = sym __rela_start,
    rela_end = sym __rela_end,
    stack = sym STACK,
    stack_size = const size_of::<Stack<STACK_SIZE>>(),
    entry = sym entry,
);

/// Offsets in boot_params (Documentation/arch/x86/zero-page.rst and boot.rst, kernel 6.1).
mod boot_params {
    pub const ACPI_RSDP_ADDR: u64 = 0x070;
    pub const EXT_CMD_LINE_PTR: u64 = 0x0c8;
    pub const CMD_LINE_PTR: u64 = 0x228;
}

/// Called by the assembly above with the address of boot_params and the time stamp counter as it
/// was at the first instruction.
extern "C" fn entry(boot_params: u64, start: u64) -> ! {
    clock::start(start);
    trap::init();
    // SAFETY: the boot protocol gives an identity-mapped boot_params, and nothing has changed the
    // mapping yet.
    let boot = unsafe { boot_info(boot_params) };
    crate::main(&boot)
}

/// # Safety
/// Memory must still be mapped as the boot protocol says, `boot_params` being the address it gave.
unsafe fn boot_info(boot_params: u64) -> BootInfo {
    // SAFETY: the caller's promise; boot_params is a page long.
    let read32 = |offset| unsafe { ((boot_params + offset) as *const u32).read_unaligned() };
    // SAFETY: likewise.
    let read64 = |offset| unsafe { ((boot_params + offset) as *const u64).read_unaligned() };

    let high = u64::from(read32(boot_params::EXT_CMD_LINE_PTR));
    let text = high << 32 | u64::from(read32(boot_params::CMD_LINE_PTR));
    let mut command_line = String::new();
    for offset in 0..if text == 0 { 0 } else { MAX_COMMAND_LINE as u64 } {
        // SAFETY: the command line lies in the crash region, is mapped, and ends with a zero.
        let byte = unsafe { ((text + offset) as *const u8).read() };
        let character = if byte.is_ascii() { char::from(byte) } else { '?' };
        if byte == 0 || command_line.push(character).is_err() {
            break;
        }
    }
    let rsdp = read64(boot_params::ACPI_RSDP_ADDR);
    BootInfo {
        command_line,
        acpi_root: (rsdp != 0).then_some(PhysAddr(rsdp)),
        physical_limit: physical_limit(),
        own_memory: (&raw const __image_start as u64)..(&raw const __image_end as u64),
    }
}

/// The first physical address that the processor cannot address (CPUID 80000008h).
fn physical_limit() -> u64 {
    let bits =
        if __cpuid(0x8000_0000).eax >= 0x8000_0008 { __cpuid(0x8000_0008).eax & 0xff } else { 36 };
    1 << bits.clamp(32, 52)
}
