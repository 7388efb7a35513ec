//! Microseconds from the architecture's counter.

use core::sync::atomic::{AtomicU64, Ordering};

use drivers::clock::Clock;

use crate::{arch, watchdogs};

/// Ticks per second before they are known: as fast as processors are, so that deadlines are rather
/// too long than too short.
const GUESS: u64 = 4_000_000_000;

static TICKS_PER_SECOND: AtomicU64 = AtomicU64::new(GUESS);

/// The clock of the payload: microseconds since its first instruction. Whoever looks at it pets the
/// watchdogs.
pub struct PayloadClock;

impl Clock for PayloadClock {
    fn now_us(&self) -> u64 {
        let per_second = TICKS_PER_SECOND.load(Ordering::Relaxed).max(1);
        let now = (u128::from(arch::clock::ticks()) * 1_000_000 / u128::from(per_second)) as u64;
        watchdogs::pet(now);
        now
    }
}

/// Sets the rate of the architecture's counter.
pub fn set_rate(ticks_per_second: u64) {
    TICKS_PER_SECOND.store(ticks_per_second, Ordering::Relaxed);
}
