//! The system counter, as seen by the virtual timer.

use core::sync::atomic::{AtomicU64, Ordering};

use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{CNTFRQ_EL0, CNTVCT_EL0, Readable};
use drivers::firmware::Firmware;

/// The counter at the payload's first instruction.
static START: AtomicU64 = AtomicU64::new(0);

/// Rates that the counter can have; with any other every deadline would be wrong.
const POSSIBLE: core::ops::Range<u64> = 1_000_000..10_000_000_000;

/// Remembers when the payload began.
pub(super) fn start(at: u64) {
    START.store(at, Ordering::Relaxed);
}

/// Ticks since the payload's first instruction.
#[must_use]
pub fn ticks() -> u64 {
    // The counter may be read ahead of what comes before in the program.
    barrier::isb(barrier::SY);
    CNTVCT_EL0.get().wrapping_sub(START.load(Ordering::Relaxed))
}

/// Ticks per second: told by the device tree, which corrects firmware that set the register wrong,
/// or by the register CNTFRQ_EL0. `None` when there is no way to know.
#[must_use]
pub fn ticks_per_second(firmware: &Firmware) -> Option<u64> {
    let possible = |rate: &u64| POSSIBLE.contains(rate);
    firmware.counter_hz.filter(possible).or(Some(CNTFRQ_EL0.get()).filter(possible))
}
