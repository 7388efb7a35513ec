//! Where the bytes of a line come from, and whether it can be answered.

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::termios::{
    ControlModes, InputModes, OptionalActions, SpecialCodeIndex, isatty, tcgetattr, tcsetattr,
};

use super::{ReceiveError, io_error};

/// What is to be listened to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LineSource {
    /// Standard input.
    Stdin,
    /// A socket in the file system.
    Unix(PathBuf),
    /// A host and a port.
    Tcp(String),
    /// A serial port, another device, a FIFO, or a log of a line.
    File(PathBuf),
}

impl FromStr for LineSource {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<LineSource, Infallible> {
        Ok(match (text, text.split_once(':')) {
            ("-", _) => LineSource::Stdin,
            (_, Some(("unix", path))) => LineSource::Unix(path.into()),
            (_, Some(("tcp", address))) => LineSource::Tcp(address.to_owned()),
            _ => LineSource::File(text.into()),
        })
    }
}

/// Bytes for the other side that are kept while it does not take them; more is not worth saying.
const MAX_UNSENT: usize = 16 << 10;

/// A line that is open.
pub struct Line {
    input: File,
    output: Option<File>,
    unsent: Vec<u8>,
    is_live: bool,
}

impl Line {
    /// Opens a line. `baud` is for serial ports; `listens` says that a socket is to be waited at.
    ///
    /// # Errors
    /// [`ReceiveError::Io`].
    pub fn open(source: &LineSource, baud: u32, listens: bool) -> Result<Line, ReceiveError> {
        match source {
            LineSource::Stdin => {
                let fd = io::stdin().as_fd().try_clone_to_owned();
                let input = fd.map_err(io_error("read", Path::new("standard input")))?;
                Ok(Line::new(input.into(), None, false))
            }
            LineSource::Unix(path) => {
                let stream = if listens {
                    UnixListener::bind(path).and_then(|it| Ok(it.accept()?.0))
                } else {
                    UnixStream::connect(path)
                };
                Line::socket(stream.map(OwnedFd::from)).map_err(io_error("connect to", path))
            }
            LineSource::Tcp(address) => {
                let stream = if listens {
                    TcpListener::bind(address).and_then(|it| Ok(it.accept()?.0))
                } else {
                    TcpStream::connect(address)
                };
                let path = Path::new(address);
                Line::socket(stream.map(OwnedFd::from)).map_err(io_error("connect to", path))
            }
            LineSource::File(path) => Line::file(path, baud).map_err(io_error("open", path)),
        }
    }

    fn new(input: File, output: Option<File>, is_live: bool) -> Line {
        Line { input, output, unsent: Vec::new(), is_live }
    }

    fn socket(stream: io::Result<OwnedFd>) -> io::Result<Line> {
        let input = File::from(stream?);
        let flags = rustix::fs::fcntl_getfl(&input)?;
        rustix::fs::fcntl_setfl(&input, flags | OFlags::NONBLOCK)?;
        let output = input.try_clone()?;
        Ok(Line::new(input, Some(output), true))
    }

    fn file(path: &Path, baud: u32) -> io::Result<Line> {
        let kind = path.metadata()?.file_type();
        if !kind.is_char_device() {
            // A FIFO that is written to by its reader talks to itself.
            return Ok(Line::new(File::open(path)?, None, kind.is_fifo()));
        }
        let flags = (OFlags::NOCTTY | OFlags::NONBLOCK).bits() as i32;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(flags);
        let (input, writes) = match options.clone().write(true).open(path) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                (options.open(path)?, false)
            }
            Err(error) => return Err(error),
        };
        if isatty(&input) {
            set_up(&input, baud)?;
        }
        let output = writes.then(|| input.try_clone()).transpose()?;
        Ok(Line::new(input, output, true))
    }

    /// Whether the line can be answered.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.output.is_some()
    }

    /// Whether its bytes come as they are sent, and go on after a dump.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.is_live
    }

    /// Waits for bytes, `wait_ms` milliseconds at most, and for room for what is not sent yet. Returns how many
    /// came: 0 at the end of the line, `None` when there are none now.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&mut self, into: &mut [u8], wait_ms: u32) -> io::Result<Option<usize>> {
        let wait = Timespec {
            tv_sec: (wait_ms / 1000).into(),
            tv_nsec: i64::from(wait_ms % 1000) * 1_000_000,
        };
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, !self.unsent.is_empty());
        let mut fds = [PollFd::new(&self.input, wanted)];
        match poll(&mut fds, Some(&wait)) {
            // A signal: the caller looks what it was.
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let events = fds[0].revents();
        if events.contains(PollFlags::OUT) {
            self.send(&[]);
        }
        if events.difference(PollFlags::OUT).is_empty() {
            return Ok(None);
        }
        use io::ErrorKind::{ConnectionReset, Interrupted, WouldBlock};
        match self.input.read(into) {
            Ok(size) => Ok(Some(size)),
            Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => Ok(None),
            // So says a terminal whose other side is gone.
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(Some(0)),
            Err(error) if error.kind() == ConnectionReset => Ok(Some(0)),
            Err(error) => Err(error),
        }
    }

    /// Sends bytes, as far as the line takes them now; the rest with the next ones. A line that cannot be
    /// written to is one that goes one way.
    pub fn send(&mut self, bytes: &[u8]) {
        let Some(output) = &mut self.output else { return };
        if self.unsent.len() + bytes.len() <= MAX_UNSENT {
            self.unsent.extend(bytes);
        }
        while !self.unsent.is_empty() {
            match output.write(&self.unsent) {
                Ok(size) => drop(self.unsent.drain(..size)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.unsent.clear();
                    self.output = None;
                    return;
                }
            }
        }
    }
}

/// Raw, 8 data bits, no parity, one stop bit, no flow control, whatever the modem lines say.
fn set_up(port: &File, baud: u32) -> io::Result<()> {
    let mut modes = tcgetattr(port)?;
    modes.make_raw();
    modes.input_modes.remove(InputModes::IXON | InputModes::IXOFF | InputModes::IXANY);
    modes.control_modes.remove(
        ControlModes::CSIZE | ControlModes::PARENB | ControlModes::CSTOPB | ControlModes::CRTSCTS,
    );
    modes.control_modes.insert(ControlModes::CS8 | ControlModes::CLOCAL | ControlModes::CREAD);
    modes.special_codes[SpecialCodeIndex::VMIN] = 1;
    modes.special_codes[SpecialCodeIndex::VTIME] = 0;
    modes.set_speed(baud)?;
    tcsetattr(port, OptionalActions::Now, &modes)?;
    Ok(())
}
