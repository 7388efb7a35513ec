//! Hardware watchdogs that the dead kernel left running: they are petted while the dump is written, for
//! nobody else does, and never switched off: should the payload hang, they are what reboots the machine.
//!
//! Source: Intel I/O Controller Hub 9 Family Datasheet (316972), 13.9 (TCO), and 100 Series Chipset
//! (332691), 28.8; Intel 6300ESB I/O Controller Hub Datasheet (300641), 16; Arm Base System Architecture
//! (DEN0094C), appendix A (generic watchdog).

use crate::PhysAddr;
use crate::mmio::Registers;
use crate::pci::{ConfigSpace, Function, identity};

/// I/O ports.
pub trait Ports {
    /// Reads two bytes; all ones where there is nothing.
    fn read16(&self, port: u16) -> u16;
    /// Writes two bytes.
    fn write16(&self, port: u16, value: u16);
}

/// Registers of the TCO timer, by their distance from its base port.
mod tco {
    pub const RELOAD: u16 = 0x00;
    pub const STATUS1: u16 = 0x04;
    pub const STATUS2: u16 = 0x06;
    pub const CONTROL1: u16 = 0x08;
    /// Written as ones to be cleared: the first timeout, and the second.
    pub const TIMEOUT: u16 = 1 << 3;
    pub const SECOND_TIMEOUT: u16 = 1 << 1;
    pub const HALTED: u16 = 1 << 11;
}

/// The 6300ESB's: its identity, where in configuration space it says that it is enabled, and its reload
/// register with what unlocks it.
mod esb {
    pub const ID: (u16, u16) = (0x8086, 0x25ab);
    pub const LOCK: u16 = 0x68;
    pub const ENABLED: u32 = 1 << 1;
    pub const RELOAD: u64 = 0x0c;
    pub const UNLOCK: [u16; 2] = [0x80, 0x86];
    pub const RELOAD_TIMER: u16 = 1 << 8;
}

/// Registers of a generic watchdog: the one of the refresh frame, and the one of the control frame that
/// says whether it is enabled.
const SBSA_REFRESH: u64 = 0;
const SBSA_CONTROL: u64 = 0;
const SBSA_ENABLED: u32 = 1;

/// Bytes of registers that a watchdog in memory has.
pub const SIZE: u64 = 16;

const INTEL: u16 = 0x8086;
const ISA_BRIDGE: u16 = 0x0601;
const SMBUS: u16 = 0x0c05;

/// The base port of the TCO timer behind a PCI function, if that is where there is one: the ISA bridge of
/// chipsets up to the 9 series, the SMBus controller of later ones.
#[must_use]
pub fn tco_base(config: &dyn ConfigSpace, at: Function) -> Option<u16> {
    let found = identity(config, at);
    if found.vendor != INTEL {
        return None;
    }
    let base = match found.class {
        // PMBASE, where ACPI_CNTL says that it counts.
        ISA_BRIDGE if config.read(at, 0x44) & 1 << 7 != 0 => {
            (config.read(at, 0x40) as u16 & 0xff80).checked_add(0x60)
        }
        // TCOBASE, where TCOCTL says so.
        SMBUS if config.read(at, 0x54) & 1 << 8 != 0 => Some(config.read(at, 0x50) as u16 & 0xffe0),
        _ => None,
    };
    base.filter(|&base| base > 0x60)
}

/// Where chipsets up to the 9 series have the register whose bit [`NO_REBOOT`] says that the TCO timer resets
/// nothing (GCS, 10.1.75): then it is left alone.
#[must_use]
pub fn tco_no_reboot(config: &dyn ConfigSpace, at: Function) -> Option<PhysAddr> {
    let root = config.read(at, 0xf0);
    let is_there = identity(config, at).class == ISA_BRIDGE && root & 1 != 0;
    is_there.then(|| PhysAddr(u64::from(root & !0x3fff) + 0x3410))
}

/// The timer resets nothing.
pub const NO_REBOOT: u32 = 1 << 5;

/// Whether a PCI function is a 6300ESB watchdog that runs. Its registers are at its first BAR.
#[must_use]
pub fn is_running_esb(config: &dyn ConfigSpace, at: Function) -> bool {
    let found = identity(config, at);
    (found.vendor, found.device) == esb::ID && config.read(at, esb::LOCK) & esb::ENABLED != 0
}

/// A watchdog that runs.
pub enum Watchdog<R> {
    /// The TCO timer at this base port.
    Tco(u16),
    /// The 6300ESB's, by its registers.
    Esb(R),
    /// A generic watchdog, by its refresh frame.
    Sbsa(R),
}

impl<R: Registers> Watchdog<R> {
    /// The TCO timer at `base`, if it runs.
    #[must_use]
    pub fn tco(ports: &dyn Ports, base: u16) -> Option<Watchdog<R>> {
        let control = ports.read16(base.checked_add(tco::CONTROL1)?);
        (control & tco::HALTED == 0).then_some(Watchdog::Tco(base))
    }

    /// The generic watchdog with these frames, if it runs.
    #[must_use]
    pub fn sbsa(refresh: R, control: &R) -> Option<Watchdog<R>> {
        let status = control.read32(SBSA_CONTROL);
        (status != u32::MAX && status & SBSA_ENABLED != 0).then_some(Watchdog::Sbsa(refresh))
    }

    /// Makes it begin anew.
    pub fn pet(&self, ports: &dyn Ports) {
        match self {
            Watchdog::Tco(base) => {
                let write =
                    |register: u16, value| ports.write16(base.wrapping_add(register), value);
                write(tco::RELOAD, 1);
                // It has to run out twice.
                write(tco::STATUS1, tco::TIMEOUT);
                write(tco::STATUS2, tco::SECOND_TIMEOUT);
            }
            Watchdog::Esb(registers) => {
                esb::UNLOCK.iter().for_each(|&key| registers.write16(esb::RELOAD, key));
                registers.write16(esb::RELOAD, esb::RELOAD_TIMER);
            }
            Watchdog::Sbsa(refresh) => refresh.write32(SBSA_REFRESH, 1),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Watchdog::Tco(_) => "TCO",
            Watchdog::Esb(_) => "6300ESB",
            Watchdog::Sbsa(_) => "generic",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tests::{AT, FakeConfig};
    use core::cell::RefCell;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// Ports or registers: what they hold, and what was written.
    #[derive(Default)]
    struct Fake(BTreeMap<u64, u32>, RefCell<Vec<(u64, u32)>>);

    impl Ports for Fake {
        fn read16(&self, port: u16) -> u16 {
            self.0.get(&port.into()).map_or(u16::MAX, |&value| value as u16)
        }
        fn write16(&self, port: u16, value: u16) {
            self.1.borrow_mut().push((port.into(), value.into()));
        }
    }

    impl Registers for Fake {
        fn read8(&self, _: u64) -> u8 {
            panic!("access of 8 bits")
        }
        fn read16(&self, _: u64) -> u16 {
            panic!("access of 16 bits")
        }
        fn read32(&self, offset: u64) -> u32 {
            self.0.get(&offset).copied().unwrap_or(0)
        }
        fn write8(&self, _: u64, _: u8) {
            panic!("access of 8 bits")
        }
        fn write16(&self, offset: u64, value: u16) {
            self.1.borrow_mut().push((offset, value.into()));
        }
        fn write32(&self, offset: u64, value: u32) {
            self.1.borrow_mut().push((offset, value));
        }
    }

    fn base(words: &[(u16, u32)]) -> Option<u16> {
        tco_base(&FakeConfig::new(words), AT)
    }

    #[test]
    fn tco_timer_is_found_in_old_and_new_chipsets() {
        let isa = [(0, 0x2918_8086), (8, 0x0601_0000), (0x40, 0x601), (0x44, 0x80)];
        assert_eq!(base(&isa), Some(0x660));
        let smbus = [(0, 0xa323_8086), (8, 0x0c05_0000), (0x50, 0x401), (0x54, 0x100)];
        assert_eq!(base(&smbus), Some(0x400));
        for (index, word) in [(2, (0x40, 0)), (3, (0x44, 0)), (0, (0, 0x2918_1022)), (1, (8, 0))] {
            let mut other = isa;
            other[index] = word;
            assert_eq!(base(&other), None, "{word:x?}");
        }
        let with_root = [isa.as_slice(), &[(0xf0, 0xfed1_c001)]].concat();
        let place = |words: &[_]| tco_no_reboot(&FakeConfig::new(words), AT);
        assert_eq!(place(&with_root), Some(PhysAddr(0xfed1_f410)));
        assert_eq!(place(&isa), None);
        let mut off = smbus;
        off[3] = (0x54, 0);
        assert_eq!(base(&off), None);
    }

    #[test]
    fn tco_timer_that_runs_begins_anew_and_forgets_that_it_ran_out() {
        let halted = Fake(BTreeMap::from([(0x668, 0x800)]), RefCell::default());
        assert!(Watchdog::<Fake>::tco(&halted, 0x660).is_none());
        let absent = Fake::default();
        assert!(Watchdog::<Fake>::tco(&absent, 0x660).is_none());
        let running = Fake(BTreeMap::from([(0x668, 0)]), RefCell::default());
        let watchdog = Watchdog::<Fake>::tco(&running, 0x660).unwrap();
        watchdog.pet(&running);
        assert_eq!(*running.1.borrow(), [(0x660, 1), (0x664, 8), (0x666, 2)]);
    }

    #[test]
    fn esb_is_petted_by_the_words_that_unlock_it() {
        let running = FakeConfig::new(&[(0, 0x25ab_8086), (0x68, 2)]);
        assert!(is_running_esb(&running, AT));
        assert!(!is_running_esb(&FakeConfig::new(&[(0, 0x25ab_8086)]), AT));
        let watchdog = Watchdog::Esb(Fake::default());
        watchdog.pet(&Fake::default());
        let Watchdog::Esb(registers) = watchdog else { panic!() };
        assert_eq!(*registers.1.borrow(), [(0xc, 0x80), (0xc, 0x86), (0xc, 0x100)]);
    }

    #[test]
    fn generic_watchdog_is_petted_when_it_is_enabled() {
        let control = |status| Fake(BTreeMap::from([(0, status)]), RefCell::default());
        assert!(Watchdog::sbsa(Fake::default(), &control(0)).is_none());
        assert!(Watchdog::sbsa(Fake::default(), &control(u32::MAX)).is_none(), "it is gone");
        let watchdog = Watchdog::sbsa(Fake::default(), &control(5)).unwrap();
        watchdog.pet(&Fake::default());
        let Watchdog::Sbsa(refresh) = watchdog else { panic!() };
        assert_eq!(*refresh.1.borrow(), [(0, 1)]);
    }
}
