//! Measurements that a person asks for. They print and judge nothing.

pub mod analyzer;
pub mod devices;
mod payload;

/// The middle of `sorted`.
fn median<T: Copy>(sorted: &[T]) -> T {
    sorted[sorted.len() / 2]
}
