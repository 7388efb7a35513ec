//! The dump that comes over a serial line: bytes of the line to an ELF core.
//!
//! - [`Receiver`] is the protocol: bytes in, blocks out, frames to be sent. It knows no line, file or clock;
//! - [`DumpFile`] keeps an ELF core on the disk that is readable at every moment;
//! - [`Session`] puts the two together, remembers the bytes of the line so that it can be gone on with after a
//!   restart, and begins another dump when the machine crashes again;
//! - [`Line`] is where the bytes come from.
//!
//! The format is docs/format.md, "The serial stream".

mod asker;
mod blocks;
mod card;
mod file;
mod head;
mod layout;
mod line;
mod receiver;
mod report;
mod session;
mod text;

use std::io;
use std::path::{Path, PathBuf};

pub use blocks::BlockSet;
pub use card::card_of_log;
pub use file::{DumpFile, Shape};
pub use line::{Line, LineSource};
pub use receiver::{Event, Outline, Receiver, StageState, Store};
pub use report::{Outcome, progress};
pub use session::{Session, Shown};
pub use text::ConsoleText;

/// Why nothing can be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The file to be written is a dump already.
    #[error(
        "{} exists and is a finished dump, which is never overwritten: name another file with -o, or move \
         this one away", .0.display()
    )]
    Exists(PathBuf),
    /// Another receiver writes there.
    #[error("{} is being written by another host-analyzer receive", .0.display())]
    Busy(PathBuf),
    /// The machine crashed more often than anybody wants to know.
    #[error("more than {0} streams on one line: this is no serial line of one machine")]
    TooManyStreams(u32),
    /// A system call failed.
    #[error("cannot {what} {}: {error}", path.display())]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// Makes an error of the system one of ours.
fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ReceiveError {
    let path = path.to_owned();
    move |error| ReceiveError::Io { what, path, error }
}

#[cfg(test)]
mod tests;
