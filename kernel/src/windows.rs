//! The windows through which the payload reaches physical memory that is not its own: one for old
//! memory, read-only, and one for device registers. The architecture's page tables are behind them.
//!
//! Slots are filled on demand, so the tables are as large for 512 MB as for 12 TB.

use core::ptr::NonNull;

use drivers::PhysAddr;
use drivers::mmio::Mmio;
use spin::{Mutex, MutexGuard, Once};

use crate::arch::paging::{DEVICE_WINDOW, OLD_WINDOW, Tables};
use crate::arch::trap::DEVICE_ACCESS;

/// Slots of the window of old memory, and pages of the window of device registers.
pub const SLOTS: u64 = 512;

/// Size of a page of device registers in bytes.
pub const PAGE: u64 = 4096;

struct Windows {
    tables: Tables,
    /// Pages of the device window in use; the first is for [`with_device_page`].
    device_pages: u64,
}

/// The windows in force.
static WINDOWS: Once<Mutex<Windows>> = Once::new();

/// Opens the windows of the page tables that the processor runs on.
pub fn open(tables: Tables) {
    WINDOWS.call_once(|| Mutex::new(Windows { tables, device_pages: 1 }));
}

/// The windows, unless they are not open yet or a trap interrupted whoever holds them.
fn windows() -> Option<MutexGuard<'static, Windows>> {
    WINDOWS.get()?.try_lock()
}

/// Takes the windows from whoever holds them, who may have changed half of a mapping: nothing of old
/// memory is mapped afterwards.
///
/// # Safety
/// Whoever holds them must never run again.
pub unsafe fn take_from_abandoned() {
    let Some(windows) = WINDOWS.get().filter(|windows| windows.is_locked()) else { return };
    // SAFETY: the caller's promise; the tables are made good next.
    unsafe { windows.force_unlock() };
    windows.lock().tables.close_old();
}

/// A pointer to the old memory at `at`, and how many bytes from there on it is good for. Only until
/// the next call: the slot may be given to other memory then.
///
/// `None` when the windows are not open, or in use by whoever was interrupted.
pub fn old_page(at: PhysAddr) -> Option<(*const u8, u64)> {
    let mut windows = windows()?;
    let size = windows.tables.old_slot();
    let (slot, offset) = (at.0 / size % SLOTS, at.0 % size);
    windows.tables.map_old(slot, PhysAddr(at.0 - offset));
    Some(((OLD_WINDOW + slot * size + offset) as *const u8, size - offset))
}

/// Calls `with` with the `size` bytes of memory at `at`. `None` when the windows are not open or the
/// memory does not fit in.
///
/// # Safety
/// There must be memory, readable without an exception, and nobody may write to it meanwhile.
pub unsafe fn with_memory<T>(at: PhysAddr, size: u64, with: impl FnOnce(&[u8]) -> T) -> Option<T> {
    let mut windows = windows()?;
    let slot = windows.tables.old_slot();
    let (start, offset) = (at.0 - at.0 % slot, at.0 % slot);
    let slots = offset.checked_add(size)?.div_ceil(slot);
    if slots > SLOTS {
        return None;
    }
    for index in 0..slots {
        windows.tables.map_old(index, PhysAddr(start.checked_add(index * slot)?));
    }
    let (from, size) = ((OLD_WINDOW + offset) as *const u8, usize::try_from(size).ok()?);
    // SAFETY: just mapped, and nobody maps something else while the lock is held; the rest is the
    // caller's promise.
    Some(with(unsafe { core::slice::from_raw_parts(from, size) }))
}

/// Maps `size` bytes of device registers at `at` for good. `None` when the window is full or the
/// address not a multiple of 4.
pub fn device_pages(at: PhysAddr, size: u64) -> Option<Mmio> {
    let mut windows = windows()?;
    let offset = at.0 % PAGE;
    let pages = offset.checked_add(size)?.div_ceil(PAGE);
    let first = windows.device_pages;
    if size == 0 || !at.0.is_multiple_of(4) || pages > SLOTS - first {
        return None;
    }
    for page in 0..pages {
        let register = at.0.checked_sub(offset)?.checked_add(page * PAGE)?;
        windows.tables.map_device(first + page, PhysAddr(register));
    }
    windows.device_pages += pages;
    drop(windows);
    let base = NonNull::new((DEVICE_WINDOW + first * PAGE + offset) as *mut u8)?;
    // SAFETY: just mapped as device memory, and the page is never given away again.
    Some(unsafe { Mmio::new(base, size, &DEVICE_ACCESS) })
}

/// Maps the page of device registers at `at` for as long as `with` runs. Not to be nested.
pub fn with_device_page<T>(at: PhysAddr, with: impl FnOnce(&Mmio) -> T) -> Option<T> {
    let mut windows = windows()?;
    windows.tables.map_device(0, PhysAddr(at.0 & !(PAGE - 1)));
    let base = NonNull::new(DEVICE_WINDOW as *mut u8)?;
    // SAFETY: just mapped as device memory; the lock is held, so nobody maps something else
    // meanwhile.
    Some(with(&unsafe { Mmio::new(base, PAGE, &DEVICE_ACCESS) }))
}
