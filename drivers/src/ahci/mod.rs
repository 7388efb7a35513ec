//! AHCI controllers and the SATA disks on their ports, polled.
//!
//! A controller is reset once; then its ports are opened one after the other. A disk with native
//! command queuing gets as many requests at once as controller and disk take, any other one at a time.
//!
//! Source: Serial ATA Advanced Host Controller Interface (AHCI) 1.3.1, section numbers without
//! another name are of that document; AT Attachment 8 - ATA/ATAPI Command Set (ATA8-ACS, T13/1699-D).

pub mod disk;
#[cfg(test)]
mod fake;
mod identify;
pub mod pci;
mod port;

use core::cell::Cell;
use core::fmt;

pub use disk::AhciDisk;
pub use pci::{is_controller, open};
pub use port::Port;

use crate::clock::{Clock, Deadline, TimedOut};
use crate::mmio::Registers;

/// Registers of the controller (section 3.1).
mod register {
    pub const CAP: u64 = 0x00;
    pub const GHC: u64 = 0x04;
    pub const PI: u64 = 0x0c;
    pub const CAP2: u64 = 0x24;
    pub const BOHC: u64 = 0x28;
    /// The ports' registers follow (section 3.3).
    pub const PORTS: u64 = 0x100;
    pub const PORT_BYTES: u64 = 0x80;
}

/// What the controller can do (section 3.1.1).
mod capability {
    pub const SLOTS_SHIFT: u32 = 8;
    pub const NATIVE_COMMAND_QUEUING: u32 = 1 << 30;
    pub const ADDRESSES_OF_64_BITS: u32 = 1 << 31;
}

/// Bits of CAP2 (section 3.1.10).
const CAP2_HANDOFF: u32 = 1 << 0;

/// Global control (section 3.1.2).
mod control {
    pub const RESET: u32 = 1 << 0;
    pub const INTERRUPTS: u32 = 1 << 1;
    pub const AHCI_ENABLE: u32 = 1 << 31;
}

/// Handoff from the firmware (section 3.1.11).
mod handoff {
    pub const OWNED_BY_FIRMWARE: u32 = 1 << 0;
    pub const OWNED_BY_US: u32 = 1 << 1;
}

/// Longest wait for firmware to let go (section 10.6.3): it has 25 ms to say that it is busy, and
/// then two seconds.
const HANDOFF_US: u64 = 2_025_000;

/// Longest reset of the controller (section 10.4.3).
const RESET_US: u64 = 1_000_000;

/// How long after the reset a disk may be unseen. It answers within 10 ms (Serial ATA Revision 3.0,
/// 8.4.1 and 8.4.2); what has not answered by then is no disk.
const PRESENCE_US: u64 = 100_000;

/// What registers read as when nobody answers.
const GONE: u32 = u32::MAX;

/// Why a controller, or a disk on one of its ports, cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The controller did not finish its reset, or is gone.
    Reset,
    /// There is nothing on this port, or no disk: a CD drive, a port multiplier.
    NoDisk,
    /// The port did not stop.
    Stop,
    /// Something is on this port, but the link to it does not come up.
    Link,
    /// The disk does not become ready.
    Busy,
    /// The disk did not say what it is.
    Identify,
    /// The disk is not one that can be written with 48-bit addresses and DMA.
    Unsupported,
    /// The disk wants a password first.
    Locked,
    /// The disk says of itself what cannot be.
    Config,
    /// No DMA memory is left, or none that the controller reaches.
    Memory,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OpenError::Reset => "does not reset",
            OpenError::NoDisk => "has no disk",
            OpenError::Stop => "does not stop",
            OpenError::Link => "its link does not come up",
            OpenError::Busy => "does not become ready",
            OpenError::Identify => "does not say what it is",
            OpenError::Unsupported => "lacks 48-bit addresses, DMA or a flush of its cache",
            OpenError::Locked => "is locked with a password",
            OpenError::Config => "has an impossible configuration",
            OpenError::Memory => "no DMA memory is left that its controller reaches",
        })
    }
}

/// A controller that was reset.
pub struct Controller<R> {
    registers: R,
    limits: Limits,
    /// Until when a disk may be unseen.
    presence: Cell<Deadline>,
}

/// What a controller said of itself before its reset. Some lose what their firmware wrote there (Linux
/// 6.1, drivers/ata/libahci.c, ahci_save_initial_config), so it is not asked again.
#[derive(Clone, Copy)]
struct Limits {
    capabilities: u32,
    /// The ports that there are, as bits.
    ports: u32,
}

impl<R: Registers> Controller<R> {
    /// Takes the controller from the firmware and resets it. Afterwards it does nothing by itself,
    /// and makes no interrupts. All disks are called at once: they were spinning a moment ago, so
    /// nothing is gained by doing so in turn, as section 10.10 has it for power's sake.
    ///
    /// # Errors
    /// [`OpenError::Reset`]
    pub fn new(registers: R, clock: &dyn Clock) -> Result<Controller<R>, OpenError> {
        if registers.read32(register::GHC) == GONE {
            return Err(OpenError::Reset);
        }
        set(&registers, register::GHC, control::AHCI_ENABLE);
        take_from_firmware(&registers, clock);
        let limits = Limits {
            capabilities: registers.read32(register::CAP),
            ports: registers.read32(register::PI),
        };
        let presence = Cell::new(Deadline::after_us(clock, PRESENCE_US));
        let controller = Controller { registers, limits, presence };
        controller.reset(clock).map_err(|TimedOut| OpenError::Reset)?;
        Ok(controller)
    }

    /// The ports that there are.
    pub fn ports(&self) -> impl Iterator<Item = u8> + use<R> {
        let ports = self.limits.ports;
        (0..32).filter(move |port| ports & 1 << port != 0)
    }

    /// Whether it reaches memory above 4 GiB.
    #[must_use]
    pub fn is_wide(&self) -> bool {
        self.has(capability::ADDRESSES_OF_64_BITS)
    }

    /// Resets the controller, all ports with it, and leaves interrupts off (section 10.4.3).
    fn reset(&self, clock: &dyn Clock) -> Result<(), TimedOut> {
        let registers = &self.registers;
        set(registers, register::GHC, control::RESET);
        // A controller that is gone reads as all ones: in reset for ever.
        Deadline::after_us(clock, RESET_US).poll(clock, || {
            (registers.read32(register::GHC) & control::RESET == 0).then_some(())
        })?;
        set(registers, register::GHC, control::AHCI_ENABLE);
        let ghc = registers.read32(register::GHC);
        registers.write32(register::GHC, ghc & !control::INTERRUPTS);
        for port in self.ports() {
            port::spin_up(registers, port);
        }
        self.presence.set(Deadline::after_us(clock, PRESENCE_US));
        Ok(())
    }

    /// How many requests a port takes at once.
    fn slots(&self) -> u16 {
        (self.limits.capabilities >> capability::SLOTS_SHIFT & 0x1f) as u16 + 1
    }

    fn has(&self, capability: u32) -> bool {
        self.limits.capabilities & capability != 0
    }

    /// Whether the controller reaches `size` bytes of memory at `at`. Addresses of data are of 64
    /// bits or of 32 (section 3.1.1, S64A), and even (section 4.2.3.3).
    fn reaches(&self, at: crate::PhysAddr, size: u64) -> bool {
        let last = at.0.checked_add(size.saturating_sub(1));
        let limit = if self.is_wide() { u64::MAX } else { 0xffff_ffff };
        at.0.is_multiple_of(2) && last.is_some_and(|last| last <= limit)
    }
}

fn set(registers: &impl Registers, register: u64, bits: u32) {
    registers.write32(register, registers.read32(register) | bits);
}

/// Asks firmware that may still use the controller to leave it (section 10.6.3). What does not let
/// go within the time is overruled by the reset that follows.
fn take_from_firmware(registers: &impl Registers, clock: &dyn Clock) {
    if registers.read32(register::CAP2) & CAP2_HANDOFF == 0 {
        return;
    }
    set(registers, register::BOHC, handoff::OWNED_BY_US);
    let _ = Deadline::after_us(clock, HANDOFF_US).poll(clock, || {
        (registers.read32(register::BOHC) & handoff::OWNED_BY_FIRMWARE == 0).then_some(())
    });
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
