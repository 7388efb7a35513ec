//! Time, and waits that end.

/// A clock that never goes backwards.
pub trait Clock {
    /// Microseconds since the payload's first instruction.
    fn now_us(&self) -> u64;
}

/// A wait that was too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedOut;

/// A point in time after which a wait is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    at_us: u64,
}

impl Deadline {
    /// `microseconds` from now on.
    #[must_use]
    pub fn after_us(clock: &dyn Clock, microseconds: u64) -> Deadline {
        Deadline { at_us: clock.now_us().saturating_add(microseconds) }
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(&self, clock: &dyn Clock) -> bool {
        clock.now_us() >= self.at_us
    }

    /// Polls `done` until it gives a value.
    ///
    /// # Errors
    /// [`TimedOut`] when the deadline passes first; `done` is asked once more after it, so that a
    /// slow machine does not turn an answer into a failure.
    pub fn poll<T>(
        self,
        clock: &dyn Clock,
        mut done: impl FnMut() -> Option<T>,
    ) -> Result<T, TimedOut> {
        loop {
            let passed = self.passed(clock);
            if let Some(value) = done() {
                return Ok(value);
            }
            if passed {
                return Err(TimedOut);
            }
            core::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    struct Ticking(Cell<u64>);

    impl Clock for Ticking {
        fn now_us(&self) -> u64 {
            self.0.set(self.0.get() + 1);
            self.0.get()
        }
    }

    #[test]
    fn wait_ends_with_the_answer_or_with_the_deadline() {
        let clock = Ticking(Cell::new(0));
        let mut polls = 0;
        let third = Deadline::after_us(&clock, 100).poll(&clock, || {
            polls += 1;
            (polls == 3).then_some(polls)
        });
        assert_eq!(third, Ok(3));
        assert_eq!(Deadline::after_us(&clock, 100).poll(&clock, || None::<()>), Err(TimedOut));
        assert!(clock.0.get() < 250);
    }

    #[test]
    fn deadline_far_in_the_future_does_not_wrap() {
        let clock = Ticking(Cell::new(u64::MAX - 10));
        assert!(!Deadline::after_us(&clock, u64::MAX).passed(&clock));
    }
}
