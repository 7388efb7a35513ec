//! The end: restart or switch off the machine through PSCI.
//!
//! Source: Arm Power State Coordination Interface (DEN 0022), 5.1.9 and 5.1.10.

use aarch64_cpu::asm;
use drivers::firmware::{Firmware, PsciConduit};
use smccc::{Hvc, Smc, psci};

/// Restarts the machine: PSCI SYSTEM_RESET. Where firmware does not say how PSCI is called, the
/// machine halts: a call of the wrong kind is an exception.
pub fn reboot(firmware: Option<&Firmware>) -> ! {
    // A call that is not understood returns, with an error that nobody is left to hear.
    let _ = match conduit(firmware) {
        Some(PsciConduit::Hvc) => psci::system_reset::<Hvc>(),
        Some(PsciConduit::Smc) => psci::system_reset::<Smc>(),
        None => Ok(()),
    };
    halt()
}

/// Switches the machine off: PSCI SYSTEM_OFF. Where that cannot be done it halts, so that whoever
/// asked for "off" does not get a restart.
pub fn power_off(firmware: Option<&Firmware>) -> ! {
    let _ = match conduit(firmware) {
        Some(PsciConduit::Hvc) => psci::system_off::<Hvc>(),
        Some(PsciConduit::Smc) => psci::system_off::<Smc>(),
        None => Ok(()),
    };
    halt()
}

/// Stops this CPU for good. All exceptions that could wake it are masked.
pub fn halt() -> ! {
    loop {
        asm::wfi();
    }
}

/// Restarts the machine when an exception came on the way out.
pub(super) fn at_once() -> ! {
    reboot(crate::FIRMWARE.get())
}

fn conduit(firmware: Option<&Firmware>) -> Option<PsciConduit> {
    firmware.and_then(|firmware| firmware.psci)
}
