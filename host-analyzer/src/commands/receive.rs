//! `receive`: what [`Options`] says.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::receive::{ConsoleText, Line, LineSource, ReceiveError, Session, Shown, progress};

/// A dump over a serial line: shows the console and writes the ELF core
///
/// Listens until the machine crashes and its dump has come. On a line that goes both ways, what was lost is asked
/// for again. The file can be read while it is written (bt, log): it is an ELF core of what has come, the most
/// useful first. Interrupted, it goes on with the same -o: the bytes of the line are kept in DUMP.line until the
/// dump is complete. Another crash goes to DUMP-2, and so on.
///
/// Exit status: 0 when everything is there, 2 when something is missing (the dump is kept), 1 when it failed.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Serial port, unix:PATH, tcp:HOST:PORT, a saved log of the line, or - for standard input
    #[arg(value_parser = |text: &str| text.parse::<LineSource>())]
    pub source: LineSource,
    /// The ELF core to be written
    #[arg(short, long, value_name = "DUMP")]
    pub output: PathBuf,
    /// Speed of the serial port in bits per second; 8 data bits, no parity, no flow control
    #[arg(long, default_value_t = 115_200)]
    pub baud: u32,
    /// Wait at the socket for somebody who connects
    #[arg(long)]
    pub listen: bool,
}

/// How long bytes are waited for: what else is to be done is done as often.
const WAIT_MS: u32 = 200;
/// How often the file and the progress are brought up to date; and the progress where it is no bar.
const UPDATE: Duration = Duration::from_millis(500);
const TELL: Duration = Duration::from_secs(5);
const READ: usize = 64 << 10;

/// Runs the command. Returns whether everything that was to come is there.
///
/// # Errors
/// [`ReceiveError`].
pub fn run(options: &Options, out: &mut dyn Write) -> Result<bool, ReceiveError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // Without it the signal ends the program at once, and the file is a core all the same.
        let _ = signal_hook::flag::register(signal, stop.clone());
    }
    let mut session = Session::open(&options.output)?;
    let mut line = Line::open(&options.source, options.baud, options.listen)?;
    let mut screen = Screen::new(out);
    let outcome = listen(&mut session, &mut line, &mut screen, &stop);
    screen.close();
    // What has come is kept, whatever happened to the line.
    let outcomes = session.finish()?;
    outcomes.iter().for_each(|outcome| eprintln!("{outcome}"));
    outcome?;
    Ok(outcomes.iter().all(|outcome| outcome.is_complete))
}

fn listen(
    session: &mut Session,
    line: &mut Line,
    screen: &mut Screen<'_>,
    stop: &AtomicBool,
) -> Result<(), ReceiveError> {
    let begun = Instant::now();
    let mut buffer = vec![0; READ];
    let mut updated = begun;
    let line_error = |error| ReceiveError::Io { what: "read", path: "the line".into(), error };
    while !stop.load(Ordering::Relaxed) {
        let came = line.read(&mut buffer, WAIT_MS).map_err(line_error)?;
        match came {
            Some(0) => break,
            Some(size) => {
                screen.count(size);
                session.take(&buffer[..size], &mut |shown| screen.show(shown))?;
            }
            None => screen.idle(),
        }
        if line.is_live() || came.is_none() {
            let now_ms = begun.elapsed().as_millis() as u64;
            if let Some(said) = session.speak(now_ms) {
                line.send(&said);
            }
            if session.receiver().is_over(now_ms) {
                break;
            }
        }
        if updated.elapsed() >= UPDATE {
            let is_core = session.update()?;
            screen.tell(session, is_core);
            updated = Instant::now();
        }
    }
    Ok(())
}

/// Standard output with the console, and standard error with the progress.
struct Screen<'a> {
    out: &'a mut dyn Write,
    text: ConsoleText,
    bar: Option<ProgressBar>,
    bytes: u64,
    told: (Instant, u64),
}

impl Screen<'_> {
    fn new(out: &mut dyn Write) -> Screen<'_> {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::no_length();
            if let Ok(style) = ProgressStyle::with_template("{bar:20} {msg} {eta} left") {
                bar.set_style(style);
            }
            bar
        });
        Screen { out, text: ConsoleText::default(), bar, bytes: 0, told: (Instant::now(), 0) }
    }

    fn count(&mut self, size: usize) {
        self.bytes += size as u64;
    }

    fn show(&mut self, shown: Shown<'_>) {
        let text = match shown {
            Shown::Text(bytes) => self.text.push(bytes),
            Shown::Damaged(_) => self.text.damaged(),
        };
        self.write(&text);
    }

    /// Nothing came: what has come is shown, be it the middle of a line.
    fn idle(&mut self) {
        let text = self.text.flush();
        self.write(&text);
    }

    fn write(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        // Nobody may be reading; the dump does not end for that.
        let mut write =
            || drop(self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()));
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn tell(&mut self, session: &Session, is_core: bool) {
        let receiver = session.receiver();
        let Some(outline) = receiver.outline() else { return };
        let (then, bytes) = self.told;
        if self.bar.is_none() && then.elapsed() < TELL {
            return;
        }
        let rate = ((self.bytes - bytes) as f64 / then.elapsed().as_secs_f64()) as u64;
        if then.elapsed() >= TELL {
            self.told = (Instant::now(), self.bytes);
        }
        let mut message = progress(receiver, rate);
        if !is_core {
            message += "; the head has not come, there is no core yet";
        }
        match &self.bar {
            Some(bar) => {
                bar.set_length(outline.expected_blocks);
                bar.set_position(receiver.present().count());
                bar.set_message(message);
            }
            None => eprintln!("{}: {message}", session.path().display()),
        }
    }

    fn close(&mut self) {
        self.idle();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
