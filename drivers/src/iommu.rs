//! IOMMUs, switched off.
//!
//! The dead kernel's still translate what devices ask for, to where its own buffers were. We know nothing of
//! these tables and want none: with translation off, addresses of devices are those of memory. Before it is
//! switched off no device may be bus master, or what it still does would reach memory that it never meant.
//!
//! Source: Intel Virtualization Technology for Directed I/O 4.1, 11.4; AMD I/O Virtualization Technology
//! (IOMMU) Specification 3.08, 3.4; Arm System Memory Management Unit Architecture 3 (IHI 0070), 6.3.

use crate::clock::{Clock, Deadline, TimedOut};
use crate::firmware::IommuKind;
use crate::mmio::Registers;

/// Bytes of registers that are touched.
pub const SIZE: u64 = 0x100;

/// Longest wait for an IOMMU to do what it is told. They take microseconds; Linux waits for a second.
const WAIT_US: u64 = 1_000_000;

/// Registers of VT-d (11.4.4, 11.4.16), all of 32 bits.
mod vtd {
    pub const VERSION: u64 = 0x00;
    pub const COMMAND: u64 = 0x18;
    pub const STATUS: u64 = 0x1c;
    pub const PROTECTED: u64 = 0x64;
    pub const TRANSLATION: u32 = 1 << 31;
    /// Bits of the status that are switches; writing the others to the command has effects of its own.
    pub const SWITCHES: u32 = 0x96ff_ffff;
    pub const PROTECTION_ENABLE: u32 = 1 << 31;
    pub const PROTECTION_STATUS: u32 = 1;
}

/// The control register of AMD's (3.4.11), its lower half.
mod amd {
    pub const CONTROL: u64 = 0x18;
    pub const ENABLE: u32 = 1;
}

/// Registers of the SMMU (6.3).
mod smmu {
    pub const CR0: u64 = 0x20;
    pub const CR0ACK: u64 = 0x24;
    /// What becomes of requests while it is off.
    pub const GBPA: u64 = 0x44;
    pub const GBPA_ABORT: u32 = 1 << 20;
    pub const GBPA_UPDATE: u32 = 1 << 31;
    pub const ENABLE: u32 = 1;
}

/// Switches an IOMMU off. Returns whether it was on.
///
/// # Errors
/// [`TimedOut`] when it does not obey, or is gone: nobody knows what it does to requests then.
pub fn switch_off(
    kind: IommuKind,
    registers: &dyn Registers,
    clock: &dyn Clock,
) -> Result<bool, TimedOut> {
    match kind {
        IommuKind::VtD => switch_off_vtd(registers, clock),
        IommuKind::AmdVi => switch_off_amd(registers, clock),
        IommuKind::SmmuV3 => switch_off_smmu(registers, clock),
    }
}

/// Waits until none of `bits` is set in `register`. All ones is what a device says that is gone.
fn wait_clear(
    registers: &dyn Registers,
    clock: &dyn Clock,
    register: u64,
    bits: u32,
) -> Result<(), TimedOut> {
    Deadline::after_us(clock, WAIT_US)
        .poll(clock, || (registers.read32(register) & bits == 0).then_some(()))
}

fn switch_off_vtd(registers: &dyn Registers, clock: &dyn Clock) -> Result<bool, TimedOut> {
    if registers.read32(vtd::VERSION) == u32::MAX {
        return Err(TimedOut);
    }
    let status = registers.read32(vtd::STATUS);
    let was_on = status & vtd::TRANSLATION != 0;
    if was_on {
        registers.write32(vtd::COMMAND, status & vtd::SWITCHES & !vtd::TRANSLATION);
        wait_clear(registers, clock, vtd::STATUS, vtd::TRANSLATION)?;
    }
    // Memory that firmware keeps devices from, where there is such a register at all.
    let protected = registers.read32(vtd::PROTECTED);
    if protected & vtd::PROTECTION_STATUS != 0 {
        registers.write32(vtd::PROTECTED, protected & !vtd::PROTECTION_ENABLE);
        wait_clear(registers, clock, vtd::PROTECTED, vtd::PROTECTION_STATUS)?;
    }
    Ok(was_on)
}

fn switch_off_amd(registers: &dyn Registers, clock: &dyn Clock) -> Result<bool, TimedOut> {
    let control = registers.read32(amd::CONTROL);
    if control == u32::MAX {
        return Err(TimedOut);
    }
    registers.write32(amd::CONTROL, control & !amd::ENABLE);
    wait_clear(registers, clock, amd::CONTROL, amd::ENABLE)?;
    Ok(control & amd::ENABLE != 0)
}

fn switch_off_smmu(registers: &dyn Registers, clock: &dyn Clock) -> Result<bool, TimedOut> {
    // An update that is under way comes first.
    wait_clear(registers, clock, smmu::GBPA, smmu::GBPA_UPDATE)?;
    let bypass = registers.read32(smmu::GBPA) & !smmu::GBPA_ABORT;
    registers.write32(smmu::GBPA, bypass | smmu::GBPA_UPDATE);
    wait_clear(registers, clock, smmu::GBPA, smmu::GBPA_UPDATE)?;
    let control = registers.read32(smmu::CR0);
    registers.write32(smmu::CR0, control & !smmu::ENABLE);
    wait_clear(registers, clock, smmu::CR0ACK, smmu::ENABLE)?;
    Ok(control & smmu::ENABLE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// An IOMMU whose status follows its commands, or does not.
    struct Fake {
        kind: IommuKind,
        words: RefCell<BTreeMap<u64, u32>>,
        writes: RefCell<Vec<(u64, u32)>>,
        obeys: bool,
        now: Cell<u64>,
    }

    impl Fake {
        fn new(kind: IommuKind, words: &[(u64, u32)]) -> Fake {
            let words = RefCell::new(words.iter().copied().collect());
            Fake { kind, words, writes: RefCell::default(), obeys: true, now: Cell::new(0) }
        }

        fn switch_off(&self) -> Result<bool, TimedOut> {
            switch_off(self.kind, self, self)
        }
    }

    impl Clock for Fake {
        fn now_us(&self) -> u64 {
            self.now.set(self.now.get() + 1000);
            self.now.get()
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
            self.words.borrow().get(&offset).copied().unwrap_or(0)
        }
        fn write8(&self, _: u64, _: u8) {
            panic!("access of 8 bits")
        }
        fn write16(&self, _: u64, _: u16) {
            panic!("access of 16 bits")
        }
        fn write32(&self, offset: u64, value: u32) {
            self.writes.borrow_mut().push((offset, value));
            let mut words = self.words.borrow_mut();
            if !self.obeys {
                return;
            }
            match (self.kind, offset) {
                (IommuKind::VtD, 0x18) => {
                    let status = words.get(&0x1c).copied().unwrap_or(0);
                    assert_eq!(value & !0x96ff_ffff, 0, "a command that is not a switch");
                    words.insert(0x1c, status & 0x7fff_ffff | value & 1 << 31);
                }
                (IommuKind::VtD, 0x64) => drop(words.insert(0x64, value & !1 | value >> 31)),
                (IommuKind::SmmuV3, 0x44) => drop(words.insert(0x44, value & !(1 << 31))),
                (IommuKind::SmmuV3, 0x20) => {
                    words.insert(0x20, value);
                    words.insert(0x24, value);
                }
                _ => drop(words.insert(offset, value)),
            }
        }
    }

    const KINDS: [IommuKind; 3] = [IommuKind::VtD, IommuKind::AmdVi, IommuKind::SmmuV3];

    #[test]
    fn vtd_loses_translation_and_keeps_its_other_switches() {
        // Translation, root table pointer, queued invalidation, interrupt remapping.
        let fake = Fake::new(IommuKind::VtD, &[(0, 0x10), (0x1c, 0xc700_0000)]);
        assert_eq!(fake.switch_off(), Ok(true));
        assert_eq!(*fake.writes.borrow(), [(0x18, 0x0600_0000)]);
        assert_eq!(fake.switch_off(), Ok(false), "it is off now");
    }

    #[test]
    fn memory_that_firmware_protects_is_opened() {
        let fake = Fake::new(IommuKind::VtD, &[(0, 0x10), (0x64, 0x8000_0001)]);
        assert_eq!(fake.switch_off(), Ok(false));
        assert_eq!(fake.read32(0x64), 0);
    }

    #[test]
    fn amd_keeps_all_but_the_enable_bit() {
        let fake = Fake::new(IommuKind::AmdVi, &[(0x18, 0x1005)]);
        assert_eq!(fake.switch_off(), Ok(true));
        assert_eq!(fake.read32(0x18), 0x1004);
        assert_eq!(fake.switch_off(), Ok(false));
    }

    #[test]
    fn smmu_lets_everything_pass_before_it_is_off() {
        let words = [(0x20, 0xd), (0x24, 0xd), (0x44, 1 << 20 | 0x1000)];
        let fake = Fake::new(IommuKind::SmmuV3, &words);
        assert_eq!(fake.switch_off(), Ok(true));
        assert_eq!(*fake.writes.borrow(), [(0x44, 1 << 31 | 0x1000), (0x20, 0xc)]);
    }

    #[test]
    fn one_that_does_not_obey_or_is_gone_is_told() {
        for kind in KINDS {
            let on = [(0, 0x10), (0x18, 1), (0x1c, 1 << 31), (0x20, 1), (0x24, 1)];
            let mut stubborn = Fake::new(kind, &on);
            stubborn.obeys = false;
            assert_eq!(stubborn.switch_off(), Err(TimedOut), "{kind:?}");
            let all_ones: Vec<_> = (0..SIZE).step_by(4).map(|at| (at, u32::MAX)).collect();
            let gone = Fake::new(kind, &all_ones);
            assert_eq!(gone.switch_off(), Err(TimedOut), "{kind:?}");
            assert!(stubborn.now.get() + gone.now.get() < 2 * WAIT_US + 100_000);
        }
    }
}
