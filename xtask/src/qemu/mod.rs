//! A machine in QEMU: started from a description, watched over its console and QMP, and always
//! stopped again.
//!
//! Every wait has a deadline, and every failure shows the exact QEMU command, the end of the
//! console and where the whole log is.

mod console;
mod qmp;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use console::{Console, Line};
use qmp::Qmp;

use crate::process;
use crate::target::{Target, Variant};

/// How many machines of this process run at once; more only make each other miss deadlines.
const AT_ONCE: usize = 2;

/// How long QEMU itself may take to answer, whatever the guest does.
const ANSWER: Duration = Duration::from_secs(60);

/// What a disk does when the guest writes zeros: nothing, holes in the image stay holes.
const KEEP_HOLES: &str = "discard=unmap,detect-zeroes=unmap";

/// A disk of the machine: a raw image.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The image file.
    pub image: PathBuf,
    /// QEMU's options for it, such as `cache=unsafe`.
    pub options: &'static str,
    /// A file that says which requests fail (docs/devel/testing/blkdebug.rst in QEMU 9.0).
    pub faults: Option<PathBuf>,
    /// The socket of an NBD server that has the image, where QEMU is not to open it itself.
    pub server: Option<PathBuf>,
}

/// What machine to start.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// The architecture.
    pub target: &'a Target,
    /// Which of its machines.
    pub variant: &'a Variant,
    /// `-bios`, when the variant has firmware of its own.
    pub firmware: Option<PathBuf>,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Number of CPUs.
    pub cpus: u32,
    /// The kernel to boot.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Its command line.
    pub append: String,
    /// Its disks: the first is `/dev/vda`, or `/dev/sda`.
    pub disks: Vec<Disk>,
    /// Files that lie in its memory from the start.
    pub blobs: Vec<Blob>,
    /// A further line, and the file that gets what comes over it.
    pub second_line: Option<(SecondLine, PathBuf)>,
    /// Further arguments, as they are, before the disks.
    pub arguments: Vec<String>,
}

/// The devices of a line besides the console's, `-device` for each; the one whose line it is has the
/// character device `line`.
pub type SecondLine = &'static [&'static str];

/// Bytes at a fixed physical address, there before the kernel starts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Blob {
    /// The file that holds them.
    pub file: PathBuf,
    /// Where they go.
    pub address: u64,
}

/// A machine that runs. Dropping it ends it.
pub struct Vm {
    child: Child,
    /// What is typed into its first serial port.
    input: Option<ChildStdin>,
    qmp: Qmp,
    /// What the machine prints on its first serial port.
    pub console: Console,
    command: String,
    stderr: PathBuf,
    _sockets: TempDir,
    _slot: Slot,
}

impl Machine<'_> {
    /// Starts the machine. `serial.log` and `qemu.log` are written into `directory`.
    ///
    /// # Errors
    /// When QEMU is missing and cannot be installed, or does not start.
    pub fn start(&self, directory: &Path) -> Result<Vm> {
        let mut input = None;
        let mut vm = self.start_over(directory, |from_us, to_us| {
            input = Some(from_us);
            Ok(Box::new(to_us))
        })?;
        vm.input = input;
        Ok(vm)
    }

    /// The same with something in the middle of its first serial line: `wire` gets both its ends, and
    /// gives what is to be the console's.
    ///
    /// # Errors
    /// Likewise, and those of `wire`.
    pub fn start_over(
        &self,
        directory: &Path,
        wire: impl FnOnce(ChildStdin, ChildStdout) -> Result<Box<dyn Read + Send>>,
    ) -> Result<Vm> {
        let qemu = &self.target.qemu;
        process::install(&[process::Program { name: &qemu.program, package: &qemu.package }])?;
        let slot = Slot::take();
        // Socket paths must be short: a directory of their own in the temporary directory.
        let sockets = tempfile::tempdir()?;
        let socket = sockets.path().join("qmp");
        let listener = UnixListener::bind(&socket)?;
        let mut command = self.command(&socket);
        let shown = process::display(&command);
        let stderr = directory.join("qemu.log");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr)?)
            .spawn()
            .with_context(|| format!("cannot run {shown}"))?;
        // From here on the child must not outlive us, whatever fails.
        let ends = child.stdin.take().zip(child.stdout.take()).context("QEMU has no line");
        let qmp = ends
            .and_then(|(input, output)| wire(input, output))
            .and_then(|serial| Console::new(serial, directory.join("serial.log")))
            .and_then(|console| {
                let qmp = Qmp::accept(&listener, &mut child, Instant::now() + ANSWER)?;
                Ok((console, qmp))
            })
            .inspect_err(|_| end(&mut child));
        let (console, qmp) = qmp.with_context(|| {
            let said = std::fs::read_to_string(&stderr).unwrap_or_default();
            format!("QEMU does not start:\n{shown}\n{said}")
        })?;
        Ok(Vm {
            child,
            input: None,
            qmp,
            console,
            command: shown,
            stderr,
            _sockets: sockets,
            _slot: slot,
        })
    }

    fn command(&self, qmp: &Path) -> Command {
        let qemu = &self.target.qemu;
        let mut command = Command::new(&qemu.program);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-accel", "tcg", "-machine", &self.variant.machine])
            .args(["-cpu", &self.variant.cpu])
            .args(["-m", &format!("{}M", self.memory_mib), "-smp", &self.cpus.to_string()])
            // A reset becomes a shutdown and a shutdown a pause: the machine stays readable at
            // the very moment at which the guest gave it up.
            .args(["-no-reboot", "-no-shutdown", "-serial", "stdio"])
            .arg("-chardev")
            .arg(format!("socket,id=qmp,path={}", qmp.display()))
            .args(["-mon", "chardev=qmp,mode=control"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", &self.append]);
        for global in &self.variant.globals {
            command.args(["-global", global]);
        }
        if let Some(firmware) = &self.firmware {
            command.arg("-bios").arg(firmware);
        }
        for Blob { file, address } in &self.blobs {
            let file = option_value(file);
            command.arg("-device");
            command.arg(format!("loader,file={file},addr={address:#x},force-raw=on"));
        }
        if let Some((_, file)) = &self.second_line {
            command.arg("-chardev").arg(format!("file,id=line,path={}", option_value(file)));
        }
        let devices = self.variant.devices.iter().map(String::as_str);
        let line_devices = self.second_line.iter().flat_map(|(devices, _)| devices.iter().copied());
        for device in devices.chain(line_devices) {
            command.args(["-device", device]);
        }
        command.args(&self.arguments);
        for (index, disk) in self.disks.iter().enumerate() {
            let image = match (&disk.faults, &disk.server) {
                (_, Some(server)) => format!("nbd:unix:{}", option_value(server)),
                (Some(faults), None) => {
                    format!("blkdebug:{}:{}", option_value(faults), option_value(&disk.image))
                }
                (None, None) => option_value(&disk.image),
            };
            command
                .arg("-drive")
                .arg(format!("if=none,id=disk{index},format=raw,file={image},{}", disk.options))
                .args(["-device", &format!("{},drive=disk{index}", self.variant.disk(index))]);
        }
        command
    }
}

impl Vm {
    /// Waits until the console shows a line with one of `patterns`, and returns that line. The next
    /// wait begins behind it.
    ///
    /// # Errors
    /// When the time is over or the machine ends first.
    pub fn expect(&mut self, patterns: &[&str], within: Duration) -> Result<String> {
        let found = self.console.wait_for(patterns, Instant::now() + within);
        found.map_err(|why| self.tell(&why.context(format!("no line with {patterns:?}"))))
    }

    /// Waits until the guest gives the machine up, and returns QEMU's reason: `guest-reset` or
    /// `guest-shutdown`. Memory can still be read afterwards.
    ///
    /// # Errors
    /// When the time is over or QEMU ends first.
    pub fn wait_for_end(&mut self, within: Duration) -> Result<String> {
        let event = self.qmp.event("SHUTDOWN", Instant::now() + within);
        let event = event.map_err(|why| {
            self.tell(&why.context("the guest neither rebooted nor switched off"))
        })?;
        let reason = event["data"]["reason"].as_str().unwrap_or("unknown");
        Ok(reason.to_owned())
    }

    /// The command that started QEMU.
    #[must_use]
    pub fn command(&self) -> &str {
        &self.command
    }

    /// Stops the CPUs.
    ///
    /// # Errors
    /// When QEMU refuses or does not answer.
    pub fn pause(&mut self) -> Result<()> {
        self.qmp("stop", json!({})).map(drop)
    }

    /// Lets the CPUs go on.
    ///
    /// # Errors
    /// When QEMU refuses or does not answer.
    pub fn resume(&mut self) -> Result<()> {
        self.qmp("cont", json!({})).map(drop)
    }

    /// Sends `bytes` to the first serial port, as if they were typed.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn type_in(&mut self, bytes: &[u8]) -> Result<()> {
        let input = self.input.as_mut().context("its line is somebody else's")?;
        input.write_all(bytes)?;
        Ok(input.flush()?)
    }

    /// Runs a command of QEMU's monitor for people, for what QMP has no command.
    ///
    /// # Errors
    /// When QEMU refuses or does not answer.
    pub fn monitor(&mut self, command: &str) -> Result<String> {
        let answer = self.qmp("human-monitor-command", json!({ "command-line": command }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Slows a disk, `disk0` for the first, down to `rate` bytes written per second. A few MiB get through
    /// at once.
    ///
    /// # Errors
    /// When QEMU refuses or does not answer.
    pub fn throttle(&mut self, disk: &str, rate: u64) -> Result<()> {
        let limits = json!({
            "device": disk, "bps": 0, "bps_rd": 0, "bps_wr": rate, "bps_wr_max": rate.max(4 << 20),
            "iops": 0, "iops_rd": 0, "iops_wr": 0
        });
        self.qmp("block_set_io_throttle", limits).map(drop)
    }

    /// Writes `size` bytes of the guest's physical memory from `address` on, as QEMU reads it, into
    /// the file `path`.
    ///
    /// # Errors
    /// When QEMU refuses or does not answer.
    pub fn save_memory(&mut self, address: u64, size: u64, path: &Path) -> Result<()> {
        let path = path.to_str().ok_or_else(|| anyhow!("{} is not UTF-8", path.display()))?;
        let arguments = json!({ "val": address, "size": size, "filename": path });
        self.qmp("pmemsave", arguments).map(drop)
    }

    /// Runs the QMP command `name`.
    ///
    /// # Errors
    /// When QEMU refuses or does not answer.
    pub fn qmp(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let answer = self.qmp.command(name, arguments, Instant::now() + ANSWER);
        answer.map_err(|why| self.tell(&why))
    }

    /// Ends QEMU and returns all that the console showed, and when. Everything that the guest wrote
    /// is in the images then.
    ///
    /// # Errors
    /// When QEMU does not end by itself.
    pub fn quit(mut self) -> Result<Vec<Line>> {
        // QEMU may close the connection before it answers.
        let _ = self.qmp.command("quit", json!({}), Instant::now() + ANSWER);
        let deadline = Instant::now() + ANSWER;
        if let Err(why) = self.console.wait_for_close(deadline) {
            return Err(self.tell(&why));
        }
        Ok(self.console.lines())
    }

    /// `why`, with everything that a person needs to look into it.
    pub fn tell(&mut self, why: &anyhow::Error) -> anyhow::Error {
        let ended = match self.child.try_wait() {
            Ok(Some(status)) => format!("QEMU has ended ({status})"),
            _ => "QEMU is running".to_owned(),
        };
        let said = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        anyhow!(
            "{why:#}\n--- {ended}; the command was:\n{}\n{said}--- end of {}:\n{}",
            self.command,
            self.console.log().display(),
            self.console.tail(40)
        )
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A path inside one of QEMU's options, where commas are doubled.
fn option_value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// One of the [`AT_ONCE`] places.
struct Slot;

static RUNNING: Mutex<usize> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

impl Slot {
    fn take() -> Slot {
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        while *running >= AT_ONCE {
            running = FREED.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
        *running += 1;
        Slot
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        FREED.notify_one();
    }
}

/// Makes an image of `size` bytes that takes no space until something is written to it.
///
/// # Errors
/// When the file cannot be made.
pub fn sparse_image(path: &Path, size: u64) -> Result<Disk> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(size)?;
    if size == 0 {
        bail!("a disk of no size");
    }
    Ok(Disk { image: path.to_owned(), options: KEEP_HOLES, faults: None, server: None })
}
