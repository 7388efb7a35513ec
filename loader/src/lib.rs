//! The user-space side on the machine to be protected: it marks a piece of disk as the place for a
//! crash dump, says what is in it, and takes a dump out.
//!
//! | module | responsible for |
//! |---|---|
//! | [`device`] | opening a disk, a partition or an image, and reading bytes of it |
//! | [`in_use`] | whether the running system uses a block device or a file |
//! | [`signature`] | what a disk already holds: partition tables, file systems, containers |
//! | [`area`] | finding the reserved area on a device, and its trailer |
//! | [`partition`] | the partitions of a disk |
//! | [`fiemap`], [`file_area`] | areas that are files in a file system |
//! | [`core_file`] | the ELF core in an area: its size, its notes |
//! | [`reserve`], [`handoff`], [`show`], [`save`] | one module per command |
//! | [`copy`] | the verified, sparse copy |
//! | [`text`] | sizes and times as people read them |
//!
//! The byte layouts are in the crate `format` and in `docs/format.md`.
//!
//! The rule that decides everything here: nothing is written unless the device is known to be free
//! and the user has said yes to losing what is on it; and no dump is given up before its copy is
//! on stable storage.

#![deny(unsafe_code)]

pub mod area;
pub mod copy;
pub mod core_file;
pub mod device;
pub mod fiemap;
pub mod file_area;
pub mod handoff;
pub mod in_use;
pub mod partition;
pub mod reserve;
pub mod save;
pub mod show;
pub mod signature;
pub mod text;
