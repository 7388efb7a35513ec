//! The system counter, as seen by the virtual timer.

use core::sync::atomic::{AtomicU64, Ordering};

use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{CNTFRQ_EL0, CNTVCT_EL0, Readable};
use drivers::PhysAddr;
use drivers::firmware::Firmware;
use drivers::mmio::Registers;

use crate::memory::PhysicalMemory;

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
    // A counter that jumps back, as some do by an erratum, must not end every wait.
    CNTVCT_EL0.get().saturating_sub(START.load(Ordering::Relaxed))
}

/// Ticks per second: told by the device tree, which corrects firmware that set the register wrong,
/// by the register CNTFRQ_EL0, or by the counter itself. `None` when there is no way to know.
#[must_use]
pub fn ticks_per_second(firmware: &Firmware, memory: &PhysicalMemory<'_>) -> Option<u64> {
    let possible = |rate: &u64| POSSIBLE.contains(rate);
    firmware
        .counter_hz
        .filter(possible)
        .or(Some(CNTFRQ_EL0.get()).filter(possible))
        .or_else(|| told_by_counter(firmware.counter_control?, memory).filter(possible))
}

/// CNTFID0 of the counter's control frame, which most firmware keeps for itself (DDI 0487, I5.6):
/// then it reads as all ones.
fn told_by_counter(frame: PhysAddr, memory: &PhysicalMemory<'_>) -> Option<u64> {
    const CNTFID0: u64 = 0x20;
    let registers = memory.map_early(frame, CNTFID0 + 4)?;
    Some(registers.read32(CNTFID0).into())
}
