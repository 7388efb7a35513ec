//! A serial line with a speed, faults and somebody at the other end.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use format::frame::DELIMITER;
use rustix::pipe::fcntl_setpipe_size;

/// What the kernel says when it dies: from there on bytes are counted.
const DEATH: &[u8] = b"Kernel panic - not syncing";

/// How a line is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Bits per second, ten for each byte; none for as fast as it goes.
    pub baud: Option<u64>,
    /// After so many bytes since the kernel died it goes as fast as it can.
    pub paced_bytes: usize,
    /// One in so many frames is lost, damaged, doubled or cut; none when 0.
    pub one_in: u64,
}

/// A line, of which everything that went over it is kept.
#[derive(Clone)]
pub struct Wire {
    shared: Arc<Mutex<Shared>>,
    socket: PathBuf,
    settings: Settings,
}

#[derive(Default)]
struct Shared {
    /// Everything that the machine sent.
    sent: Vec<u8>,
    /// Everything that the far end gets.
    bytes: Vec<u8>,
    /// How many bytes had come when.
    arrivals: Vec<(usize, Instant)>,
    /// Whoever listens at the far end.
    listener: Option<UnixStream>,
    /// How many frames were spoiled.
    spoiled: usize,
}

impl Wire {
    /// A line whose far end is a socket in `directory`.
    #[must_use]
    pub fn new(directory: &Path, settings: Settings) -> Wire {
        Wire { shared: Arc::default(), socket: directory.join("line"), settings }
    }

    /// Where the far end is, as `host-analyzer receive` wants it.
    #[must_use]
    pub fn source(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    /// Lays the line. What is read from the outcome is what the machine sent, unspoiled.
    ///
    /// # Errors
    /// When there cannot be a socket.
    pub fn lay(&self, input: ChildStdin, output: ChildStdout) -> Result<Box<dyn Read + Send>> {
        // As short as pipes are, so that the machine does not run ahead of the line.
        fcntl_setpipe_size(&output, 4096).context("cannot shorten the line's pipe")?;
        let listener = UnixListener::bind(&self.socket)
            .with_context(|| format!("cannot listen at {}", self.socket.display()))?;
        let shared = Arc::clone(&self.shared);
        std::thread::spawn(move || answer(&listener, &shared, input));
        let faults = Faults::new(self.settings.one_in);
        let (wire, begun) = (self.clone(), Instant::now());
        Ok(Box::new(NearEnd { wire, output, faults, begun, passed: 0, died_at: None }))
    }

    /// Everything that the machine has sent.
    #[must_use]
    pub fn sent(&self) -> Vec<u8> {
        lock(&self.shared).sent.clone()
    }

    /// Everything that has come out of the far end.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.shared).bytes.clone()
    }

    /// How many frames were spoiled.
    #[must_use]
    pub fn spoiled(&self) -> usize {
        lock(&self.shared).spoiled
    }

    /// When byte number `at` was there.
    #[must_use]
    pub fn arrival(&self, at: usize) -> Option<Instant> {
        let shared = lock(&self.shared);
        shared.arrivals.iter().find(|&&(count, _)| count > at).map(|&(_, when)| when)
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes whoever connects, one at a time, and hands on what he says.
fn answer(listener: &UnixListener, shared: &Mutex<Shared>, mut input: ChildStdin) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        lock(shared).listener = stream.try_clone().ok();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            let sent = input.write_all(&buffer[..count]).and_then(|()| input.flush());
            if sent.is_err() {
                return;
            }
        }
        lock(shared).listener = None;
    }
}

/// The machine's end.
struct NearEnd {
    wire: Wire,
    output: ChildStdout,
    faults: Faults,
    begun: Instant,
    /// Bytes that have passed.
    passed: usize,
    /// How many had passed when the kernel died.
    died_at: Option<usize>,
}

impl Read for NearEnd {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = buffer.len().min(256);
        let count = self.output.read(&mut buffer[..most])?;
        self.passed += count;
        let far = self.faults.pass(&buffer[..count]);
        let mut shared = lock(&self.wire.shared);
        shared.spoiled = self.faults.spoiled;
        if shared.listener.as_mut().is_some_and(|listener| listener.write_all(&far).is_err()) {
            shared.listener = None;
        }
        shared.sent.extend_from_slice(&buffer[..count]);
        shared.bytes.extend_from_slice(&far);
        let reached = shared.bytes.len();
        shared.arrivals.push((reached, Instant::now()));
        if self.died_at.is_none() {
            let recent = reached.saturating_sub(far.len() + DEATH.len());
            let died = shared.bytes[recent..].windows(DEATH.len()).any(|it| it == DEATH);
            self.died_at = died.then_some(self.passed);
        }
        drop(shared);
        self.pace();
        Ok(count)
    }
}

impl NearEnd {
    /// Waits as long as the line takes for what has passed.
    fn pace(&mut self) {
        let settings = self.wire.settings;
        let over = self.died_at.is_some_and(|at| self.passed > at + settings.paced_bytes);
        let Some(baud) = settings.baud.filter(|_| !over) else { return };
        let due = self.begun + Duration::from_secs_f64(self.passed as f64 * 10.0 / baud as f64);
        match due.checked_duration_since(Instant::now()) {
            Some(wait) => std::thread::sleep(wait),
            // A line that had nothing to send does not make up for it.
            None => self.begun += Instant::now() - due,
        }
    }
}

/// Spoils frames: one of so many, each in another way.
struct Faults {
    one_in: u64,
    /// What has passed of a frame; `None` outside of one.
    frame: Option<Vec<u8>>,
    random: u64,
    spoiled: usize,
}

impl Faults {
    fn new(one_in: u64) -> Faults {
        Faults { one_in, frame: None, random: 0x9e37_79b9_7f4a_7c15, spoiled: 0 }
    }

    /// What comes out at the far end.
    fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.one_in == 0 {
            return bytes.to_vec();
        }
        let mut out = Vec::new();
        for &byte in bytes {
            match (&mut self.frame, byte) {
                (None, DELIMITER) => self.frame = Some(vec![byte]),
                (None, byte) => out.push(byte),
                (Some(frame), DELIMITER) => {
                    frame.push(byte);
                    let frame = std::mem::take(frame);
                    self.frame = None;
                    out.extend(self.spoil(frame));
                }
                (Some(frame), byte) => frame.push(byte),
            }
        }
        out
    }

    fn spoil(&mut self, mut frame: Vec<u8>) -> Vec<u8> {
        if self.draw(self.one_in) != 0 {
            return frame;
        }
        self.spoiled += 1;
        let place = self.draw(frame.len() as u64) as usize;
        match self.draw(4) {
            0 => frame.clear(),
            1 => frame[place] ^= 1 << self.draw(8),
            2 => frame.extend_from_within(..),
            _ => frame.truncate(place),
        }
        frame
    }

    /// A number below `limit` (xorshift64, G. Marsaglia 2003).
    fn draw(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit.max(1)
    }
}
