//! QMP, the protocol to talk to QEMU itself: one JSON object a line over a Unix socket.
//!
//! Source: QEMU documentation, "QEMU Machine Protocol Specification".

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

/// A connection to a running QEMU.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    /// The beginning of a line whose rest has not come yet.
    partial: Vec<u8>,
    /// Events that came while something else was waited for.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Waits for QEMU, which is `child`, to connect to `listener`.
    pub(super) fn accept(
        listener: &UnixListener,
        child: &mut Child,
        deadline: Instant,
    ) -> Result<Qmp> {
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("it ended at once ({status})");
            }
            if Instant::now() >= deadline {
                bail!("it does not open its control connection");
            }
            // Looks after the child ten times a second.
            let tick = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            if poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&tick))? > 0 {
                break;
            }
        }
        let (stream, _) = listener.accept()?;
        let mut qmp =
            Qmp { stream: BufReader::new(stream), partial: Vec::new(), events: VecDeque::new() };
        let greeting = qmp.receive(deadline)?;
        if greeting.get("QMP").is_none() {
            bail!("not a QMP greeting: {greeting}");
        }
        qmp.command("qmp_capabilities", json!({}), deadline)?;
        Ok(qmp)
    }

    /// Runs the command `name` and returns its result.
    pub(super) fn command(
        &mut self,
        name: &str,
        arguments: Value,
        deadline: Instant,
    ) -> Result<Value> {
        let mut line = json!({ "execute": name, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot send QMP {name}"))?;
        loop {
            let mut message =
                self.receive(deadline).with_context(|| format!("no answer to QMP {name}"))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                bail!("QMP {name}: {}", error["desc"].as_str().unwrap_or("refused"));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits for the event `name`. Other events before it are forgotten.
    pub(super) fn event(&mut self, name: &str, deadline: Instant) -> Result<Value> {
        loop {
            let message = match self.events.pop_front() {
                Some(message) => message,
                None => self.receive(deadline)?,
            };
            if message["event"] == name {
                return Ok(message);
            }
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the time is over");
            }
            self.stream.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QEMU closed the connection"),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.partial);
                    self.partial.clear();
                    return message.context("QEMU sent something that is not JSON");
                }
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error).context("cannot read from QEMU"),
            }
        }
    }
}
