//! Tables of machines, made here, good and damaged.

use super::*;
use crate::mmio::Mmio;
use std::vec::Vec;

fn read(physical: &dyn Physical, rsdp: PhysAddr) -> Firmware {
    let mut firmware = Firmware::default();
    fill(&mut firmware, physical, rsdp);
    firmware
}

/// Memory that begins at address 0x1000 and holds tables.
#[derive(Default)]
pub struct Tables(Vec<u8>);

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
    pub fn add(&mut self, signature: &[u8; 4], body: &[u8]) -> u64 {
        self.add_revision(signature, 0, body)
    }

    fn add_revision(&mut self, signature: &[u8; 4], revision: u8, body: &[u8]) -> u64 {
        let at = BASE + self.0.len() as u64;
        let mut table = signature.to_vec();
        table.extend_from_slice(&(36 + body.len() as u32).to_le_bytes());
        table.push(revision);
        table.resize(36, 0);
        table.extend_from_slice(body);
        table[9] = table.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte));
        self.0.extend(table);
        at
    }

    pub fn add_rsdp(&mut self, rsdt: u64) -> PhysAddr {
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
    let mut put = |at: usize, bytes: &[u8]| fadt[at - 36..][..bytes.len()].copy_from_slice(bytes);
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
    let arm = arm_machine(&spcr(3, [0; 4], 0x1000, 0, 0), 3);
    for (tables, rsdp) in [machine(), arm] {
        for cut in 0..tables.0.len() {
            let _ = read(&Tables(tables.0[..cut].to_vec()), rsdp);
        }
    }
}

/// A server of ARM's, where the tables lie behind an XSDT.
fn arm_machine(spcr: &[u8; 80 - 36], arm_boot_flags: u16) -> (Tables, PhysAddr) {
    let mut tables = Tables(Vec::new());
    let mut fadt = std::vec![0; 276 - 36];
    fadt[112 - 36..][..4].copy_from_slice(&(1u32 << 20).to_le_bytes());
    fadt[129 - 36..][..2].copy_from_slice(&arm_boot_flags.to_le_bytes());
    // What a hardware-reduced machine has there means nothing.
    fadt[76 - 36] = 8;
    fadt[64 - 36] = 4;
    let fadt = tables.add(b"FACP", &fadt);
    let range = |base: u64, segment: u8| {
        let mut entry = base.to_le_bytes().to_vec();
        entry.extend([segment, 0, 0, 0x7f, 0, 0, 0, 0]);
        entry
    };
    let mcfg = [std::vec![0; 8], range(0x40_1000_0000, 0), range(0, 1), range(1 << 41, 2)].concat();
    let mcfg = tables.add(b"MCFG", &mcfg);
    let spcr = tables.add_revision(b"SPCR", 4, spcr);
    let gtdt = tables.add(b"GTDT", &[&0x2a43_0000u64.to_le_bytes()[..], &[0; 60]].concat());
    let entries: Vec<u8> =
        [fadt, mcfg, spcr, gtdt].iter().flat_map(|&at| at.to_le_bytes()).collect();
    let xsdt = tables.add(b"XSDT", &entries);
    let rsdp = tables.add_rsdp(0);
    let at = (rsdp.0 - BASE) as usize;
    tables.0[at + 15] = 2;
    tables.0[at + 8] = tables.0[at + 8].wrapping_sub(2);
    tables.0.extend(36u32.to_le_bytes());
    tables.0.extend(xsdt.to_le_bytes());
    tables.0.extend([0; 4]);
    (tables, rsdp)
}

fn spcr(interface: u8, gas: [u8; 4], base: u32, baud: u8, clock: u32) -> [u8; 80 - 36] {
    let mut spcr = [0; 80 - 36];
    let mut put = |at: usize, bytes: &[u8]| spcr[at - 36..][..bytes.len()].copy_from_slice(bytes);
    put(36, &[interface]);
    put(40, &gas);
    put(44, &base.to_le_bytes());
    put(58, &[baud]);
    put(76, &clock.to_le_bytes());
    spcr
}

#[test]
fn facts_of_an_arm_server_are_found() {
    let (tables, rsdp) = arm_machine(&spcr(3, [0, 32, 0, 3], 0x0900_0000, 7, 24_000_000), 3);
    let firmware = read(&tables, rsdp);
    let uart = Uart {
        kind: UartKind::Pl011,
        base: PhysAddr(0x0900_0000),
        clock_hz: Some(24_000_000),
        baud: Some(115_200),
    };
    assert_eq!(firmware.console, Some(uart));
    assert_eq!(firmware.psci, Some(PsciConduit::Hvc));
    assert_eq!(firmware.counter_control, Some(PhysAddr(0x2a43_0000)));
    assert_eq!((firmware.pm_timer, firmware.soft_off, firmware.reset), (None, None, None));
    let ranges: Vec<_> =
        firmware.pci.iter().map(|host| (host.ecam.base.0, host.ecam.segment)).collect();
    assert_eq!(ranges, [(0x40_1000_0000, 0), (1 << 41, 2)]);
}

#[test]
fn psci_is_called_as_the_flags_say() {
    for (flags, expected) in [(0, None), (2, None), (1, Some(PsciConduit::Smc))] {
        let (tables, rsdp) = arm_machine(&spcr(3, [0; 4], 0, 0, 0), flags);
        assert_eq!(read(&tables, rsdp).psci, expected);
    }
}

#[test]
fn consoles_of_every_interface_type_are_told_apart() {
    let console = |interface, gas| {
        let (tables, rsdp) = arm_machine(&spcr(interface, gas, 0x1000, 0, 0), 0);
        read(&tables, rsdp).console.map(|uart| uart.kind)
    };
    let ns16550 =
        |register_shift, register_width| Some(UartKind::Ns16550 { register_shift, register_width });
    assert_eq!(console(0, [0, 8, 0, 1]), ns16550(0, 1));
    assert_eq!(console(1, [0, 8, 0, 0]), ns16550(0, 1));
    assert_eq!(console(0x12, [0, 32, 0, 3]), ns16550(2, 4));
    assert_eq!(console(0x12, [0, 32, 0, 1]), ns16550(2, 1));
    assert_eq!(console(0, [0, 8, 0, 3]), ns16550(2, 4));
    assert_eq!(console(0x0d, [0, 32, 0, 3]), Some(UartKind::Sbsa));
    assert_eq!(console(0x0e, [0, 32, 0, 3]), Some(UartKind::Sbsa));
    assert_eq!(console(0x0f, [0, 32, 0, 3]), None, "no UART");
    assert_eq!(console(0, [1, 8, 0, 1]), None, "ports");
    assert_eq!(console(0, [0, 8, 0, 2]), None, "16 bits");
}

#[test]
fn what_another_source_knows_is_kept() {
    let (tables, rsdp) = arm_machine(&spcr(3, [0; 4], 0x1000, 0, 0), 3);
    let ecam = EcamRange { base: PhysAddr(7 << 20), segment: 5, first_bus: 0, last_bus: 1 };
    let uart = Uart { kind: UartKind::Sbsa, base: PhysAddr(1), clock_hz: None, baud: None };
    let mut firmware = Firmware {
        psci: Some(PsciConduit::Smc),
        console: Some(uart),
        counter_control: Some(PhysAddr(3)),
        ..Firmware::default()
    };
    firmware.pci.push(PciHost { ecam, windows: heapless::Vec::new() }).unwrap();
    let before = firmware.clone();
    fill(&mut firmware, &tables, rsdp);
    assert_eq!(firmware, before);
}

#[test]
fn generic_watchdogs_are_found_but_for_those_of_the_secure_world() {
    let watchdog = |refresh: u64, flags: u32| {
        let head: Vec<u8> = [1, 28, 0, 0].into();
        let (frames, gsiv) = ([refresh, refresh + 0x1_0000].map(u64::to_le_bytes), [0; 4]);
        [head, frames.concat(), gsiv.to_vec(), flags.to_le_bytes().to_vec()].concat()
    };
    // A block of timers between them, and one more than there are.
    let mut body = std::vec![0; 96 - 36];
    body[88 - 36..92 - 36].copy_from_slice(&4u32.to_le_bytes());
    body[92 - 36..].copy_from_slice(&96u32.to_le_bytes());
    body.extend(watchdog(0x2a44_0000, 0));
    body.extend([0, 20, 0, 0].iter().chain(&[0; 16]));
    body.extend(watchdog(0x2a50_0000, 4));
    let mut tables = Tables::default();
    let gtdt = tables.add(b"GTDT", &body);
    let rsdt = tables.add(b"RSDT", &(gtdt as u32).to_le_bytes());
    let rsdp = tables.add_rsdp(rsdt);
    let found = read(&tables, rsdp).watchdogs;
    let (refresh, control) = (PhysAddr(0x2a44_0000), PhysAddr(0x2a45_0000));
    assert_eq!(found.as_slice(), [WatchdogFrames { refresh, control }]);
}
