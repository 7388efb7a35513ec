//! The end: every way to restart or switch off the machine, one after the other.

use core::arch::asm;

use drivers::firmware::Firmware;
use x86_64::VirtAddr;
use x86_64::instructions::{hlt, interrupts, port::Port, port::PortWriteOnly, tables::lidt};
use x86_64::structures::DescriptorTablePointer;

/// Turns of a short wait; a port access takes about a microsecond.
const WAIT: u32 = 100_000;

/// Restarts the machine: ACPI reset register, keyboard controller, reset control register, and at
/// last a triple fault, which no machine survives.
pub fn reboot(firmware: Option<&Firmware>) -> ! {
    if let Some((port, value)) = firmware.and_then(|firmware| firmware.reset) {
        // SAFETY: FADT names this port for this.
        unsafe { PortWriteOnly::<u8>::new(port).write(value) };
        wait();
    }
    // SAFETY: port 0x64 is the keyboard controller's, whose command 0xFE pulses the reset line;
    // port 0xCF9 is the chipset's reset control register, 6 asks for a full reset. A machine that
    // lacks them ignores the writes.
    unsafe {
        PortWriteOnly::<u8>::new(0x64).write(0xfe);
        wait();
        let mut control = Port::<u8>::new(0xcf9);
        control.write(2);
        control.write(6);
        wait();
    }
    triple_fault()
}

/// Switches the machine off through ACPI. Where that cannot be done it halts, so that whoever
/// asked for "off" does not get a restart.
pub fn power_off(firmware: Option<&Firmware>) -> ! {
    if let Some(off) = firmware.and_then(|firmware| firmware.soft_off) {
        const SLEEP_ENABLE: u16 = 1 << 13;
        let control = |sleep_type: u8| u16::from(sleep_type) << 10 | SLEEP_ENABLE;
        // SAFETY: FADT names these ports for this, and DSDT the values.
        unsafe {
            PortWriteOnly::<u16>::new(off.pm1a).write(control(off.sleep_type.0));
            if let Some(pm1b) = off.pm1b {
                PortWriteOnly::<u16>::new(pm1b).write(control(off.sleep_type.1));
            }
        }
        wait();
    }
    halt()
}

/// Stops this CPU for good.
pub fn halt() -> ! {
    loop {
        interrupts::disable();
        hlt();
    }
}

/// Resets the CPU, and with it the machine, by a fault that cannot be delivered.
pub(super) fn triple_fault() -> ! {
    let nothing = DescriptorTablePointer { limit: 0, base: VirtAddr::zero() };
    // SAFETY: this is the end: an empty table makes every fault a triple fault.
    unsafe {
        lidt(&nothing);
        asm!("ud2", options(noreturn));
    }
}

fn wait() {
    for _ in 0..WAIT {
        // SAFETY: port 0x80 shows POST codes; writing to it takes a microsecond and does nothing.
        unsafe { PortWriteOnly::<u8>::new(0x80).write(0) }
    }
}
