//! The few facts that a dump needs from the ACPI tables: the timer, the reset register, the way to
//! switch the machine off, and PCI configuration space.
//!
//! Tables are foreign bytes: lengths are bounded, checksums verified, and a missing or broken table
//! leaves its fact unknown. Source: ACPI Specification 6.4, sections 4.8, 5.2 and 7.4.2; PCI Firmware
//! Specification 3.3, 4.1.2 (MCFG).

use heapless::Vec;

use crate::firmware::{EcamRange, Firmware, MAX_PCI_HOSTS, PciHost, SoftOff};
use crate::{PhysAddr, Physical};

/// Most bytes of a table that are looked at; only DSDT and SSDT are ever larger.
const MAX_TABLE: u32 = 1 << 20;

/// Most tables that the root table may list.
const MAX_TABLES: u32 = 256;

/// Frequency of the power management timer in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;

/// Reads the tables that the root pointer at `rsdp` leads to and adds what `firmware` does not know
/// yet. What cannot be read or is damaged stays unknown.
pub fn fill(firmware: &mut Firmware, physical: &dyn Physical, rsdp: PhysAddr) {
    let Some(root) = root_table(physical, rsdp) else { return };
    for index in 0..root.entries() {
        let Some(table) = root.entry(physical, index) else { continue };
        match &table.signature {
            b"FACP" => take_fadt(firmware, physical, &table),
            b"MCFG" => take_mcfg(firmware, physical, &table),
            _ => {}
        }
    }
}

fn take_fadt(firmware: &mut Firmware, physical: &dyn Physical, fadt: &Table) {
    let byte = |offset| fadt.read::<1>(physical, offset).map_or(0, |[byte]| byte);
    let word = |offset| fadt.read(physical, offset).map_or(0, u32::from_le_bytes);
    let port = |offset| u16::try_from(word(offset)).ok().filter(|&port| port != 0);
    let flags = word(112);
    firmware.pm_timer = firmware.pm_timer.or(port(76));
    if flags & 1 << 10 != 0 && firmware.reset.is_none() {
        firmware.reset = register_port(physical, fadt, 116).map(|port| (port, byte(128)));
    }
    let extended = fadt.read(physical, 140).map_or(0, u64::from_le_bytes);
    let dsdt = if extended != 0 { extended } else { word(40).into() };
    if let (Some(pm1a), None) = (port(64), firmware.soft_off) {
        let sleep_type =
            Table::open(physical, PhysAddr(dsdt)).and_then(|dsdt| soft_off_type(physical, &dsdt));
        firmware.soft_off =
            sleep_type.map(|sleep_type| SoftOff { pm1a, pm1b: port(68), sleep_type });
    }
}

/// Takes every range of configuration space, as many as there is room for. A device tree that names
/// host bridges knows more about them: then the table adds none.
fn take_mcfg(firmware: &mut Firmware, physical: &dyn Physical, mcfg: &Table) {
    if !firmware.pci.is_empty() {
        return;
    }
    for index in 0..MAX_PCI_HOSTS as u32 {
        let Some(entry) = mcfg.read::<16>(physical, 44 + 16 * index) else { break };
        if let Some(ecam) = ecam(entry) {
            let _ = firmware.pci.push(PciHost { ecam, windows: Vec::new() });
        }
    }
}

/// A table whose header and checksum were verified.
struct Table {
    at: PhysAddr,
    size: u32,
    signature: [u8; 4],
}

impl Table {
    const HEADER: u32 = 36;

    fn open(physical: &dyn Physical, at: PhysAddr) -> Option<Table> {
        let mut header = [0; 8];
        if !physical.read(at, &mut header) {
            return None;
        }
        let [a, b, c, d, size @ ..] = header;
        let size = u32::from_le_bytes(size);
        let table = Table { at, size, signature: [a, b, c, d] };
        let sane = (Table::HEADER..=MAX_TABLE).contains(&size);
        (sane && checksum(physical, at, size) == Some(0)).then_some(table)
    }

    fn read<const N: usize>(&self, physical: &dyn Physical, offset: u32) -> Option<[u8; N]> {
        let end = offset.checked_add(N as u32)?;
        let mut bytes = [0; N];
        let at = PhysAddr(self.at.0.checked_add(offset.into())?);
        (end <= self.size && physical.read(at, &mut bytes)).then_some(bytes)
    }
}

/// Sum of the bytes modulo 256, which is 0 for an undamaged table.
fn checksum(physical: &dyn Physical, at: PhysAddr, size: u32) -> Option<u8> {
    let mut sum = 0u8;
    let mut bytes = [0; 256];
    let mut offset = 0;
    while offset < size {
        let some = (size - offset).min(256) as usize;
        let from = PhysAddr(at.0.checked_add(offset.into())?);
        if !physical.read(from, &mut bytes[..some]) {
            return None;
        }
        sum = bytes[..some].iter().fold(sum, |sum, &byte| sum.wrapping_add(byte));
        offset += some as u32;
    }
    Some(sum)
}

/// XSDT or RSDT, whose entries are addresses of 8 or 4 bytes.
struct RootTable {
    table: Table,
    wide: bool,
}

impl RootTable {
    fn entries(&self) -> u32 {
        ((self.table.size - Table::HEADER) / if self.wide { 8 } else { 4 }).min(MAX_TABLES)
    }

    fn entry(&self, physical: &dyn Physical, index: u32) -> Option<Table> {
        let at = if self.wide {
            u64::from_le_bytes(self.table.read(physical, Table::HEADER + index * 8)?)
        } else {
            u32::from_le_bytes(self.table.read(physical, Table::HEADER + index * 4)?).into()
        };
        Table::open(physical, PhysAddr(at))
    }
}

fn root_table(physical: &dyn Physical, rsdp: PhysAddr) -> Option<RootTable> {
    let mut pointer = [0; 36];
    if !physical.read(rsdp, &mut pointer[..20])
        || pointer[..8] != *b"RSD PTR "
        || checksum(physical, rsdp, 20) != Some(0)
    {
        return None;
    }
    if pointer[15] >= 2 && physical.read(rsdp, &mut pointer) {
        let [xsdt @ .., _, _, _, _] = *pointer.last_chunk::<12>()?;
        let xsdt = Table::open(physical, PhysAddr(u64::from_le_bytes(xsdt)));
        if let Some(table) = xsdt.filter(|table| table.signature == *b"XSDT") {
            return Some(RootTable { table, wide: true });
        }
    }
    let rsdt: [u8; 4] = *pointer[16..].first_chunk()?;
    let table = Table::open(physical, PhysAddr(u32::from_le_bytes(rsdt).into()))?;
    (table.signature == *b"RSDT").then_some(RootTable { table, wide: false })
}

/// The port in the Generic Address Structure at `offset` of `table`, if it describes one.
fn register_port(physical: &dyn Physical, table: &Table, offset: u32) -> Option<u16> {
    const SYSTEM_IO: u8 = 1;
    let [space, ..] = table.read::<4>(physical, offset)?;
    let address = u64::from_le_bytes(table.read(physical, offset + 4)?);
    u16::try_from(address).ok().filter(|&port| space == SYSTEM_IO && port != 0)
}

/// The range that an entry of MCFG describes, if it makes sense.
fn ecam(entry: [u8; 16]) -> Option<EcamRange> {
    let [base @ .., _, _, _, _, _, _, _, _] = entry;
    let [.., s0, s1, first_bus, last_bus, _, _, _, _] = entry;
    let range = EcamRange {
        base: PhysAddr(u64::from_le_bytes(base)),
        segment: u16::from_le_bytes([s0, s1]),
        first_bus,
        last_bus,
    };
    (range.base.0 != 0 && first_bus <= last_bus).then_some(range)
}

/// SLP_TYPa and SLP_TYPb of the package `_S5_` in the DSDT.
///
/// The table is AML, which needs an interpreter; but this package holds constants in every machine
/// seen, so its bytes are found by its name: `08 _S5_ 12 length count a b`, each number a byte
/// constant (`0a n`), zero (`00`) or one (`01`).
fn soft_off_type(physical: &dyn Physical, dsdt: &Table) -> Option<(u8, u8)> {
    let mut offset = Table::HEADER;
    while let Some(name) = dsdt.read::<5>(physical, offset) {
        if name == *b"_S5_\x12" {
            break;
        }
        offset += 1;
    }
    let [length] = dsdt.read(physical, offset + 5)?;
    // The two topmost bits tell how many bytes of package length follow; then the count.
    let mut at = offset + 6 + u32::from(length >> 6) + 1;
    let mut constant = || {
        let [op] = dsdt.read(physical, at)?;
        at += 1;
        match op {
            0 | 1 => Some(op),
            0x0a => {
                let [value] = dsdt.read(physical, at)?;
                at += 1;
                Some(value)
            }
            _ => None,
        }
    };
    let first = constant()?;
    Some((first & 7, constant()? & 7))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmio::Mmio;
    use std::vec::Vec;

    fn read(physical: &dyn Physical, rsdp: PhysAddr) -> Firmware {
        let mut firmware = Firmware::default();
        fill(&mut firmware, physical, rsdp);
        firmware
    }

    /// Memory that begins at address 0x1000 and holds tables.
    struct Tables(Vec<u8>);

    const BASE: u64 = 0x1000;

    impl Physical for Tables {
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

    impl Tables {
        fn add(&mut self, signature: &[u8; 4], body: &[u8]) -> u64 {
            let at = BASE + self.0.len() as u64;
            let mut table = signature.to_vec();
            table.extend_from_slice(&(36 + body.len() as u32).to_le_bytes());
            table.resize(36, 0);
            table.extend_from_slice(body);
            table[9] = table.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte));
            self.0.extend(table);
            at
        }

        fn add_rsdp(&mut self, rsdt: u64) -> PhysAddr {
            let at = BASE + self.0.len() as u64;
            let mut rsdp = b"RSD PTR ".to_vec();
            rsdp.resize(16, 0);
            rsdp.extend_from_slice(&(rsdt as u32).to_le_bytes());
            rsdp[8] = rsdp.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte));
            self.0.extend(rsdp);
            PhysAddr(at)
        }
    }

    /// The tables of a machine like QEMU's q35.
    fn machine() -> (Tables, PhysAddr) {
        let mut tables = Tables(Vec::new());
        let dsdt = tables.add(b"DSDT", b"\x10\x40\x08_S5_\x12\x06\x04\x00\x0a\x05\x00\x00");
        let mut fadt = std::vec![0; 244 - 36];
        let mut put =
            |at: usize, bytes: &[u8]| fadt[at - 36..][..bytes.len()].copy_from_slice(bytes);
        put(40, &(dsdt as u32).to_le_bytes());
        put(64, &0x604u32.to_le_bytes());
        put(76, &0x608u32.to_le_bytes());
        put(112, &(1u32 << 10).to_le_bytes());
        put(116, &[1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 0x0f]);
        let fadt = tables.add(b"FACP", &fadt);
        let mcfg = tables.add(b"MCFG", b"\0\0\0\0\0\0\0\0\0\0\0\xb0\0\0\0\0\0\0\x00\xff\0\0\0\0");
        let entries: Vec<u8> =
            [fadt, mcfg, 0xdead_0000].iter().flat_map(|&at| (at as u32).to_le_bytes()).collect();
        let rsdt = tables.add(b"RSDT", &entries);
        let rsdp = tables.add_rsdp(rsdt);
        (tables, rsdp)
    }

    #[test]
    fn facts_of_a_q35_are_found() {
        let (tables, rsdp) = machine();
        let firmware = read(&tables, rsdp);
        assert_eq!(firmware.pm_timer, Some(0x608));
        assert_eq!(firmware.reset, Some((0xcf9, 0x0f)));
        let off = SoftOff { pm1a: 0x604, pm1b: None, sleep_type: (0, 5) };
        assert_eq!(firmware.soft_off, Some(off));
        let base = PhysAddr(0xb000_0000);
        let ecam = EcamRange { base, segment: 0, first_bus: 0, last_bus: 255 };
        assert_eq!(firmware.pci[..], [PciHost { ecam, windows: heapless::Vec::new() }]);
    }

    #[test]
    fn damaged_tables_leave_their_facts_unknown() {
        let (tables, rsdp) = machine();
        for at in 0..tables.0.len() {
            let mut damaged = Tables(tables.0.clone());
            damaged.0[at] ^= 0x40;
            let firmware = read(&damaged, rsdp);
            assert_ne!(firmware, read(&tables, rsdp), "byte {at} damaged and not noticed");
        }
        assert_eq!(read(&tables, PhysAddr(0)), Firmware::default());
    }

    #[test]
    fn tables_cut_at_any_byte_do_no_harm() {
        let (tables, rsdp) = machine();
        for cut in 0..tables.0.len() {
            let _ = read(&Tables(tables.0[..cut].to_vec()), rsdp);
        }
    }
}
