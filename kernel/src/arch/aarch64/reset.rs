//! The end: restart or switch off the machine through PSCI.
//!
//! Source: Arm Power State Coordination Interface (DEN 0022), 5.1.9 and 5.1.10.

use core::sync::atomic::{AtomicBool, Ordering};

use aarch64_cpu::asm;
use drivers::firmware::{Firmware, PsciConduit};
use smccc::{Hvc, Smc, psci};

/// Whether the dead kernel ran at EL2, where no hypervisor is above it.
static STARTED_AT_EL2: AtomicBool = AtomicBool::new(false);

/// Remembers at which exception level the payload was entered.
pub(super) fn started_at_el2(yes: bool) {
    STARTED_AT_EL2.store(yes, Ordering::Relaxed);
}

/// Restarts the machine: PSCI SYSTEM_RESET.
pub fn reboot(firmware: Option<&Firmware>) -> ! {
    // A call that is not understood returns, with an error that nobody is left to hear.
    let _ = match conduit(firmware) {
        PsciConduit::Hvc => psci::system_reset::<Hvc>(),
        PsciConduit::Smc => psci::system_reset::<Smc>(),
    };
    halt()
}

/// Switches the machine off: PSCI SYSTEM_OFF. Where that cannot be done it halts, so that whoever
/// asked for "off" does not get a restart.
pub fn power_off(firmware: Option<&Firmware>) -> ! {
    let _ = match conduit(firmware) {
        PsciConduit::Hvc => psci::system_off::<Hvc>(),
        PsciConduit::Smc => psci::system_off::<Smc>(),
    };
    halt()
}

/// Stops this CPU for good. What wakes it finds it masked, and it waits again.
pub fn halt() -> ! {
    loop {
        asm::wfi();
    }
}

/// How firmware wants to be called. Where that is not known: below a hypervisor's level there is one
/// to answer, and at that level only the secure monitor is left.
fn conduit(firmware: Option<&Firmware>) -> PsciConduit {
    let unknown = match STARTED_AT_EL2.load(Ordering::Relaxed) {
        true => PsciConduit::Smc,
        false => PsciConduit::Hvc,
    };
    firmware.and_then(|firmware| firmware.psci).unwrap_or(unknown)
}

/// Restarts the machine when an exception came on the way out. One that comes again is the call's
/// own.
pub(super) fn at_once() -> ! {
    static TRIED: AtomicBool = AtomicBool::new(false);
    if TRIED.load(Ordering::Relaxed) {
        halt();
    }
    TRIED.store(true, Ordering::Relaxed);
    reboot(crate::FIRMWARE.get())
}
