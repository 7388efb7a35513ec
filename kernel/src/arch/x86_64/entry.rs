//! From the first instruction to [`crate::main`].

use core::arch::x86_64::__cpuid;
use core::arch::{asm, global_asm};

use capture::options::MAX_COMMAND_LINE;
use drivers::PhysAddr;
use drivers::firmware::Firmware;

use super::{clock, paging, trap};
use crate::boot::{BootInfo, CommandLine};
use crate::image;
use crate::memory::PhysicalMemory;
use crate::windows;

global_asm!(
    include_str!("entry.s"),
    bss_start = sym image::__bss_start,
    bss_end = sym image::__bss_end,
    image_start = sym image::__image_start,
    rela_start = sym image::__rela_start,
    rela_end = sym image::__rela_end,
    stack = sym image::STACK,
    stack_size = const size_of_val(&image::STACK),
    entry = sym entry,
);

/// Offsets in boot_params (Documentation/arch/x86/zero-page.rst and boot.rst, kernel 6.1).
mod boot_params {
    pub const SIZE: u64 = 4096;
    pub const ACPI_RSDP_ADDR: usize = 0x070;
    pub const EXT_RAMDISK_IMAGE: usize = 0x0c0;
    pub const EXT_RAMDISK_SIZE: usize = 0x0c4;
    pub const EXT_CMD_LINE_PTR: usize = 0x0c8;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
}

/// Called by the assembly above with the address of boot_params and the time stamp counter as it
/// was at the first instruction.
extern "C" fn entry(boot_params: u64, start: u64) -> ! {
    clock::start(start);
    trap::init();
    windows::open(paging::init());
    crate::main(BootInfo::keep(|| boot_info(boot_params)))
}

/// Leaves everything that runs, an exception too, and calls `next` on the stack that ends at `stack`.
///
/// # Safety
/// Nothing that is on this stack may be needed any more.
pub unsafe fn start_over(stack: u64, next: extern "C" fn() -> !) -> ! {
    // SAFETY: the caller's promise. The processor keeps no account of exceptions that do not return
    // but for NMIs, and from these nothing comes here.
    unsafe {
        asm!(
            "mov rsp, {stack}",
            "xor ebp, ebp",
            "cld",
            "call {next}",
            "ud2",
            stack = in(reg) stack,
            next = in(reg) next,
            options(noreturn)
        )
    }
}

fn boot_info(boot_params: u64) -> BootInfo {
    let image = image::range();
    let memory = PhysicalMemory::without_devices(physical_limit(), image.clone());
    // SAFETY: the boot protocol gives a boot_params of this size, in memory that is the payload's.
    let told = unsafe {
        windows::with_memory(PhysAddr(boot_params), boot_params::SIZE, |bytes| {
            let read32 = |at| bytes[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
            let read64 = |at| u64::from(read32(at)) | u64::from(read32(at + 4)) << 32;
            let split = |low, high| u64::from(read32(high)) << 32 | u64::from(read32(low));
            let text = split(boot_params::CMD_LINE_PTR, boot_params::EXT_CMD_LINE_PTR);
            let initrd = split(boot_params::RAMDISK_IMAGE, boot_params::EXT_RAMDISK_IMAGE);
            let initrd_size = split(boot_params::RAMDISK_SIZE, boot_params::EXT_RAMDISK_SIZE);
            (text, read64(boot_params::ACPI_RSDP_ADDR), (PhysAddr(initrd), initrd_size))
        })
    };
    let (text, rsdp, initrd) = told.unwrap_or((0, 0, (PhysAddr(0), 0)));
    let take = |bytes: &[u8]| CommandLine::until_zero(bytes.iter().copied());
    // SAFETY: likewise for the command line, which ends with a zero.
    let command_line = (text != 0)
        .then(|| unsafe { windows::with_memory(PhysAddr(text), MAX_COMMAND_LINE as u64, take) });
    BootInfo {
        command_line: command_line.flatten().unwrap_or_default(),
        elfcorehdr: None,
        handoff: (initrd.1 > 0).then_some(initrd),
        firmware: Firmware::default(),
        acpi_root: (rsdp != 0).then_some(PhysAddr(rsdp)),
        memory,
        image_size: image.end - image.start,
    }
}

/// The first physical address that the processor cannot address (CPUID 80000008h).
fn physical_limit() -> u64 {
    let bits =
        if __cpuid(0x8000_0000).eax >= 0x8000_0008 { __cpuid(0x8000_0008).eax & 0xff } else { 36 };
    1 << bits.clamp(32, 52)
}
