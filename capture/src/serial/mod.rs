//! The dump over a serial line: the core in frames (`format::frame`), the most useful first.
//!
//! A line may be slow (a megabyte takes ninety seconds at 115200 bits per second) and go one way only.
//! So the order of what is sent is that of its use (order.rs), everything received is useful by
//! itself, and nothing waits for an answer; where there is somebody who answers, he gets again
//! what he lacks.
//!
//! Memory used does not grow with that of the machine: which blocks were sent is remembered as far as
//! there is room (sent.rs), and what the order was is found out again by walking once more.

mod compress;
mod order;
mod places;
mod repair;
mod sender;
mod sent;
mod staged;
mod stream;

pub use sender::Frames;
pub use stream::{Buffers, Complete, Job, write};

#[cfg(test)]
mod tests;
