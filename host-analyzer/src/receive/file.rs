//! The dump on the disk: an ELF core at every moment from the arrival of the head on.
//!
//! While it grows, block X of the core is at offset [`SHIFT`] + X of the file, and the program headers before it
//! are those of the runs that have arrived; the room between is a hole. In the end it is written once
//! more without that room, to a file beside it that takes its name.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use format::BLOCK;

use super::blocks::BlockSet;
use super::layout::{
    CoreHead, FILE_HEADER, PN_XNUM, PROGRAM_HEADER, SECTION_HEADER, program_headers, section_header,
};
use super::receiver::{Receiver, Store};

/// Room for headers before the core: those of `layout::MAX_SEGMENTS` segments take 56 MiB.
const SHIFT: u64 = 64 << 20;
const SECTION_AT: u64 = SHIFT - SECTION_HEADER;
/// What is written at once at most where the kernel might be interrupted between two pages.
const PAGE: u64 = 4096;
/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// What has become of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The core that the payload has, byte for byte.
    Exact,
    /// A core of the runs that have arrived.
    Runs,
    /// Nothing: the head has not arrived.
    None,
}

/// The file of a dump that grows.
pub struct DumpFile {
    file: File,
    path: PathBuf,
    /// Its name until the head is there; then the next one's.
    partial: PathBuf,
    is_named: bool,
    /// Program headers in the table.
    headers: u64,
    /// Blocks that were there when the table was written.
    described: u64,
    head_changed: bool,
}

impl Store for DumpFile {
    fn write(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        // Nothing else tells that the head has come in another form.
        self.head_changed = true;
        self.file.write_all_at(bytes, SHIFT + first * BLOCK)
    }
}

impl DumpFile {
    /// Begins the file that is to be `path` once the head has arrived.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(path: &Path) -> io::Result<DumpFile> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".partial");
        let partial = path.with_file_name(name);
        let file = create(&partial)?;
        Ok(DumpFile {
            file,
            path: path.to_owned(),
            partial,
            is_named: false,
            headers: 0,
            described: 0,
            head_changed: false,
        })
    }

    /// Describes in the file what has arrived, data before headers. Returns whether it is an ELF core by now.
    ///
    /// # Errors
    /// What the system says.
    pub fn update(&mut self, receiver: &Receiver) -> io::Result<bool> {
        let present = receiver.present();
        if present.count() == self.described && !self.head_changed {
            return Ok(self.is_named);
        }
        let Some(head) = self.head(receiver) else { return Ok(false) };
        let parts = head.parts(present);
        let end = present.runs().last().map_or(SHIFT, |run| SHIFT + run.end * BLOCK);
        if self.file.metadata()?.len() < end {
            self.file.set_len(end)?;
        }
        self.file.sync_data()?;
        let notes = head.notes(present);
        let table =
            program_headers(SHIFT + notes.start..SHIFT + notes.end, &parts, |it| it + SHIFT);
        self.describe(&head, &table)?;
        (self.described, self.head_changed) = (present.count(), false);
        if !self.is_named {
            self.file.sync_data()?;
            fs::rename(&self.partial, &self.path)?;
            self.is_named = true;
        }
        Ok(true)
    }

    /// Replaces the program headers. Every one of them, old or new, is true at every moment: what is described
    /// once stays. So any mixture of them is a table, and only one torn apart would not be.
    fn describe(&mut self, head: &CoreHead, table: &[u8]) -> io::Result<()> {
        let count = table.len() as u64 / PROGRAM_HEADER;
        if count < self.headers {
            self.count(head, count)?;
        }
        let mut at = FILE_HEADER;
        for headers in table.chunks(PROGRAM_HEADER as usize).collect::<Vec<_>>().chunks(64) {
            let run = headers.concat();
            self.write_whole_headers(at, &run)?;
            at += run.len() as u64;
        }
        self.count(head, count)
    }

    /// Writes program headers so that none is ever half of the old and half of the new: the kernel may
    /// end a write of a killed program between two pages.
    fn write_whole_headers(&self, at: u64, headers: &[u8]) -> io::Result<()> {
        let size = PROGRAM_HEADER as usize;
        let mut old = vec![0; headers.len()];
        let is_same = self.file.read_exact_at(&mut old, at).is_ok() && old == headers;
        if is_same {
            return Ok(());
        }
        for (index, header) in headers.chunks(size).enumerate() {
            let at = at + (index * size) as u64;
            if at / PAGE == (at + PROGRAM_HEADER - 1) / PAGE {
                self.file.write_all_at(header, at)?;
                continue;
            }
            // p_filesz and p_memsz last, and zero until then: words of 8 bytes are in one page.
            self.file.write_all_at(&[0; 8], at + 32)?;
            self.file.write_all_at(&[0; 8], at + 40)?;
            self.file.write_all_at(&header[..32], at)?;
            self.file.write_all_at(&header[48..], at + 48)?;
            self.file.write_all_at(&header[40..48], at + 40)?;
            self.file.write_all_at(&header[32..40], at + 32)?;
        }
        Ok(())
    }

    fn count(&mut self, head: &CoreHead, count: u64) -> io::Result<()> {
        if count >= PN_XNUM {
            self.file.write_all_at(&section_header(count), SECTION_AT)?;
        }
        self.file.write_all_at(&head.file_header(count, SECTION_AT, true), 0)?;
        self.headers = count;
        Ok(())
    }

    /// The core's own head, if its headers are there.
    pub fn head(&self, receiver: &Receiver) -> Option<CoreHead> {
        let outline = receiver.outline()?;
        let (head, core) = (outline.head_blocks * BLOCK, outline.core_blocks * BLOCK);
        CoreHead::read(head, core, &mut |at, into| {
            let end = at.saturating_add(into.len() as u64);
            end <= head
                && receiver.present().has_all(at / BLOCK..end.div_ceil(BLOCK))
                && self.file.read_exact_at(into, SHIFT + at).is_ok()
        })
    }

    /// Writes the dump as it stays, and gives it its name.
    ///
    /// # Errors
    /// What the system says; the file is as [`DumpFile::update`] left it.
    pub fn finish(&mut self, receiver: &Receiver) -> io::Result<Shape> {
        if !self.update(receiver)? {
            fs::remove_file(&self.partial)?;
            return Ok(Shape::None);
        }
        let (Some(head), Some(outline)) = (self.head(receiver), receiver.outline()) else {
            return Ok(Shape::Runs);
        };
        let file = create(&self.partial)?;
        let present = receiver.present();
        let shape = if present.count() == outline.core_blocks {
            self.copy(&file, 0, 0..outline.core_blocks * BLOCK)?;
            file.set_len(outline.core_blocks * BLOCK)?;
            if !receiver.is_complete() {
                // The ELF header itself has the bit unless the last head came without its end.
                let flags = head.file_header(0, 0, true);
                file.write_all_at(&flags[48..52], 48)?;
            }
            Shape::Exact
        } else {
            let notes = head.notes(present);
            self.copy_runs(&file, &head, notes, present, outline.head_blocks, receiver)?;
            Shape::Runs
        };
        file.sync_all()?;
        fs::rename(&self.partial, &self.path)?;
        sync_directory(&self.path)?;
        Ok(shape)
    }

    fn copy_runs(
        &self,
        file: &File,
        head: &CoreHead,
        notes: Range<u64>,
        present: &BlockSet,
        head_blocks: u64,
        receiver: &Receiver,
    ) -> io::Result<()> {
        let parts = head.parts(present);
        let count = parts.len() as u64 + 1;
        let section_at = FILE_HEADER + count * PROGRAM_HEADER;
        let notes_at = section_at + if count >= PN_XNUM { SECTION_HEADER } else { 0 };
        let notes_end = notes_at + (notes.end - notes.start);
        let mut next = notes_end.next_multiple_of(BLOCK);
        let mut places: Vec<(Range<u64>, u64)> = Vec::new();
        for run in present.within(head_blocks..u64::MAX) {
            let bytes = run.start * BLOCK..run.end * BLOCK;
            self.copy(file, next, bytes.clone())?;
            places.push((bytes.clone(), next));
            next += bytes.end - bytes.start;
        }
        file.set_len(next)?;
        self.copy(file, notes_at, notes)?;
        let place = |offset: u64| {
            let index = places.partition_point(|(bytes, _)| bytes.end <= offset);
            // Parts are cut to these very runs.
            places.get(index).map_or(0, |(bytes, at)| at + (offset - bytes.start))
        };
        file.write_all_at(&program_headers(notes_at..notes_end, &parts, place), FILE_HEADER)?;
        if count >= PN_XNUM {
            file.write_all_at(&section_header(count), section_at)?;
        }
        file.write_all_at(&head.file_header(count, section_at, !receiver.is_complete()), 0)
    }

    /// Copies bytes of the core to `at` of another file; zeros stay holes.
    fn copy(&self, file: &File, at: u64, bytes: Range<u64>) -> io::Result<()> {
        let mut buffer = vec![0; PIECE.min(bytes.end - bytes.start) as usize];
        let mut from = bytes.start;
        while from < bytes.end {
            let size = PIECE.min(bytes.end - from) as usize;
            let piece = &mut buffer[..size];
            self.file.read_exact_at(piece, SHIFT + from)?;
            for (index, block) in piece.chunks(BLOCK as usize).enumerate() {
                if block.iter().any(|&byte| byte != 0) {
                    let to = at + (from - bytes.start) + index as u64 * BLOCK;
                    file.write_all_at(block, to)?;
                }
            }
            from += size as u64;
        }
        Ok(())
    }
}

/// Creates a file, in place of what an earlier run left of it.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
}

/// Makes the names in the directory of `path` survive a power cut.
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}
