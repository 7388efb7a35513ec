//! From the first instruction to [`crate::main`].

use core::arch::global_asm;
use core::arch::x86_64::__cpuid;

use drivers::PhysAddr;

use super::{clock, paging, trap};
use crate::boot::{BootInfo, CommandLine};
use crate::memory::PhysicalMemory;
use crate::stack::Stack;
use crate::windows;

/// Size of the payload's stack in bytes.
const STACK_SIZE: usize = 20 * 1024;

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
    windows::open(paging::init());
    crate::main(&boot_info(boot_params))
}

fn boot_info(boot_params: u64) -> BootInfo {
    let memory = PhysicalMemory::without_devices(
        physical_limit(),
        (&raw const __image_start as u64)..(&raw const __image_end as u64),
    );
    let field = |offset| PhysAddr(boot_params.wrapping_add(offset));
    let read32 = |offset| memory.read_bytes(field(offset)).map_or(0, u32::from_le_bytes);

    let high = u64::from(read32(boot_params::EXT_CMD_LINE_PTR));
    let text = high << 32 | u64::from(read32(boot_params::CMD_LINE_PTR));
    let bytes = (text..).take_while(|_| text != 0).map_while(|at| memory.read_bytes(PhysAddr(at)));
    let command_line = CommandLine::until_zero(bytes.map(|[byte]| byte));
    let rsdp = memory.read_bytes(field(boot_params::ACPI_RSDP_ADDR)).map_or(0, u64::from_le_bytes);
    BootInfo {
        command_line,
        elfcorehdr: None,
        acpi_root: (rsdp != 0).then_some(PhysAddr(rsdp)),
        memory,
    }
}

/// The first physical address that the processor cannot address (CPUID 80000008h).
fn physical_limit() -> u64 {
    let bits =
        if __cpuid(0x8000_0000).eax >= 0x8000_0008 { __cpuid(0x8000_0008).eax & 0xff } else { 36 };
    1 << bits.clamp(32, 52)
}
