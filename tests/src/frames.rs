//! A network in which nothing happens but that numbered frames come, one every few milliseconds, whatever
//! becomes of the machine that gets them.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// What comes before each number.
const MAGIC: [u8; 8] = *b"frame no";

/// Bytes of magic and number.
const UNIT: usize = 16;

/// How many times a frame holds its number.
const UNITS: usize = 60;

/// To everybody, from a locally administered address, of the type that is free for experiments, and two
/// bytes: what follows is then aligned in memory, be the frame itself at the start of a buffer or 12 bytes
/// behind it, as virtio has it.
const HEADER: [u8; 16] = *b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x01\x88\xb5..";

/// How it is aligned.
const ALIGNMENT: usize = 4;

/// The network, until it is dropped.
pub struct Frames {
    sockets: TempDir,
    sent: Arc<Mutex<Vec<Instant>>>,
    sender: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Frames {
    /// A network in which a frame comes every `interval`.
    ///
    /// # Errors
    /// When its sockets cannot be made.
    pub fn every(interval: Duration) -> Result<Frames> {
        // Socket paths must be short: a directory of their own in the temporary directory.
        let sockets = tempfile::tempdir()?;
        let socket = UnixDatagram::bind(sockets.path().join("host"))?;
        socket.set_nonblocking(true)?;
        let to = sockets.path().join("machine");
        let sent = Arc::<Mutex<Vec<Instant>>>::default();
        let (stop, stopped) = channel();
        let log = Arc::clone(&sent);
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                // A machine that takes none, or is not there yet, misses some.
                let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                let now = Instant::now();
                let _ = socket.send_to(&frame(log.len() as u64), &to);
                log.push(now);
            }
        });
        Ok(Frames { sockets, sent, sender: Some((stop, thread)) })
    }

    /// QEMU's arguments for a card in this network, the device `card`.
    #[must_use]
    pub fn with_card(&self, card: &str) -> Vec<String> {
        let [machine, host] = ["machine", "host"].map(|name| self.sockets.path().join(name));
        let net = format!(
            "dgram,id=net,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            machine.display(),
            host.display()
        );
        ["-netdev", &net, "-device", &format!("{card},netdev=net")].map(str::to_owned).to_vec()
    }

    /// The number of the first frame that was not sent by `at`.
    #[must_use]
    pub fn next_at(&self, at: Instant) -> u64 {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.partition_point(|&sent| sent <= at) as u64
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.sender.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

fn frame(number: u64) -> Vec<u8> {
    let unit = [MAGIC, number.to_le_bytes()].concat();
    [HEADER.as_slice(), &unit.repeat(UNITS)].concat()
}

/// The numbers of all frames in the file `path`, an image of memory in whole pages, in order.
///
/// # Errors
/// When it cannot be read.
pub fn numbers_in(path: &Path) -> Result<Vec<u64>> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut numbers = Vec::new();
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error.into()),
        }
        for unit in bytes.windows(UNIT).step_by(ALIGNMENT) {
            let (magic, number) = unit.split_at(MAGIC.len());
            if magic == MAGIC {
                numbers.push(u64::from_le_bytes(number.try_into()?));
            }
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}
