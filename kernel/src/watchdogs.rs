//! The watchdogs that the dead kernel left running, petted by whoever looks at the clock: every wait does, and
//! so does whatever takes long.

use core::sync::atomic::{AtomicU64, Ordering};

use drivers::Physical;
use drivers::firmware::{Firmware, WatchdogFrames};
use drivers::mmio::{Mmio, Registers};
use drivers::pci::{self, ConfigSpace, Function};
use drivers::watchdog::{self, Watchdog};
use heapless::Vec;
use spin::Mutex;

use crate::arch::ports::IoPorts;
use crate::memory::PhysicalMemory;
use crate::say;

/// Most watchdogs that are petted.
const MAX: usize = 8;

/// Time between two times: they run for seconds at least.
const INTERVAL_US: u64 = 500_000;

static RUNNING: Mutex<Vec<Watchdog<Mmio>, MAX>> = Mutex::new(Vec::new());

/// When they are to be petted next, in microseconds since the first instruction.
static NEXT_US: AtomicU64 = AtomicU64::new(u64::MAX);

/// The search for those that run.
pub struct Search<'a> {
    memory: &'a PhysicalMemory<'a>,
    found: Vec<Watchdog<Mmio>, MAX>,
    /// They were searched for before.
    is_done: bool,
}

impl<'a> Search<'a> {
    /// Begins it.
    pub fn new(memory: &'a PhysicalMemory<'a>) -> Search<'a> {
        let is_done = NEXT_US.load(Ordering::Relaxed) != u64::MAX;
        Search { memory, found: Vec::new(), is_done }
    }

    /// Looks whether a PCI function has one.
    pub fn look_at(&mut self, config: &dyn ConfigSpace, at: Function) {
        if self.is_done {
            return;
        }
        let memory = self.memory;
        let resets_nothing = |register| {
            let value = memory.with_registers(register, 4, |register| register.read32(0));
            value.is_some_and(|value| value & watchdog::NO_REBOOT != 0)
        };
        let tco = watchdog::tco_base(config, at)
            .filter(|_| !watchdog::tco_no_reboot(config, at).is_some_and(resets_nothing))
            .and_then(|base| Watchdog::tco(&IoPorts, base));
        let esb = watchdog::is_running_esb(config, at)
            .then(|| pci::map_bar(config, memory, at, 0, 0, watchdog::SIZE).ok())
            .flatten()
            .map(Watchdog::Esb);
        tco.into_iter().chain(esb).for_each(|watchdog| self.add(watchdog));
    }

    /// Adds one, if there is room.
    fn add(&mut self, watchdog: Watchdog<Mmio>) {
        let _ = self.found.push(watchdog);
    }

    /// Adds those that firmware names, and pets all of them from now on.
    pub fn finish(mut self, firmware: &Firmware) {
        if self.is_done {
            return;
        }
        for &WatchdogFrames { refresh, control } in &firmware.watchdogs {
            let map = |at| self.memory.map_device(at, watchdog::SIZE);
            let running = map(refresh)
                .zip(map(control))
                .and_then(|(refresh, control)| Watchdog::sbsa(refresh, &control));
            running.into_iter().for_each(|watchdog| self.add(watchdog));
        }
        for watchdog in &self.found {
            say!("the {} watchdog runs: it is petted", watchdog.name());
        }
        *RUNNING.lock() = self.found;
        NEXT_US.store(0, Ordering::Relaxed);
    }
}

/// Pets them if it is time, which is `now_us`.
pub fn pet(now_us: u64) {
    if now_us < NEXT_US.load(Ordering::Relaxed) {
        return;
    }
    // Whoever was interrupted may be petting them.
    if let Some(running) = RUNNING.try_lock() {
        NEXT_US.store(now_us.saturating_add(INTERVAL_US), Ordering::Relaxed);
        running.iter().for_each(|watchdog| watchdog.pet(&IoPorts));
    }
}
