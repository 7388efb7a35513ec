//! A line from its first byte on: which dump its bytes belong to, and what of them is kept.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use format::frame::{self, Header, MAX_WIRE};

use super::file::{DumpFile, Shape};
use super::receiver::{Event, Receiver};
use super::report::Outcome;
use super::{ReceiveError, io_error};

/// Most dumps of one line.
const MAX_DUMPS: u32 = 100;
/// Bytes that are replayed at once.
const PIECE: usize = 64 << 10;

/// What a line has besides the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown<'a> {
    /// Bytes of the console.
    Text(&'a [u8]),
    /// So many bytes of a damaged frame.
    Damaged(usize),
}

/// Receives the dumps of a line, one after another.
pub struct Session {
    base: PathBuf,
    number: u32,
    open: OpenDump,
    finished: Vec<Outcome>,
    earlier: Vec<u32>,
}

/// The dump that is being received.
struct OpenDump {
    path: PathBuf,
    receiver: Receiver,
    file: DumpFile,
    /// The bytes of the line, as they came.
    line: File,
    line_path: PathBuf,
}

impl OpenDump {
    /// Begins a dump, or goes on with one whose bytes of the line were kept.
    fn open(path: &Path) -> Result<OpenDump, ReceiveError> {
        let line_path = with_suffix(path, ".line");
        if path.symlink_metadata().is_ok() && line_path.symlink_metadata().is_err() {
            return Err(ReceiveError::Exists(path.to_owned()));
        }
        let mut line = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&line_path)
            .map_err(io_error("open", &line_path))?;
        match line.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(ReceiveError::Busy(path.to_owned())),
            // A file system without locks does not keep anybody from receiving.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        let mut receiver = Receiver::new();
        let mut file = DumpFile::create(path).map_err(io_error("create", path))?;
        let mut piece = vec![0; PIECE];
        loop {
            let size = line.read(&mut piece).map_err(io_error("read", &line_path))?;
            if size == 0 {
                break;
            }
            for &byte in &piece[..size] {
                receiver.push(byte, &mut file).map_err(io_error("write", path))?;
            }
        }
        Ok(OpenDump { path: path.to_owned(), receiver, file, line, line_path })
    }

    fn finish(mut self) -> Result<Outcome, ReceiveError> {
        let shape = self.file.finish(&self.receiver).map_err(io_error("write", &self.path))?;
        let head = self.file.head(&self.receiver).filter(|_| shape == Shape::Runs);
        let is_complete = self.receiver.is_complete() && shape != Shape::None;
        if is_complete || self.line.metadata().is_ok_and(|it| it.len() == 0) {
            fs::remove_file(&self.line_path).map_err(io_error("remove", &self.line_path))?;
        }
        Ok(Outcome::of(self.path, &self.receiver, shape, head.as_ref()))
    }
}

impl Session {
    /// Begins to receive into `path`, or goes on with what an earlier session left there.
    ///
    /// # Errors
    /// [`ReceiveError::Exists`], [`ReceiveError::Busy`], [`ReceiveError::Io`].
    pub fn open(path: &Path) -> Result<Session, ReceiveError> {
        let open = OpenDump::open(path)?;
        let base = path.to_owned();
        Ok(Session { base, number: 1, open, finished: Vec::new(), earlier: Vec::new() })
    }

    /// Takes bytes of the line.
    ///
    /// # Errors
    /// [`ReceiveError::Io`], [`ReceiveError::TooManyStreams`].
    pub fn take(
        &mut self,
        bytes: &[u8],
        show: &mut dyn FnMut(Shown<'_>),
    ) -> Result<(), ReceiveError> {
        self.open.line.write_all(bytes).map_err(io_error("write", &self.open.line_path))?;
        for (index, &byte) in bytes.iter().enumerate() {
            let OpenDump { receiver, file, path, .. } = &mut self.open;
            match receiver.push(byte, file).map_err(io_error("write", path))? {
                Some(Event::Text(text)) => show(Shown::Text(text)),
                Some(Event::Damaged(size)) => show(Shown::Damaged(size)),
                Some(Event::OtherStream(header, content)) => {
                    let content = content.to_vec();
                    self.next(&header, &content, &bytes[index + 1..])?;
                }
                Some(Event::Taken(_) | Event::Ignored) | None => {}
            }
        }
        Ok(())
    }

    /// Goes on with another stream, whose first frame this is; `rest` was kept for the dump before.
    fn next(&mut self, header: &Header, content: &[u8], rest: &[u8]) -> Result<(), ReceiveError> {
        if self.earlier.contains(&header.stream) {
            return Ok(());
        }
        let mut next = self.open_next(header.stream)?;
        let mut wire = vec![0; MAX_WIRE];
        let size = frame::encode(header, content, &mut wire).unwrap_or(0);
        let write = io_error("write", &next.line_path);
        next.line.write_all(&[&wire[..size], rest].concat()).map_err(write)?;
        let write = io_error("write", &next.path);
        next.receiver.take(header, content, &mut next.file).map_err(write)?;

        let before = std::mem::replace(&mut self.open, next);
        self.earlier.extend(before.receiver.stream());
        let strange = (size + rest.len()) as u64;
        let cut = |line: &File| line.set_len(line.metadata()?.len().saturating_sub(strange));
        cut(&before.line).map_err(io_error("cut", &before.line_path))?;
        self.finished.push(before.finish()?);
        Ok(())
    }

    /// The next name that is free, or that of an interrupted dump of this stream.
    fn open_next(&mut self, stream: u32) -> Result<OpenDump, ReceiveError> {
        while self.number < MAX_DUMPS {
            self.number += 1;
            match OpenDump::open(&numbered(&self.base, self.number)) {
                Ok(next) if next.receiver.stream().is_none_or(|it| it == stream) => {
                    return Ok(next);
                }
                Ok(_) | Err(ReceiveError::Exists(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ReceiveError::TooManyStreams(MAX_DUMPS))
    }

    /// The receiver of the dump that is coming.
    #[must_use]
    pub fn receiver(&self) -> &Receiver {
        &self.open.receiver
    }

    /// Where it is written.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.open.path
    }

    /// What is to be sent now; see [`Receiver::speak`].
    pub fn speak(&mut self, now_ms: u64) -> Option<Vec<u8>> {
        self.open.receiver.speak(now_ms)
    }

    /// Brings the file up to date with what has arrived. Returns whether it is an ELF core by now.
    ///
    /// # Errors
    /// [`ReceiveError::Io`].
    pub fn update(&mut self) -> Result<bool, ReceiveError> {
        let OpenDump { receiver, file, path, .. } = &mut self.open;
        file.update(receiver).map_err(io_error("write", path))
    }

    /// Finishes the last dump. Returns what became of all of them.
    ///
    /// # Errors
    /// [`ReceiveError::Io`].
    pub fn finish(mut self) -> Result<Vec<Outcome>, ReceiveError> {
        self.finished.push(self.open.finish()?);
        Ok(self.finished)
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// `dump.elf` is `dump-2.elf` for number 2.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{number}"));
    let numbered = path.with_file_name(name);
    match path.extension() {
        Some(extension) => with_suffix(&numbered, &format!(".{}", extension.to_string_lossy())),
        None => numbered,
    }
}
