//! How things look.

pub mod table;
pub mod text;
pub mod value;
