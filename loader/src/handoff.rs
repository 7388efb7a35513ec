//! `loader handoff`: tells the payload where the files are that are areas.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use format::area::State;
use format::handoff;
use uuid::Uuid;

use crate::area::{Area, FindError};
use crate::device::{Access, Device, Kind, OpenError};
use crate::file_area::{FileArea, FileError};
use crate::in_use::System;

/// Why there is no handoff. No file was written.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    /// A file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is no area.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It is one, but not a file in a file system.
    #[error(
        "{0} needs no handoff: the payload finds disks and partitions by themselves. Only files that \
         `loader reserve --size` made are named here"
    )]
    NotInFile(PathBuf),
    /// Its blocks are not known.
    #[error(transparent)]
    File(#[from] FileError),
    /// The handoff could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Where it was to go.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A handoff that was made.
#[derive(Debug)]
pub struct Made {
    /// Where it is.
    pub path: PathBuf,
    /// The files in it.
    pub files: Vec<Named>,
}

/// A file in a handoff.
#[derive(Debug)]
pub struct Named {
    path: PathBuf,
    uuid: Uuid,
    disk: PathBuf,
    extents: usize,
    unsaved: bool,
}

/// Makes the handoff for `files`, and writes it to `output`.
///
/// # Errors
/// [`HandoffError`]
pub fn handoff(files: &[PathBuf], output: &Path, system: &System) -> Result<Made, HandoffError> {
    let mut content = Vec::new();
    let mut named = Vec::new();
    for path in files {
        named.push(add(path, &mut content, system)?);
    }
    let header = handoff::header(named.len() as u32, &content);
    let partial = output.with_added_extension("partial");
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(&header)?;
        file.write_all(&content)?;
        file.sync_all()?;
        fs::rename(&partial, output)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&partial);
        HandoffError::Write { path: output.to_path_buf(), source }
    })?;
    Ok(Made { path: output.to_path_buf(), files: named })
}

/// Adds the file at `path` to what a handoff has in it.
fn add(path: &Path, content: &mut Vec<u8>, system: &System) -> Result<Named, HandoffError> {
    let device = Device::open(path, Access::Read)?;
    let area = Area::find(&device)?;
    if device.kind() != Kind::File || !area.trailer.in_file {
        return Err(HandoffError::NotInFile(path.to_path_buf()));
    }
    let place = FileArea::of(&device, system)?;
    let unsaved = area.trailer.state != State::Empty;
    if !unsaved {
        place.verify(&device, area.trailer.uuid)?;
    }
    let (uuid, extents) = (area.trailer.uuid, place.extents.len());
    let size = area.trailer.area_size;
    let file = handoff::File::new(uuid, place.disk.disk_size, size, extents as u32);
    content.extend(file.to_bytes());
    place.extents.iter().for_each(|extent| content.extend(extent.to_bytes()));
    let (path, uuid) = (path.to_path_buf(), Uuid::from_bytes(uuid));
    Ok(Named { path, uuid, disk: place.disk.node, extents, unsaved })
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Named { path, uuid, disk, extents, unsaved } in &self.files {
            let (path, disk) = (path.display(), disk.display());
            writeln!(f, "{path}: {uuid}, in {extents} pieces on {disk}")?;
            if *unsaved {
                writeln!(
                    f,
                    "Note: it holds a dump that was not saved. Until `loader save {path} DIR`, a crash \
                     leaves no more than its card there."
                )?;
            }
        }
        let path = self.path.display();
        writeln!(f, "Load it with the payload: kexec -p ... --initrd={path}")?;
        writeln!(f, "Make it anew each time before that: it says where the files are now.")
    }
}
