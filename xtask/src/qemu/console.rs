//! The machine's serial port: kept in a file, and searched while it grows.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// What is called with every finished line.
type Follower = Box<dyn FnMut(&str) + Send>;

/// One line and when it was complete.
#[derive(Clone, Debug)]
pub struct Line {
    /// The line without its end.
    pub text: String,
    /// When the host had read all of it.
    pub at: Instant,
}

/// What a machine prints, line by line.
pub struct Console {
    shared: Arc<Shared>,
    log: PathBuf,
    /// Lines before this one were already waited for.
    next: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    grew: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<Line>,
    /// The line that is being printed.
    partial: Vec<u8>,
    closed: bool,
    follow: Option<Follower>,
}

impl Console {
    /// Reads `serial` until it ends, in a thread of its own, and keeps a copy in the file `log`.
    pub(super) fn new(mut serial: Box<dyn Read + Send>, log: PathBuf) -> Result<Console> {
        let mut copy =
            File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = serial.read(&mut buffer) {
                let _ = copy.write_all(&buffer[..count]);
                writer.lock().push(&buffer[..count]);
                writer.grew.notify_all();
            }
            let mut state = writer.lock();
            state.closed = true;
            if !state.partial.is_empty() {
                state.push(b"\n");
            }
            writer.grew.notify_all();
        });
        Ok(Console { shared, log, next: 0 })
    }

    /// Calls `each` with every line from now on, as soon as it is complete.
    pub fn follow(&self, each: impl FnMut(&str) + Send + 'static) {
        self.shared.lock().follow = Some(Box::new(each));
    }

    /// Where the copy is.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Everything so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.shared.lock().lines.iter().flat_map(|line| [&line.text, "\n"]).collect()
    }

    /// All lines so far and when they came.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        self.shared.lock().lines.clone()
    }

    /// The last `count` lines.
    #[must_use]
    pub fn tail(&self, count: usize) -> String {
        let state = self.shared.lock();
        let from = state.lines.len().saturating_sub(count);
        let partial = String::from_utf8_lossy(&state.partial).into_owned();
        let lines =
            state.lines[from..].iter().map(|line| line.text.as_str()).chain([partial.as_str()]);
        lines.flat_map(|line| [line, "\n"]).collect()
    }

    /// Waits for a line that contains one of `patterns`.
    pub(super) fn wait_for(&mut self, patterns: &[&str], deadline: Instant) -> Result<String> {
        let mut state = self.shared.lock();
        loop {
            while let Some(line) = state.lines.get(self.next) {
                self.next += 1;
                if patterns.iter().any(|pattern| line.text.contains(pattern)) {
                    return Ok(line.text.clone());
                }
            }
            if state.closed {
                bail!("the machine ended");
            }
            state = self.shared.wait(state, deadline)?;
        }
    }

    /// Waits until the machine has closed its end.
    pub(super) fn wait_for_close(&mut self, deadline: Instant) -> Result<()> {
        let mut state = self.shared.lock();
        while !state.closed {
            state = self.shared.wait(state, deadline)?;
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, State>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("the time is over");
        }
        let (state, _) =
            self.grew.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        Ok(state)
    }
}

impl State {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\r' => {}
                b'\n' => {
                    let line = String::from_utf8_lossy(&self.partial).into_owned();
                    self.partial.clear();
                    if let Some(follow) = &mut self.follow {
                        follow(&line);
                    }
                    self.lines.push(Line { text: line, at: Instant::now() });
                }
                _ => self.partial.push(byte),
            }
        }
    }
}
