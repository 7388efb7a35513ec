//! Where the tables say that IOMMUs are: DMAR (Intel Virtualization Technology for Directed I/O 4.1, 8.1),
//! IVRS (AMD IOMMU Specification 3.08, 5.2), IORT (Arm DEN 0049, revision E.f).

use super::Table;
use crate::firmware::{Firmware, Iommu, IommuKind};
use crate::{PhysAddr, Physical};

/// Most structures of a table that are looked at.
const MAX_STRUCTURES: usize = 1024;

/// Takes every IOMMU that the table names, if it is one that does.
pub(super) fn take(firmware: &mut Firmware, physical: &dyn Physical, table: &Table) {
    // What lies before the first structure, what kinds of structures are IOMMUs, and where in them
    // the address of the registers is.
    let (first, kind, is_iommu, base): (u32, _, fn(u8) -> bool, _) = match &table.signature {
        b"DMAR" => (48, IommuKind::VtD, |kind| kind == 0, 8),
        b"IVRS" => (48, IommuKind::AmdVi, |kind| matches!(kind, 0x10 | 0x11 | 0x40), 8),
        b"IORT" => {
            let first = table.read(physical, 40).map_or(0, u32::from_le_bytes);
            (first, IommuKind::SmmuV3, |kind| kind == 4, 16)
        }
        _ => return,
    };
    let mut at = first.max(Table::HEADER);
    for _ in 0..MAX_STRUCTURES {
        let Some(head) = table.read::<4>(physical, at) else { return };
        let [id, low, middle, high] = head;
        // Type and length are of two bytes each; AMD's and ARM's types of one byte.
        let (id, length) = match kind {
            IommuKind::VtD => (u8::try_from(u16::from_le_bytes([id, low])).ok(), [middle, high]),
            IommuKind::AmdVi => (Some(id), [middle, high]),
            IommuKind::SmmuV3 => (Some(id), [low, middle]),
        };
        if id.is_some_and(is_iommu)
            && let Some(base) = table.read(physical, at + base).map(u64::from_le_bytes)
        {
            firmware.add_iommu(Iommu { kind, base: PhysAddr(base) });
        }
        let Some(next) = at.checked_add(u16::from_le_bytes(length).into()) else { return };
        if next == at {
            return;
        }
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::super::fill;
    use super::super::tests::Tables;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn structure(head: &[u8], base_at: usize, base: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        bytes[..head.len()].copy_from_slice(head);
        if base_at + 8 <= size && base != 0 {
            bytes[base_at..base_at + 8].copy_from_slice(&base.to_le_bytes());
        }
        bytes
    }

    fn found(signature: &[u8; 4], body: &[u8]) -> Vec<(IommuKind, u64)> {
        let mut tables = Tables::default();
        let table = tables.add(signature, body);
        let rsdt = tables.add(b"RSDT", &(table as u32).to_le_bytes());
        let rsdp = tables.add_rsdp(rsdt);
        let mut firmware = Firmware::default();
        fill(&mut firmware, &tables, rsdp);
        firmware.iommus.iter().map(|it| (it.kind, it.base.0)).collect()
    }

    #[test]
    fn every_remapping_unit_of_dmar_is_found() {
        let body = [
            vec![0; 12],
            structure(&[0, 0, 24, 0], 8, 0xfed9_0000, 24),
            structure(&[1, 0, 32, 0], 8, 0x1000, 32),
            structure(&[0, 0, 16, 0, 1], 8, 0xfed9_1000, 16),
        ]
        .concat();
        let expected = [(IommuKind::VtD, 0xfed9_0000), (IommuKind::VtD, 0xfed9_1000)];
        assert_eq!(found(b"DMAR", &body), expected);
    }

    #[test]
    fn unit_that_ivrs_describes_three_times_is_one() {
        let block = |kind: u8| structure(&[kind, 0, 40, 0], 8, 0xfed8_0000, 40);
        let memory = structure(&[0x20, 0, 32, 0], 8, 0x1000, 32);
        let body = [vec![0; 12], block(0x10), memory, block(0x11), block(0x40)].concat();
        assert_eq!(found(b"IVRS", &body), [(IommuKind::AmdVi, 0xfed8_0000)]);
    }

    #[test]
    fn smmus_are_found_among_the_nodes_of_iort() {
        let head = [3u32, 48, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        let group = structure(&[0, 24, 0], 0, 0, 24);
        let smmu = structure(&[4, 68, 0, 4], 16, 0x905_0000, 68);
        let root = structure(&[2, 36, 0], 0, 0, 36);
        let expected = [(IommuKind::SmmuV3, 0x905_0000)];
        assert_eq!(found(b"IORT", &[head, group, smmu, root].concat()), expected);
    }

    #[test]
    fn structures_without_length_or_end_do_no_harm() {
        let cut = structure(&[0, 0, 24, 0], 8, 0xfed9_0000, 12);
        assert_eq!(found(b"DMAR", &[vec![0; 12], cut].concat()), []);
        let endless = structure(&[1, 0, 0, 0], 8, 0, 24);
        assert_eq!(found(b"DMAR", &[vec![0; 12], endless].concat()), []);
        let far = u32::MAX.to_le_bytes();
        assert_eq!(found(b"IORT", &[[1, 0, 0, 0], far, [0; 4]].concat()), []);
    }
}
