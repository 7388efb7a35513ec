//! What a failure of the payload itself leads to: the next part of its work, on an empty stack, that
//! needs nothing of the one that failed; or the end.

use spin::Mutex;

use crate::{arch, finish_after_failure, image, windows};

/// A part of the work.
pub type Part = extern "C" fn() -> !;

/// Where a failure leads.
static NEXT: Mutex<Option<Part>> = Mutex::new(None);

/// Makes a failure lead to `next` from now on, or to the end. To be called on the payload's stack.
pub fn leads_to(next: Option<Part>) {
    *NEXT.lock() = next;
}

/// Whether [`after_failure`] leads on.
pub fn leads_on() -> bool {
    next().is_some()
}

fn next() -> Option<Part> {
    NEXT.try_lock().and_then(|next| *next)
}

/// The way on, or out, when the payload itself has failed.
pub fn after_failure() -> ! {
    let Some(next) = next() else { finish_after_failure() };
    leads_to(None);
    // SAFETY: what failed never runs again: it is on the stack that is left for good below, or it was
    // interrupted there. There is one processor.
    unsafe {
        windows::take_from_abandoned();
        crate::take_workspace_from_abandoned();
        arch::entry::start_over(image::STACK.top(), next)
    }
}
