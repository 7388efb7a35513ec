//! The time stamp counter.

use core::arch::x86_64::{__cpuid, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering};

use drivers::firmware::Firmware;
use drivers::firmware::acpi::PM_TIMER_HZ;
use x86_64::instructions::port::{Port, PortReadOnly, PortWriteOnly};

use crate::memory::PhysicalMemory;

/// The counter at the payload's first instruction.
static START: AtomicU64 = AtomicU64::new(0);

/// Ports are read at most this often while the counter is measured: about a second.
const MAX_READS: u32 = 1_000_000;

/// Rates that a processor can have; with any other every deadline would be wrong.
const POSSIBLE: core::ops::Range<u64> = 100_000_000..10_000_000_000;

/// Length of a measurement in PM timer ticks and in PIT ticks: ten milliseconds each.
const PM_TICKS: u32 = (PM_TIMER_HZ / 100) as u32;
const PIT_HZ: u64 = 1_193_182;
const PIT_TICKS: u16 = (PIT_HZ / 100) as u16;

/// Remembers when the payload began.
pub(super) fn start(at: u64) {
    START.store(at, Ordering::Relaxed);
}

/// Ticks since the payload's first instruction.
#[must_use]
pub fn ticks() -> u64 {
    now().wrapping_sub(START.load(Ordering::Relaxed))
}

fn now() -> u64 {
    // SAFETY: every x86_64 processor has the counter, and the payload runs in ring 0.
    unsafe { _rdtsc() }
}

/// Ticks per second: told by the processor or its hypervisor, or measured against the ACPI timer
/// or the PIT. `None` when there is no way to know.
#[must_use]
pub fn ticks_per_second(firmware: &Firmware, _: &PhysicalMemory<'_>) -> Option<u64> {
    told_by_processor()
        .or_else(told_by_hypervisor)
        .or_else(|| measure_with_pm_timer(firmware.pm_timer?))
        .or_else(measure_with_pit)
        .filter(|rate| POSSIBLE.contains(rate))
}

/// CPUID 15h: crystal frequency and the ratio to it (Intel SDM 2A, CPUID).
fn told_by_processor() -> Option<u64> {
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax.max(1));
    (leaf.eax != 0 && hz != 0).then_some(hz)
}

/// CPUID 40000010h: kHz, on hypervisors that have it (VMware's convention, KVM and QEMU too).
fn told_by_hypervisor() -> Option<u64> {
    let under_hypervisor = __cpuid(1).ecx & 1 << 31 != 0;
    if !under_hypervisor || __cpuid(0x4000_0000).eax < 0x4000_0010 {
        return None;
    }
    let khz = u64::from(__cpuid(0x4000_0010).eax);
    (khz != 0).then_some(khz * 1000)
}

fn measure_with_pm_timer(port: u16) -> Option<u64> {
    let mut timer = PortReadOnly::<u32>::new(port);
    // SAFETY: reading the timer, which FADT names, changes nothing.
    let mut read = || unsafe { timer.read() };
    let (first, begin) = (read(), now());
    for _ in 0..MAX_READS {
        // The timer may be of 24 bits: the difference of its low 24 bits is right for both.
        let passed = read().wrapping_sub(first) & 0xff_ffff;
        if passed >= PM_TICKS {
            let ticks = now().wrapping_sub(begin);
            return Some((u128::from(ticks) * u128::from(PM_TIMER_HZ) / u128::from(passed)) as u64)
                .filter(|&hz| hz != 0);
        }
    }
    None
}

/// Counts channel 2 of the PIT down once, with the speaker off.
fn measure_with_pit() -> Option<u64> {
    let mut gate = Port::<u8>::new(0x61);
    let mut command = PortWriteOnly::<u8>::new(0x43);
    let mut channel = Port::<u8>::new(0x42);
    // SAFETY: channel 2 drives nothing but the speaker, which stays off; the dead kernel needs it
    // no more. A machine without a PIT ignores the writes.
    unsafe {
        let old = gate.read();
        gate.write(old & !0b10 | 0b01);
        // Channel 2, both bytes, mode 0: the output goes high when the count is done.
        command.write(0b1011_0000);
        channel.write(PIT_TICKS as u8);
        channel.write((PIT_TICKS >> 8) as u8);
        let begin = now();
        if gate.read() & 1 << 5 != 0 {
            return None;
        }
        for _ in 0..MAX_READS {
            if gate.read() & 1 << 5 != 0 {
                return Some(now().wrapping_sub(begin) * 100).filter(|&hz| hz != 0);
            }
        }
    }
    None
}
