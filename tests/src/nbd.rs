//! A disk whose requests a test answers, or not: a small server of the NBD protocol for QEMU.
//!
//! Source: doc/proto.md of the Network Block Device project: fixed newstyle negotiation, simple replies.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Fixed newstyle, no zeros behind the old form of the export.
const HANDSHAKE: u16 = 3;
/// Flags are there; flushes, trims and writes of zeros are understood.
const FEATURES: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6;
const EIO: u32 = 5;

/// Decides about a write: `false` lets it wait. Offset and bytes.
pub type Answers = Box<dyn Fn(u64, &[u8]) -> bool + Send>;

/// Serves `image` on a socket beside it, and answers as `answers` says. From the first write on that it
/// lets wait, the disk is silent: nothing is answered or done any more; after `patience`, everything
/// fails. Returns the socket.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(image: &Path, answers: Answers, patience: Duration) -> Result<PathBuf> {
    let file = File::options().read(true).write(true).open(image)?;
    let directory = tempfile::tempdir()?.keep();
    let socket = directory.join("nbd");
    let listener = UnixListener::bind(&socket)?;
    thread::spawn(move || {
        // QEMU connects once; when it goes, so does the server.
        if let Ok((stream, _)) = listener.accept()
            && let Err(error) = (Server { file, answers, patience }).talk(stream)
        {
            eprintln!("NBD server: {error:#}");
        }
        let _ = std::fs::remove_dir_all(directory);
    });
    Ok(socket)
}

struct Server {
    file: File,
    answers: Answers,
    patience: Duration,
}

impl Server {
    fn talk(&self, mut stream: UnixStream) -> Result<()> {
        let size = self.file.metadata()?.len();
        stream.write_all(b"NBDMAGICIHAVEOPT")?;
        stream.write_all(&HANDSHAKE.to_be_bytes())?;
        let _flags = u32::from_be_bytes(take(&mut stream)?);
        self.negotiate(&mut stream, size)?;
        let (mut silent, mut patience) = (false, self.patience);
        loop {
            let Ok(magic) = take(&mut stream).map(u32::from_be_bytes) else { return Ok(()) };
            ensure!(magic == REQUEST_MAGIC, "a request begins with {magic:#x}");
            let [_, kind] = [take(&mut stream)?, take(&mut stream)?].map(u16::from_be_bytes);
            let [cookie, offset] = [take(&mut stream)?, take(&mut stream)?].map(u64::from_be_bytes);
            let length = u32::from_be_bytes(take(&mut stream)?) as usize;
            let mut bytes = vec![0; if kind <= 1 { length } else { 0 }];
            if kind == 1 {
                stream.read_exact(&mut bytes)?;
                silent = silent || !(self.answers)(offset, &bytes);
            }
            if kind == 2 {
                return Ok(());
            }
            if silent {
                // What waits is not answered in its turn: the disk is silent as a whole.
                thread::sleep(std::mem::take(&mut patience));
                reply(&mut stream, EIO, cookie, &[])?;
                continue;
            }
            match kind {
                0 => self.file.read_exact_at(&mut bytes, offset)?,
                1 => self.file.write_all_at(&bytes, offset)?,
                // Flushes: the file is the medium. Trims may do nothing.
                3 | 4 => {}
                6 => self.file.write_all_at(&vec![0; length], offset)?,
                _ => bail!("a request of the unknown kind {kind}"),
            }
            reply(&mut stream, 0, cookie, if kind == 0 { &bytes } else { &[] })?;
        }
    }

    fn negotiate(&self, stream: &mut UnixStream, size: u64) -> Result<()> {
        /// NBD_OPT_EXPORT_NAME, NBD_OPT_ABORT and NBD_OPT_GO.
        const EXPORT_NAME: u32 = 1;
        const ABORT: u32 = 2;
        const GO: u32 = 7;
        loop {
            let magic = u64::from_be_bytes(take(stream)?);
            ensure!(magic == OPTION_MAGIC, "an option begins with {magic:#x}");
            let [option, length] = [take(stream)?, take(stream)?].map(u32::from_be_bytes);
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data)?;
            let export = [&size.to_be_bytes()[..], &FEATURES.to_be_bytes()].concat();
            let mut answer = |kind: u32, data: &[u8]| {
                stream.write_all(&REPLY_MAGIC.to_be_bytes())?;
                for word in [option, kind, data.len() as u32] {
                    stream.write_all(&word.to_be_bytes())?;
                }
                stream.write_all(data)
            };
            match option {
                EXPORT_NAME => {
                    stream.write_all(&export)?;
                    return Ok(());
                }
                GO => {
                    // NBD_REP_INFO with NBD_INFO_EXPORT, then NBD_REP_ACK.
                    answer(3, &[&[0, 0][..], &export].concat())?;
                    answer(1, &[])?;
                    return Ok(());
                }
                ABORT => bail!("QEMU does not like this server"),
                // NBD_REP_ERR_UNSUP
                _ => answer(1 << 31 | 1, &[])?,
            }
        }
    }
}

fn reply(stream: &mut UnixStream, error: u32, cookie: u64, data: &[u8]) -> Result<()> {
    stream.write_all(&SIMPLE_REPLY_MAGIC.to_be_bytes())?;
    stream.write_all(&error.to_be_bytes())?;
    stream.write_all(&cookie.to_be_bytes())?;
    stream.write_all(data).context("QEMU is gone")
}

fn take<const N: usize>(stream: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
