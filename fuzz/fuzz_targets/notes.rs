//! The notes of a core, and VMCOREINFO with all that is made of it before anything of the kernel is read.

#![no_main]

use host_analyzer::kernel::machine::Machine;
use host_analyzer::kernel::paging;
use host_analyzer::kernel::vmcoreinfo::Vmcoreinfo;
use host_analyzer::source::NoteBook;
use host_analyzer::{PhysAddr, VirtAddr};
use libfuzzer_sys::fuzz_target;
use tinykdump_fuzz::World;

/// Keys that are asked for, and what stands before their values.
const KEYS: [&str; 14] = [
    "OSRELEASE=",
    "BUILD-ID=",
    "PAGESIZE=",
    "SYMBOL(swapper_pg_dir)=",
    "SYMBOL(_stext)=",
    "KERNELOFFSET=",
    "NUMBER(phys_base)=",
    "NUMBER(pgtable_l5_enabled)=",
    "NUMBER(VA_BITS)=",
    "NUMBER(TCR_EL1_T1SZ)=",
    "NUMBER(kimage_voffset)=",
    "NUMBER(PHYS_OFFSET)=",
    "NUMBER(sme_mask)=",
    "LENGTH(mem_section)=",
];

/// A text in which zeros are ends of lines and small numbers are keys.
fn text(bytes: &[u8]) -> Vec<u8> {
    let one = |&byte: &u8| match byte {
        0 => b"\n".to_vec(),
        1..=14 => KEYS[usize::from(byte) - 1].as_bytes().to_vec(),
        other => vec![other],
    };
    bytes.iter().flat_map(one).collect()
}

fuzz_target!(|bytes: &[u8]| {
    let book = NoteBook::parse(std::iter::once(bytes));
    let machines = [62, 183].map(|number| Machine::from_elf(number).unwrap());
    for status in &book.prstatus {
        let _ = machines.map(|machine| machine.stand(status.registers));
    }
    let text = text(bytes);
    for text in book.vmcoreinfo.into_iter().chain([&text[..]]) {
        let info = Vmcoreinfo::new(text);
        let _ = (info.release(), info.kernel_offset(), info.page_size(), info.symbols().count());
        let _ = (info.number("VA_BITS"), info.length("mem_section"), info.get("BUILD-ID"));
        let world = World::default();
        for machine in machines {
            let Ok(tables) = paging::for_kernel(machine, &info) else { continue };
            for at in [0, 0xffff_8880_0000_1000, 0xffff_8000_0800_0000, u64::MAX] {
                let _ =
                    (tables.translate(&world, VirtAddr(at)), tables.by_arithmetic(VirtAddr(at)));
            }
            let _ = tables.of_process(PhysAddr(0x1000)).translate(&world, VirtAddr(0x40_0000));
        }
    }
});
