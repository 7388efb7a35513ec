//! What the boot tests share: a guest that crashes, its dump, and the witnesses to compare it with.
//!
//! The tests themselves are in `boot/`, a file per topic. Each of them fails with the reason when
//! something that it needs is missing; none passes by skipping.

#![forbid(unsafe_code)]

pub mod card;
pub mod core_file;
pub mod crash;
pub mod frames;
pub mod incomplete;
pub mod listing;
pub mod module;
pub mod nbd;
pub mod objects;
pub mod peers;
pub mod stream;
pub mod trace;
pub mod variables;
pub mod wire;
