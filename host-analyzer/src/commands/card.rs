//! `card`: what [`Options`] says.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::receive::card_of_log;
use crate::source::{Dump, StoredCard, map};

/// The crash card: why the kernel died, as the payload wrote it before the dump
///
/// It is in every dump, and in the reserved area also when the dump itself was never finished. Over a serial line
/// it comes first: a saved log of the line has it, too.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// A dump, a reserved area (a disk, a partition, or an image of one), or a log of a serial line
    pub dump: PathBuf,
}

/// Why no card is shown.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// The file cannot be read.
    #[error(transparent)]
    Open(#[from] crate::Error),
    /// It is nothing that has one.
    #[error(
        "{0} is no dump, no reserved area, and no log of a serial line with a crash card in it"
    )]
    NoArea(PathBuf),
    /// The dump has no card.
    #[error("the dump {0} has no crash card in it; see `bt`, `log` and `sys`")]
    NotInDump(PathBuf),
    /// The area has no card.
    #[error("the area {0} holds no crash card")]
    Missing(PathBuf),
    /// The card is not what the payload wrote.
    #[error("the crash card in {0} is damaged (checksum)")]
    Damaged(PathBuf),
    /// The output cannot be written.
    #[error("cannot write")]
    Output(#[from] io::Error),
}

/// Runs the command.
///
/// # Errors
/// [`CardError`].
pub fn run(options: &Options, out: &mut dyn Write) -> Result<(), CardError> {
    let path = || options.dump.clone();
    match StoredCard::open(Path::new(&options.dump))? {
        StoredCard::Text(card) => Ok(write_clean(&card, out)?),
        StoredCard::NoArea => {
            let bytes = map(&options.dump)?;
            if Dump::begins_in(&bytes) {
                let dump = Dump::open(&options.dump)?;
                let card = dump.notes().card.ok_or_else(|| CardError::NotInDump(path()))?;
                return Ok(write_clean(card, out)?);
            }
            let card = card_of_log(&bytes).ok_or_else(|| CardError::NoArea(path()))?;
            Ok(write_clean(&card, out)?)
        }
        StoredCard::Missing => Err(CardError::Missing(path())),
        StoredCard::Damaged => Err(CardError::Damaged(path())),
    }
}

/// Writes the card's lines. The payload left no control characters in it; whoever had the disk since
/// may have.
fn write_clean(card: &str, out: &mut dyn Write) -> io::Result<()> {
    for line in card.lines() {
        let clean = |character: char| if character.is_control() { '?' } else { character };
        writeln!(out, "{}", line.chars().map(clean).collect::<String>())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn card_cannot_drive_the_terminal() {
        let mut out = Vec::new();
        write_clean("kernel\n\x1b[2Jline\n", &mut out).unwrap();
        assert_eq!(out, b"kernel\n?[2Jline\n");
    }

    #[test]
    fn card_in_a_log_of_a_serial_line_is_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = b"[ 0.1] tinykdump: crash card:\r\nkernel   6.1\r\n\
            [ 0.1] tinykdump: end of the crash card\r\n";
        std::fs::write(file.path(), log).unwrap();
        let mut out = Vec::new();
        run(&Options { dump: file.path().to_owned() }, &mut out).unwrap();
        assert_eq!(out, b"kernel   6.1\n");
    }
}
