//! The few facts that a dump needs from the ACPI tables: timers, the ways to restart and to switch
//! off, the console, PCI configuration space, and IOMMUs.
//!
//! Tables are foreign bytes: lengths are bounded, checksums verified, and a missing or broken table
//! leaves its fact unknown. Source: ACPI Specification 6.4, sections 4.8, 5.2 and 7.4.2; PCI Firmware
//! Specification 3.3, 4.1.2 (MCFG); Microsoft's Serial Port Console Redirection Table, revision 4
//! (SPCR).

mod iommu;

use heapless::Vec;

use crate::firmware::{
    EcamRange, Firmware, MAX_PCI_HOSTS, PciHost, PsciConduit, SoftOff, Uart, UartKind,
    WatchdogFrames,
};
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
            b"SPCR" => firmware.console = firmware.console.or(console(physical, &table)),
            b"GTDT" => {
                let frame = counter_control(physical, &table);
                firmware.counter_control = firmware.counter_control.or(frame);
                take_watchdogs(firmware, physical, &table);
            }
            _ => iommu::take(firmware, physical, &table),
        }
    }
}

/// Flags of FADT and of its ARM part (sections 5.2.9 and 5.2.9.4).
mod fadt_flag {
    pub const RESET_REGISTER: u32 = 1 << 10;
    pub const HARDWARE_REDUCED: u32 = 1 << 20;
    pub const ARM_PSCI: u16 = 1;
    pub const ARM_PSCI_BY_HVC: u16 = 2;
}

fn take_fadt(firmware: &mut Firmware, physical: &dyn Physical, fadt: &Table) {
    let word = |offset| fadt.read(physical, offset).map_or(0, u32::from_le_bytes);
    let flags = word(112);
    if flags & fadt_flag::RESET_REGISTER != 0 && firmware.reset.is_none() {
        let value = fadt.read::<1>(physical, 128).map_or(0, |[byte]| byte);
        firmware.reset = register_port(physical, fadt, 116).map(|port| (port, value));
    }
    let arm = fadt.read(physical, 129).map_or(0, u16::from_le_bytes);
    if arm & fadt_flag::ARM_PSCI != 0 && firmware.psci.is_none() {
        let by_hvc = arm & fadt_flag::ARM_PSCI_BY_HVC != 0;
        firmware.psci = Some(if by_hvc { PsciConduit::Hvc } else { PsciConduit::Smc });
    }
    // Such machines, all ARM ones among them, lack the registers that follow.
    if flags & fadt_flag::HARDWARE_REDUCED != 0 {
        return;
    }
    let port = |offset| u16::try_from(word(offset)).ok().filter(|&port| port != 0);
    firmware.pm_timer = firmware.pm_timer.or(port(76));
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

/// The port that SPCR names, if it is in memory and of a known kind.
fn console(physical: &dyn Physical, spcr: &Table) -> Option<Uart> {
    const SYSTEM_MEMORY: u8 = 0;
    let [interface] = spcr.read(physical, 36)?;
    let [space, bit_width, _, access_size] = spcr.read(physical, 40)?;
    let base = u64::from_le_bytes(spcr.read(physical, 44)?);
    let kind = match interface {
        0x00 | 0x01 | 0x12 => ns16550(bit_width, access_size)?,
        0x03 => UartKind::Pl011,
        // 0x0d is the older one, which takes accesses of 32 bits only: the driver makes no others.
        0x0d | 0x0e => UartKind::Sbsa,
        _ => return None,
    };
    let baud = match spcr.read(physical, 58)? {
        [3] => Some(9600),
        [4] => Some(19200),
        [6] => Some(57600),
        [7] => Some(115_200),
        _ => None,
    };
    // The field was reserved before revision 3.
    let [revision] = spcr.read(physical, 8)?;
    let clock = spcr.read(physical, 76).map(u32::from_le_bytes);
    let clock_hz = clock.filter(|&hz| hz != 0 && revision >= 3);
    let known = space == SYSTEM_MEMORY && base != 0;
    known.then_some(Uart { kind, base: PhysAddr(base), clock_hz, baud })
}

/// A 16550 whose registers are `bit_width` apart and are accessed as `access_size` says (section
/// 5.2.3.2). Older tables leave one of both at a byte when they mean words.
fn ns16550(bit_width: u8, access_size: u8) -> Option<UartKind> {
    let (register_width, least_shift) = match access_size {
        0 | 1 => (1, 0),
        3 => (4, 2),
        _ => return None,
    };
    let shift = match bit_width {
        16 => 1,
        32 => 2,
        64 => 3,
        _ => 0,
    };
    Some(UartKind::Ns16550 { register_shift: least_shift.max(shift), register_width })
}

/// The frame of the ARM counter's control registers, which GTDT may name (section 5.2.25).
fn counter_control(physical: &dyn Physical, gtdt: &Table) -> Option<PhysAddr> {
    let base = u64::from_le_bytes(gtdt.read(physical, 36)?);
    (base != 0 && base != u64::MAX).then_some(PhysAddr(base))
}

/// Takes the watchdogs among GTDT's platform timers (section 5.2.25.2), but for those of the secure world.
fn take_watchdogs(firmware: &mut Firmware, physical: &dyn Physical, gtdt: &Table) {
    const MAX_TIMERS: u32 = 64;
    const WATCHDOG: u8 = 1;
    const SECURE: u32 = 1 << 2;
    let word = |offset: u32| gtdt.read(physical, offset).map(u32::from_le_bytes);
    let (Some(count), Some(first)) = (word(88), word(92)) else { return };
    let mut at = first.max(Table::HEADER);
    for _ in 0..count.min(MAX_TIMERS) {
        let Some([kind, low, high, _]) = gtdt.read(physical, at) else { return };
        if kind == WATCHDOG
            && let Some(refresh) = gtdt.read(physical, at + 4).map(u64::from_le_bytes)
            && let Some(control) = gtdt.read(physical, at + 12).map(u64::from_le_bytes)
            && word(at + 24).is_some_and(|flags| flags & SECURE == 0)
        {
            let (refresh, control) = (PhysAddr(refresh), PhysAddr(control));
            let _ = firmware.watchdogs.push(WatchdogFrames { refresh, control });
        }
        let length = u16::from_le_bytes([low, high]);
        let Some(next) = at.checked_add(length.into()).filter(|&next| next > at) else { return };
        at = next;
    }
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
#[path = "acpi_tests.rs"]
mod tests;
