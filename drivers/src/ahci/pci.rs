//! AHCI controllers on PCI (section 2).

use crate::Physical;
use crate::ahci::{Controller, OpenError, register};
use crate::clock::Clock;
use crate::mmio::{Mmio, Registers};
use crate::pci::{self, BarError, ConfigSpace, Function, Identity};

use core::fmt;

/// Class and subclass of a SATA controller, and the programming interface of one that speaks AHCI (section
/// 2.1.5).
const SATA: u16 = 0x0106;
const AHCI: u8 = 1;

/// The BAR of the registers, "ABAR" (section 2.1.11).
const BAR: u8 = 5;

/// Why a controller cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Its registers cannot be reached.
    Bar(BarError),
    /// It does not do what it should.
    Controller(OpenError),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unusable::Bar(error) => error.fmt(f),
            Unusable::Controller(error) => error.fmt(f),
        }
    }
}

/// Whether it is an AHCI controller. One that firmware has set to pretend to be IDE is not.
#[must_use]
pub fn is_controller(identity: Identity) -> bool {
    identity.class == SATA && identity.interface == AHCI
}

/// Maps the registers of the controller at `at`, resets it, and only then lets it be bus master: it
/// may still hold the dead kernel's commands.
///
/// # Errors
/// [`Unusable`] when its registers cannot be reached, or it does not reset.
pub fn open(
    config: &dyn ConfigSpace,
    physical: &dyn Physical,
    clock: &dyn Clock,
    at: Function,
) -> Result<Controller<Mmio>, Unusable> {
    let map = |size| pci::map_bar(config, physical, at, BAR, 0, size).map_err(Unusable::Bar);
    // Before its memory is decoded: it may have none yet.
    pci::stop_bus_master(config, at);
    let head = map(register::PORTS)?;
    pci::enable(config, at, false);
    let registers = map(bytes(head.read32(register::PI)))?;
    let controller = Controller::new(registers, clock).map_err(Unusable::Controller)?;
    pci::enable(config, at, true);
    Ok(controller)
}

/// Bytes of the registers when `ports` are there. The BAR may end right behind them.
fn bytes(ports: u32) -> u64 {
    register::PORTS + u64::from(32 - ports.leading_zeros()) * register::PORT_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tests::{AT, FakeConfig};

    #[test]
    fn controllers_that_speak_ahci_are_known_by_their_class() {
        let is = |class| is_controller(pci::identity(&FakeConfig::new(&[(8, class)]), AT));
        assert!(is(0x0106_0102));
        assert!(!is(0x0106_0002), "a vendor's own interface");
        assert!(!is(0x0101_8a02), "IDE");
        assert!(!is(0x0108_0202), "NVMe");
    }

    #[test]
    fn registers_end_behind_the_last_port() {
        assert_eq!(bytes(0), 0x100);
        assert_eq!(bytes(0b11_0011), 0x400);
        assert_eq!(bytes(u32::MAX), 0x1100);
    }
}
