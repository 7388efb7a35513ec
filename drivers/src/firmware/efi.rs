//! From UEFI's system table to the root of the ACPI tables.
//!
//! The dead kernel has told the firmware which virtual addresses to use (SetVirtualAddressMap), and
//! most firmware then changed the pointer to its configuration tables. So that pointer is translated
//! back through the memory map that Linux's loader stub left; what the tables themselves point to
//! stays physical.
//!
//! Source: UEFI Specification 2.10, sections 4.3, 4.6 and 7.2; drivers/firmware/efi/efi-init.c of
//! Linux 6.1.

use crate::{PhysAddr, Physical};

/// Where firmware and the loader stub left their tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Efi {
    /// The EFI_SYSTEM_TABLE.
    pub system_table: PhysAddr,
    /// The memory map.
    pub memory_map: Option<MemoryMap>,
}

/// An array of EFI_MEMORY_DESCRIPTOR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    /// Where it is.
    pub at: PhysAddr,
    /// Its size in bytes.
    pub size: u32,
    /// Size of an entry in bytes: not what the specification's structure would have.
    pub descriptor_size: u32,
}

/// First eight bytes of a system table.
const SIGNATURE: [u8; 8] = *b"IBI SYST";

/// Offsets in a system table.
const NUMBER_OF_TABLES: u64 = 104;
const CONFIGURATION_TABLE: u64 = 112;

/// Size of an entry of the configuration table: a GUID and a pointer.
const ENTRY: u64 = 24;

/// GUID of ACPI 2.0 and later, 8868e871-e4f1-11d3-bc22-0080c73c8881, as it lies in memory.
const ACPI_20: [u8; 16] =
    [0x71, 0xe8, 0x68, 0x88, 0xf1, 0xe4, 0xd3, 0x11, 0xbc, 0x22, 0, 0x80, 0xc7, 0x3c, 0x88, 0x81];

/// GUID of ACPI 1.0, eb9d2d30-2d88-11d3-9a16-0090273fc14d.
const ACPI_10: [u8; 16] =
    [0x30, 0x2d, 0x9d, 0xeb, 0x88, 0x2d, 0xd3, 0x11, 0x9a, 0x16, 0, 0x90, 0x27, 0x3f, 0xc1, 0x4d];

/// Most configuration tables and memory descriptors that are looked at: several times what machines
/// have.
const MAX_TABLES: u64 = 256;
const MAX_DESCRIPTORS: u32 = 16384;

/// Size of the part of a memory descriptor that is known.
const DESCRIPTOR: u32 = 40;

/// Firmware uses this memory after boot.
const RUNTIME: u64 = 1 << 63;

/// Bytes of a page, whatever the kernel's are.
const PAGE: u64 = 4096;

/// Address of the ACPI root pointer (RSDP). `None` when the tables are damaged or name none.
#[must_use]
pub fn acpi_root(physical: &dyn Physical, efi: &Efi) -> Option<PhysAddr> {
    let table = efi.system_table;
    if read::<8>(physical, table, 0)? != SIGNATURE {
        return None;
    }
    let count = u64::from_le_bytes(read(physical, table, NUMBER_OF_TABLES)?).min(MAX_TABLES);
    let pointer = u64::from_le_bytes(read(physical, table, CONFIGURATION_TABLE)?);
    // Firmware that converted nothing left a physical address, which no virtual range should hold.
    let converted = efi.memory_map.and_then(|map| to_physical(physical, &map, pointer));
    let places = [converted, Some(PhysAddr(pointer))];
    places.into_iter().flatten().find_map(|tables| {
        find(physical, tables, count, &ACPI_20).or_else(|| find(physical, tables, count, &ACPI_10))
    })
}

fn find(physical: &dyn Physical, at: PhysAddr, count: u64, guid: &[u8; 16]) -> Option<PhysAddr> {
    for index in 0..count {
        let [entry_guid @ .., _, _, _, _, _, _, _, _] =
            read::<{ ENTRY as usize }>(physical, at, ENTRY * index)?;
        if entry_guid == *guid {
            let pointer = u64::from_le_bytes(read(physical, at, ENTRY * index + 16)?);
            return (pointer != 0).then_some(PhysAddr(pointer));
        }
    }
    None
}

/// The physical address that firmware's virtual address `address` stands for.
fn to_physical(physical: &dyn Physical, map: &MemoryMap, address: u64) -> Option<PhysAddr> {
    if map.descriptor_size < DESCRIPTOR {
        return None;
    }
    for index in 0..(map.size / map.descriptor_size).min(MAX_DESCRIPTORS) {
        let offset = u64::from(index) * u64::from(map.descriptor_size);
        let word = |at| read(physical, map.at, offset + at).map(u64::from_le_bytes);
        let (start, virtual_start) = (word(8)?, word(16)?);
        let (pages, attributes) = (word(24)?, word(32)?);
        let inside = address
            .checked_sub(virtual_start)
            .filter(|&inside| inside / PAGE < pages && virtual_start != 0);
        if let (true, Some(inside)) = (attributes & RUNTIME != 0, inside) {
            return start.checked_add(inside).map(PhysAddr);
        }
    }
    None
}

fn read<const N: usize>(physical: &dyn Physical, at: PhysAddr, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let at = PhysAddr(at.0.checked_add(offset)?);
    physical.read(at, &mut bytes).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmio::Mmio;
    use std::vec::Vec;

    const BASE: u64 = 0x4000_0000;
    const VIRTUAL: u64 = 0x2000_0000;

    struct Memory(Vec<u8>);

    impl Physical for Memory {
        fn read(&self, at: PhysAddr, into: &mut [u8]) -> bool {
            let start = at.0.wrapping_sub(BASE) as usize;
            match start.checked_add(into.len()).and_then(|end| self.0.get(start..end)) {
                Some(bytes) => into.copy_from_slice(bytes),
                None => return false,
            }
            true
        }

        fn map_device(&self, _: PhysAddr, _: u64) -> Option<Mmio> {
            None
        }
    }

    /// System table at 0, configuration tables at 0x100 (known to firmware at `pointer`), memory map
    /// of two entries at 0x200.
    fn machine(pointer: u64, guids: &[([u8; 16], u64)]) -> (Memory, Efi) {
        let mut bytes = std::vec![0; 0x300];
        let mut put = |at: usize, some: &[u8]| bytes[at..][..some.len()].copy_from_slice(some);
        put(0, b"IBI SYST");
        put(104, &(guids.len() as u64).to_le_bytes());
        put(112, &pointer.to_le_bytes());
        for (index, (guid, at)) in guids.iter().enumerate() {
            put(0x100 + 24 * index, guid);
            put(0x100 + 24 * index + 16, &at.to_le_bytes());
        }
        // Memory of no interest, without a virtual address; then that of the firmware.
        put(0x208, &0u64.to_le_bytes());
        put(0x218, &u64::MAX.to_le_bytes());
        put(0x220, &RUNTIME.to_le_bytes());
        put(0x230 + 8, &BASE.to_le_bytes());
        put(0x230 + 16, &VIRTUAL.to_le_bytes());
        put(0x230 + 24, &1u64.to_le_bytes());
        put(0x230 + 32, &(RUNTIME | 0xf).to_le_bytes());
        let memory_map =
            Some(MemoryMap { at: PhysAddr(BASE + 0x200), size: 0x60, descriptor_size: 0x30 });
        (Memory(bytes), Efi { system_table: PhysAddr(BASE), memory_map })
    }

    #[test]
    fn pointer_that_became_virtual_is_translated_back() {
        let guids = [([7; 16], 5), (ACPI_10, 0x1000), (ACPI_20, 0x2000)];
        let (memory, efi) = machine(VIRTUAL + 0x100, &guids);
        assert_eq!(acpi_root(&memory, &efi), Some(PhysAddr(0x2000)));
    }

    #[test]
    fn pointer_that_stayed_physical_is_taken_as_it_is() {
        let (memory, efi) = machine(BASE + 0x100, &[(ACPI_10, 0x1000)]);
        assert_eq!(acpi_root(&memory, &efi), Some(PhysAddr(0x1000)));
        let without_map = Efi { memory_map: None, ..efi };
        assert_eq!(acpi_root(&memory, &without_map), Some(PhysAddr(0x1000)));
    }

    #[test]
    fn damaged_or_cut_tables_give_nothing_or_another_address_and_no_harm() {
        let (memory, efi) = machine(VIRTUAL + 0x100, &[(ACPI_20, 0x2000)]);
        for at in 0..memory.0.len() {
            for damage in [0x01, 0x80, 0xff] {
                let mut damaged = Memory(memory.0.clone());
                damaged.0[at] ^= damage;
                let _ = acpi_root(&damaged, &efi);
            }
            let _ = acpi_root(&Memory(memory.0[..at].to_vec()), &efi);
        }
        let map = MemoryMap { at: PhysAddr(u64::MAX - 8), size: u32::MAX, descriptor_size: 40 };
        assert!(acpi_root(&memory, &Efi { memory_map: Some(map), ..efi }).is_none());
        for descriptor_size in [0, 39] {
            let map = MemoryMap { descriptor_size, ..map };
            assert!(acpi_root(&memory, &Efi { memory_map: Some(map), ..efi }).is_none());
        }
        let elsewhere = Efi { system_table: PhysAddr(u64::MAX - 3), ..efi };
        assert_eq!(acpi_root(&memory, &elsewhere), None);
    }

    #[test]
    fn system_table_with_another_signature_is_not_one() {
        let (mut memory, efi) = machine(VIRTUAL + 0x100, &[(ACPI_20, 0x2000)]);
        memory.0[0] = b'i';
        assert_eq!(acpi_root(&memory, &efi), None);
    }
}
