//! What firmware tells about the machine.

pub mod acpi;
