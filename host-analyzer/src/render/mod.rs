//! How things look.

pub mod text;
