//! A port of a controller: stopped, started, and the link to its disk.

use crate::PhysAddr;
use crate::ahci::{Controller, GONE, OpenError, register};
use crate::clock::{Clock, Deadline, TimedOut};
use crate::lent::Reset;
use crate::mmio::Registers;

/// Registers of a port (section 3.3).
pub mod at {
    pub const COMMAND_LIST: u64 = 0x00;
    pub const RECEIVED: u64 = 0x08;
    pub const INTERRUPT_STATUS: u64 = 0x10;
    pub const INTERRUPT_ENABLE: u64 = 0x14;
    pub const COMMAND: u64 = 0x18;
    pub const TASK_FILE: u64 = 0x20;
    pub const SIGNATURE: u64 = 0x24;
    pub const SATA_STATUS: u64 = 0x28;
    pub const SATA_CONTROL: u64 = 0x2c;
    pub const SATA_ERROR: u64 = 0x30;
    pub const SATA_ACTIVE: u64 = 0x34;
    pub const COMMAND_ISSUE: u64 = 0x38;
}

/// Bits of the port's command register (section 3.3.7).
pub mod command {
    pub const START: u32 = 1 << 0;
    pub const SPIN_UP: u32 = 1 << 1;
    pub const POWER_ON: u32 = 1 << 2;
    pub const RECEIVE: u32 = 1 << 4;
    pub const RECEIVING: u32 = 1 << 14;
    pub const RUNNING: u32 = 1 << 15;
    /// Interface communication control: leave any state that saves power.
    pub const ACTIVE: u32 = 1 << 28;
}

/// The disk's status in the task file (section 3.3.8; ATA8-ACS 6.3).
pub mod status {
    pub const ERROR: u32 = 1 << 0;
    pub const DATA_REQUEST: u32 = 1 << 3;
    pub const FAULT: u32 = 1 << 5;
    pub const BUSY: u32 = 1 << 7;
}

/// Bits of the interrupt status after which the port goes on only when it is started anew (section
/// 6.2.2.1): task file error, host bus fatal and data errors, interface fatal error.
pub const FATAL: u32 = 1 << 30 | 1 << 29 | 1 << 28 | 1 << 27;

/// Device detection in SATA status (section 3.3.10): nothing; something, and the link to it is up; the
/// link is switched off.
mod detection {
    pub const MASK: u32 = 0xf;
    pub const NOTHING: u32 = 0;
    pub const UP: u32 = 3;
    pub const OFF: u32 = 4;
}

/// SATA control (section 3.3.11): begin a COMRESET; never leave the active state to save power.
const COMRESET: u32 = 1;
const STAY_ACTIVE: u32 = 3 << 8;

/// The signature of a disk (section 5.3.1; ATA8-ACS 5.5.1), as the port shows it.
const ATA_DISK: u32 = 0x0000_0101;

/// Longest wait for a port to stop (section 10.1.2).
const STOP_US: u64 = 500_000;

/// How long a COMRESET is signalled (section 10.4.2).
const COMRESET_US: u64 = 1_000;

/// Longest wait for the link. The link itself takes milliseconds; Linux waits for two seconds at most
/// (6.1, drivers/ata/libata-core.c, sata_deb_timing_long).
const LINK_US: u64 = 1_000_000;

/// Longest wait for a disk that resets. Most are still spinning.
const READY_US: u64 = 10_000_000;

/// Has the disk on `port` spin up and talk to us (section 10.10.1), on controllers that do not do so
/// by themselves.
pub fn spin_up(registers: &impl Registers, port: u8) {
    let command = base(port) + at::COMMAND;
    let value = registers.read32(command) | command::SPIN_UP | command::POWER_ON | command::ACTIVE;
    registers.write32(command, value);
}

fn base(port: u8) -> u64 {
    register::PORTS + u64::from(port) * register::PORT_BYTES
}

/// A port of a controller.
pub struct Port<'a, R> {
    pub(super) controller: &'a Controller<R>,
    number: u8,
}

impl<'a, R: Registers> Port<'a, R> {
    pub(super) fn new(controller: &'a Controller<R>, number: u8) -> Port<'a, R> {
        Port { controller, number }
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        self.controller.registers.read32(base(self.number) + register)
    }

    pub(super) fn write(&self, register: u64, value: u32) {
        self.controller.registers.write32(base(self.number) + register, value);
    }

    fn write_address(&self, register: u64, PhysAddr(address): PhysAddr) {
        self.write(register, address as u32);
        // Without 64-bit addresses the upper half is read-only, and zero (section 3.3.2).
        self.write(register + 4, (address >> 32) as u32);
    }

    fn detection(&self) -> u32 {
        self.read(at::SATA_STATUS) & detection::MASK
    }

    /// Whether nobody answers for the port any more.
    pub(super) fn is_gone(&self) -> bool {
        self.read(at::SATA_STATUS) == GONE
    }

    /// Waits until the link to the disk is up.
    ///
    /// # Errors
    /// [`OpenError::NoDisk`] when nothing is there, [`OpenError::Link`] when something is that does
    /// not talk.
    pub(super) fn wait_for_link(&self, clock: &dyn Clock) -> Result<(), OpenError> {
        let seen = self.controller.presence.get().poll(clock, || match self.detection() {
            detection::NOTHING => None,
            detection::OFF => Some(Err(OpenError::NoDisk)),
            _ => Some(Ok(())),
        });
        seen.unwrap_or(Err(OpenError::NoDisk))?;
        let up = || (self.detection() == detection::UP).then_some(());
        Deadline::after_us(clock, LINK_US).poll(clock, up).map_err(|TimedOut| OpenError::Link)
    }

    /// Tells the stopped port where its memory is, and has it receive what the disk says.
    pub(super) fn receive(&self, command_list: PhysAddr, received: PhysAddr) {
        self.write(at::INTERRUPT_ENABLE, 0);
        self.write_address(at::COMMAND_LIST, command_list);
        self.write_address(at::RECEIVED, received);
        self.clear();
        self.set_command(command::RECEIVE);
    }

    /// Clears what happened before: errors and interrupts stay until ones are written.
    fn clear(&self) {
        self.write(at::SATA_ERROR, u32::MAX);
        self.write(at::INTERRUPT_STATUS, u32::MAX);
    }

    /// Waits until the disk is ready after a reset.
    ///
    /// # Errors
    /// [`OpenError::Busy`]
    pub(super) fn wait_until_ready(&self, clock: &dyn Clock) -> Result<(), OpenError> {
        let busy = status::BUSY | status::DATA_REQUEST;
        let ready = || (self.read(at::TASK_FILE) & busy == 0).then_some(());
        Deadline::after_us(clock, READY_US).poll(clock, ready).map_err(|TimedOut| OpenError::Busy)
    }

    /// Whether what is ready on this port is a disk.
    pub(super) fn is_disk(&self) -> bool {
        self.read(at::SIGNATURE) == ATA_DISK
    }

    /// Lets the port take commands; it must receive, and the disk be ready (section 10.3.1).
    pub(super) fn start(&self) {
        self.clear();
        self.set_command(command::START);
    }

    fn set_command(&self, bits: u32) {
        self.write(at::COMMAND, self.read(at::COMMAND) | bits);
    }

    /// Makes the port leave its memory alone (section 10.1.2): first the commands stop, then what the
    /// disk says. A port that is gone never stops.
    pub(super) fn stop(&self, clock: &dyn Clock) -> Result<(), TimedOut> {
        for (bit, runs) in
            [(command::START, command::RUNNING), (command::RECEIVE, command::RECEIVING)]
        {
            self.write(at::COMMAND, self.read(at::COMMAND) & !bit);
            let stopped = || (self.read(at::COMMAND) & runs == 0).then_some(());
            Deadline::after_us(clock, STOP_US).poll(clock, stopped)?;
        }
        Ok(())
    }

    /// Resets the disk on the stopped port, and waits until the link is up again (section 10.4.2).
    ///
    /// # Errors
    /// [`OpenError::Link`]
    pub(super) fn reset_disk(&self, clock: &dyn Clock) -> Result<(), OpenError> {
        self.write(at::SATA_CONTROL, STAY_ACTIVE | COMRESET);
        let signalled = Deadline::after_us(clock, COMRESET_US);
        let _ = signalled.poll(clock, || None::<()>);
        self.write(at::SATA_CONTROL, STAY_ACTIVE);
        let up = || (self.detection() == detection::UP).then_some(());
        Deadline::after_us(clock, LINK_US).poll(clock, up).map_err(|TimedOut| OpenError::Link)
    }
}

impl<R: Registers> Reset for Port<'_, R> {
    /// Stops the port; if it does not stop, resets its controller.
    fn reset(&self, clock: &dyn Clock) -> Result<(), TimedOut> {
        self.stop(clock).or_else(|TimedOut| self.controller.reset(clock))
    }
}
