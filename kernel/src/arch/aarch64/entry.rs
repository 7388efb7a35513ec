//! From the first instruction to [`crate::main`].

use core::arch::global_asm;

use capture::OldPhys;
use drivers::PhysAddr;
use drivers::firmware::efi;
use drivers::firmware::fdt::{self, DeviceTree};

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
    vectors = sym trap::trap_vectors,
    sctlr_off = const paging::SCTLR_OFF,
    entry = sym entry,
);

/// Called by the assembly above with the address of the device tree and the counter as it was at
/// the first instruction.
extern "C" fn entry(device_tree: u64, start: u64) -> ! {
    clock::start(start);
    let tables = paging::init();
    trap::init();
    windows::open(tables);
    crate::main(&boot_info(PhysAddr(device_tree)))
}

fn boot_info(device_tree: PhysAddr) -> BootInfo {
    let image = (&raw const __image_start as u64)..(&raw const __image_end as u64);
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
        Some((command_line, tree.elfcorehdr, tree.efi, tree.firmware, own))
    };
    let told = size.filter(|&size| size <= fdt::MAX_SIZE).and_then(|size| {
        // SAFETY: kexec put the tree into the crash region, which is the payload's alone.
        unsafe { windows::with_memory(device_tree, size.into(), take) }
    });
    let (command_line, elfcorehdr, efi, firmware, own) = told.flatten().unwrap_or_default();
    // All of the crash region is ours, and no device's.
    memory.own = own.unwrap_or(image.clone());
    BootInfo {
        command_line,
        elfcorehdr: elfcorehdr.map(|region| OldPhys(region.at.0)),
        firmware,
        acpi_root: efi.and_then(|efi| efi::acpi_root(&memory, &efi)),
        memory,
        image_size: image.end - image.start,
    }
}
