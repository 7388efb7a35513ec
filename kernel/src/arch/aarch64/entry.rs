//! From the first instruction to [`crate::main`].

use core::arch::{asm, global_asm};

use capture::OldPhys;
use drivers::PhysAddr;
use drivers::firmware::efi;
use drivers::firmware::fdt::{self, DeviceTree};

use super::{clock, paging, reset, trap};
use crate::boot::{BootInfo, CommandLine};
use crate::image;
use crate::memory::PhysicalMemory;
use crate::time;
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
    trap_stack = sym trap::STACK,
    trap_stack_size = const size_of_val(&trap::STACK),
    vectors = sym trap::trap_vectors,
    sctlr_el2_off = const paging::SCTLR_EL2_OFF,
    sctlr_off = const paging::SCTLR_OFF,
    entry = sym entry,
);

/// Called by the assembly above with the address of the device tree, the counter as it was at the
/// first instruction, and the exception level at which the payload was entered.
extern "C" fn entry(device_tree: u64, start: u64, exception_level: u64) -> ! {
    clock::start(start);
    reset::started_at_el2(exception_level == 2);
    let tables = paging::init();
    trap::init();
    windows::open(tables);
    let boot = BootInfo::keep(|| boot_info(PhysAddr(device_tree)));
    // The console waits with deadlines, and the counter is far slower than is guessed for x86.
    if let Some(rate) = clock::ticks_per_second(&boot.firmware, &boot.memory) {
        time::set_rate(rate);
    }
    crate::main(boot)
}

/// Leaves everything that runs, an exception too, and calls `next` on the stack that ends at `stack`.
///
/// # Safety
/// Nothing that is on this stack may be needed any more.
pub unsafe fn start_over(stack: u64, next: extern "C" fn() -> !) -> ! {
    // SAFETY: the caller's promise. Of an exception remain its stack, which the next one takes from its
    // end again only if this one's pointer is put back there, and the masked SErrors.
    unsafe {
        asm!(
            "msr spsel, #1",
            "mov sp, {exceptions}",
            "msr spsel, #0",
            "mov sp, {stack}",
            "mov x29, xzr",
            "mov x30, xzr",
            "msr daifclr, #4",
            "br {next}",
            exceptions = in(reg) trap::STACK.top(),
            stack = in(reg) stack,
            next = in(reg) next,
            options(noreturn)
        )
    }
}

fn boot_info(device_tree: PhysAddr) -> BootInfo {
    let image = image::range();
    let mut memory = PhysicalMemory::without_devices(1 << paging::physical_bits(), image.clone());
    let size = memory.read_bytes(device_tree).and_then(|head| fdt::claimed_size(&head));
    let take = |blob: &[u8]| {
        let tree = DeviceTree::read(blob)?;
        let command_line = CommandLine::until_zero(tree.bootargs.iter().copied());
        let usable = tree
            .usable_memory
            .iter()
            .map(|region| region.at.0..region.at.0.saturating_add(region.size));
        let own = usable.into_iter().find(|own| own.contains(&image.start) && own.end >= image.end);
        Some((command_line, tree.elfcorehdr, tree.initrd, tree.efi, tree.firmware, own))
    };
    let told = size.filter(|&size| size <= fdt::MAX_SIZE).and_then(|size| {
        // SAFETY: kexec put the tree into the crash region, which is the payload's alone.
        unsafe { windows::with_memory(device_tree, size.into(), take) }
    });
    let (command_line, elfcorehdr, initrd, efi, firmware, own) = told.flatten().unwrap_or_default();
    // All of the crash region is ours, and no device's.
    memory.own = own.unwrap_or(image.clone());
    BootInfo {
        command_line,
        elfcorehdr: elfcorehdr.map(|region| OldPhys(region.at.0)),
        handoff: initrd.map(|region| (region.at, region.size)),
        firmware,
        acpi_root: efi.and_then(|efi| efi::acpi_root(&memory, &efi)),
        memory,
        image_size: image.end - image.start,
    }
}
