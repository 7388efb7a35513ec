//! The payload: what runs instead of a second Linux after a panic.
//!
//! [`main`] reads top to bottom as the story of a dump. Everything that a host test can hold is in
//! `capture` and `drivers`; here is what ties them to this machine.

#![no_std]
#![no_main]

mod arch;
mod boot;
mod console;
mod disk;
mod disks;
mod heap;
mod image;
mod memory;
mod port;
mod rescue;
mod stack;
mod targets;
mod time;
mod watchdogs;
mod windows;

use core::fmt;
use core::panic::PanicInfo;

use capture::area::Wanted;
use capture::card::Sink;
use capture::dump::{Buffers, Payload, Source};
use capture::elfcorehdr::{self, Elfcorehdr};
use capture::old::OldMemory;
use capture::options::{self, After, Options, To};
use capture::serial;
use capture::{Machine, OldPhys, Unreadable};
use drivers::clock::Clock;
use drivers::firmware::{Firmware, acpi};
use drivers::{PhysAddr, Physical};
use format::area::Reason;
use format::handoff::Handoff;
use spin::{Mutex, Once};

use crate::boot::BootInfo;
use crate::console::{CardLines, ConsoleLine};
use crate::disks::{Dead, Quiet};
use crate::memory::PhysicalMemory;
use crate::port::OwnLine;
use crate::targets::Job;
use crate::time::PayloadClock;

/// Name, version and git revision: the first line of output, and part of every dump.
const VERSION: &str =
    concat!("tinykdump ", env!("CARGO_PKG_VERSION"), " (", env!("TINYKDUMP_REVISION"), ")");

/// What stands on the console before the crash card, and behind it: host-analyzer finds it by these.
const CARD_BEGINS: &str = "crash card:";
const CARD_ENDS: &str = "end of the crash card";

/// The large parts of the dump's state, outside of the stack.
struct Workspace {
    old: OldMemory,
    buffers: Buffers,
}

static WORKSPACE: Mutex<Workspace> =
    Mutex::new(Workspace { old: OldMemory::new(), buffers: Buffers::new() });

/// What firmware told, for the way out.
static FIRMWARE: Once<Firmware> = Once::new();

/// The dead kernel's headers.
static HEADERS: Once<Elfcorehdr> = Once::new();

/// Called by the architecture's entry code, on a stack of our own, with all exceptions caught.
fn main(boot: &'static BootInfo) -> ! {
    let options = Options::parse(&boot.command_line.0);
    // The first line comes as soon as a console is known, before anything can fail.
    if console::open(options.console, &boot.firmware, &boot.memory) {
        greet(&options);
    }
    let firmware = FIRMWARE.call_once(|| {
        let mut firmware = boot.firmware.clone();
        if let Some(root) = boot.acpi_root {
            acpi::fill(&mut firmware, &boot.memory, root);
        }
        firmware
    });
    if console::open(options.console, firmware, &boot.memory) {
        greet(&options);
    }
    match arch::clock::ticks_per_second(firmware, &boot.memory) {
        Some(rate) => time::set_rate(rate),
        None => say!("no way to measure the clock: all times are rough"),
    }

    if let Err(failure) = survey(&options, boot) {
        end(&options, Err(failure))
    }
    // Why it died, before anything that could fail; and should the payload fail there, without.
    rescue::leads_to(Some(dump_without_card));
    say!("{CARD_BEGINS}");
    make_card(&options, boot);
    say!("{CARD_ENDS}");
    dump_and_finish()
}

/// Goes on where making the card failed.
extern "C" fn dump_without_card() -> ! {
    WORKSPACE.lock().buffers.abandon_card();
    say!("{CARD_ENDS}");
    dump_and_finish()
}

/// Writes the dump of the memory that was surveyed.
fn dump_and_finish() -> ! {
    rescue::leads_to(Some(give_dump_up));
    let Some((boot, firmware, headers)) = surveyed() else { finish_after_failure() };
    let options = Options::parse(&boot.command_line.0);
    let outcome = dump(&options, boot, firmware, headers);
    rescue::leads_to(None);
    end(&options, outcome)
}

/// Goes on where writing the dump failed: says so in its area.
extern "C" fn give_dump_up() -> ! {
    let Some((boot, firmware, _)) = surveyed() else { finish_after_failure() };
    let options = Options::parse(&boot.command_line.0);
    let mut workspace = WORKSPACE.lock();
    let Workspace { old, buffers } = &mut *workspace;
    let memory = boot.memory.with_devices(old);
    with_handoff(boot, |handoff| targets::mark_failed(firmware, &memory, handoff, buffers));
    end(&options, Err(Failure::Plain(Reason::PayloadFailed)))
}

/// What is known of the machine once its memory was surveyed.
fn surveyed() -> Option<(&'static BootInfo, &'static Firmware, &'static Elfcorehdr)> {
    Some((BootInfo::kept()?, FIRMWARE.get()?, HEADERS.get()?))
}

/// Says what came of it, and leaves.
fn end(options: &Options<'_>, outcome: Result<(), Failure>) -> ! {
    match &outcome {
        Ok(()) => say!("complete"),
        Err(failure) => say!("NO COMPLETE DUMP: {failure}"),
    }
    finish(options.after, outcome.err().map_or(Reason::None, |failure| failure.reason()))
}

/// The first lines.
fn greet(options: &Options<'_>) {
    say!("{VERSION} {}: the kernel has died, dumping its memory", arch::NAME);
    if let Some(word) = options.refused {
        say!("option not understood: {word}");
        if let Some(advice) = options.advice() {
            say!("{advice}");
        }
    }
}

/// Why there is no complete dump.
enum Failure {
    Elfcorehdr(elfcorehdr::Error),
    Disk(targets::Failure),
    Line(capture::dump::Error),
    /// Nothing more is to be said than the reason.
    Plain(Reason),
}

impl Failure {
    /// Its number.
    fn reason(&self) -> Reason {
        match self {
            Failure::Elfcorehdr(_) => Reason::NoHeaders,
            Failure::Disk(failure) => failure.reason(),
            Failure::Line(error) => error.reason(),
            Failure::Plain(reason) => *reason,
        }
    }

    /// How close to a dump it came, among those of several targets.
    fn rank(&self) -> u8 {
        match self {
            Failure::Disk(failure) => failure.rank(),
            Failure::Line(_) => 4,
            Failure::Elfcorehdr(_) | Failure::Plain(_) => 0,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Elfcorehdr(error) => error.fmt(f),
            Failure::Disk(failure) => failure.fmt(f),
            Failure::Line(error) => error.fmt(f),
            Failure::Plain(reason) => f.write_str(reason.text()),
        }
    }
}

/// Finds out what memory there is, by the dead kernel's word. The command line's has the last one.
fn survey(options: &Options<'_>, boot: &BootInfo) -> Result<(), Failure> {
    let mut workspace = WORKSPACE.lock();
    let Workspace { old, buffers } = &mut *workspace;
    let mut machine = ThisMachine::new(&boot.memory, options);
    let at = options.elfcorehdr.or(boot.elfcorehdr);
    let at = at.ok_or(Failure::Elfcorehdr(elfcorehdr::Error::Missing))?;
    let headers = Elfcorehdr::open(&mut machine, arch::KERNEL, at, boot.memory.limit)
        .map_err(Failure::Elfcorehdr)?;
    headers.collect(&mut machine, buffers.notes(), old).map_err(Failure::Elfcorehdr)?;
    say!(
        "kernel {}, {} MiB of memory",
        old.vmcoreinfo.get("OSRELEASE").unwrap_or("of unknown release"),
        old.size() >> 20
    );
    HEADERS.call_once(|| headers);
    Ok(())
}

fn make_card(options: &Options<'_>, boot: &BootInfo) {
    let Some(headers) = HEADERS.get() else { return };
    let mut workspace = WORKSPACE.lock();
    let Workspace { old, buffers } = &mut *workspace;
    let mut machine = ThisMachine::new(&boot.memory, options);
    buffers.make_card(&mut machine, Source { headers, old }, &mut CardLines);
}

/// Takes the workspace from whoever holds it.
///
/// # Safety
/// Whoever holds it must never run again.
unsafe fn take_workspace_from_abandoned() {
    if WORKSPACE.is_locked() {
        // SAFETY: the caller's promise. All of it is plain numbers and arrays, of any value.
        unsafe { WORKSPACE.force_unlock() };
    }
}

/// Writes the dump to where it may be written.
fn dump(
    options: &Options<'_>,
    boot: &BootInfo,
    firmware: &Firmware,
    headers: &Elfcorehdr,
) -> Result<(), Failure> {
    let mut workspace = WORKSPACE.lock();
    let Workspace { old, buffers } = &mut *workspace;
    let source = Source { headers, old };
    let payload = Payload { version: VERSION, memory_used: boot.image_size };
    let memory = boot.memory.with_devices(old);
    let mut machine = ThisMachine::new(&memory, options);
    // Nobody has told the devices: what they still write must not go into the dump.
    let quiet = Quiet::make(firmware, &memory);
    with_handoff(boot, |handoff| {
        let devices = Devices { firmware, quiet: &quiet, handoff };
        to_first_target(&mut machine, options, &devices, source, payload, buffers)
    })?;
    if old.truncated { Err(Failure::Plain(Reason::TooManyRanges)) } else { Ok(()) }
}

/// Calls `with` with the handoff, if there is one that can be believed.
fn with_handoff<T>(boot: &BootInfo, with: impl FnOnce(Option<&Handoff<'_>>) -> T) -> T {
    let Some((at, size)) = boot.handoff else { return with(None) };
    let read = |offset: u64, into: &mut [u8]| {
        at.0.checked_add(offset).is_some_and(|at| boot.memory.read(PhysAddr(at), into))
    };
    let handoff = Handoff::open(size, &read);
    if let Err(why) = &handoff {
        say!("the initrd is no handoff, files are not written to: {why}");
    }
    with(handoff.as_ref().ok())
}

/// What a dump can be written to.
struct Devices<'a> {
    firmware: &'a Firmware,
    quiet: &'a Quiet<'a>,
    handoff: Option<&'a Handoff<'a>>,
}

/// Writes the dump to the first target that takes all of it.
fn to_first_target(
    machine: &mut ThisMachine<'_>,
    options: &Options<'_>,
    devices: &Devices<'_>,
    source: Source<'_>,
    payload: Payload<'_>,
    buffers: &mut Buffers,
) -> Result<(), Failure> {
    let is_refused = options.to.iter().next().is_none();
    let mut closest = Failure::Plain(if is_refused { Reason::Refused } else { Reason::OutOfTime });
    let mut dead = Dead::default();
    let mut told = |failure: Failure| {
        say!("this target has no dump: {failure}");
        if failure.rank() >= closest.rank() {
            closest = failure;
        }
    };
    for to in options.to.iter() {
        if machine.is_time_over() {
            break;
        }
        let uuid = match to {
            To::Serial(port) => {
                let job = serial::Job { source, payload, extent: options.extent, baud: None };
                match over_line(machine, devices.firmware, (port, options.console), job, buffers) {
                    Ok(()) => return Ok(()),
                    Err(failure) => told(failure),
                }
                continue;
            }
            To::AnyArea => None,
            To::Area(uuid) => Some(uuid),
        };
        let crash_time = capture::dump::crash_time(source.old);
        let wanted = Wanted { uuid, holdoff_min: options.holdoff_min, crash_time };
        let handoff = devices.handoff;
        let mut job = Job { wanted, handoff, source, payload, buffers: &mut *buffers };
        match to_disk(machine, devices.quiet, &mut job, &mut dead) {
            Ok(()) => return Ok(()),
            Err(failure) => told(Failure::Disk(failure)),
        }
    }
    Err(closest)
}

/// Writes the dump to a disk.
fn to_disk(
    machine: &mut ThisMachine<'_>,
    quiet: &Quiet<'_>,
    job: &mut Job<'_>,
    dead: &mut Dead,
) -> Result<(), targets::Failure> {
    let complete = targets::dump_to_first(quiet, machine, job, dead)?;
    let bulk_us = complete.last_block_us - complete.first_block_us;
    tell_pages(complete.pages_read, complete.pages_unreadable, job.source.old.dropped);
    say!(
        "first block after {} ms, complete after {} ms, {} MB/s, {} KiB of memory used",
        complete.first_block_us / 1000,
        complete.last_block_us / 1000,
        complete.size / bulk_us.max(1),
        job.payload.memory_used >> 10
    );
    Ok(())
}

/// Sends the dump over the port that was asked for, or the console's.
fn over_line(
    machine: &mut ThisMachine<'_>,
    firmware: &Firmware,
    (port, console): (Option<options::Port>, options::Console),
    job: serial::Job<'_>,
    buffers: &mut Buffers,
) -> Result<(), Failure> {
    let own = port.filter(|port| !port::is_console(port, console, firmware));
    let baud = own.map_or(console.baud, |port| port.baud);
    let job = serial::Job { baud, ..job };
    let sent = match own {
        None => serial::write(machine, &mut ConsoleLine, job, buffers),
        Some(port) => {
            let mut line = OwnLine::open(&port, firmware, machine.memory)
                .ok_or(Failure::Plain(Reason::NoPort))?;
            for text in [VERSION, CARD_BEGINS] {
                line.line(machine, text);
            }
            buffers.card_text().lines().for_each(|text| line.line(machine, text));
            line.line(machine, CARD_ENDS);
            let sent = serial::write(machine, &mut line, job, buffers);
            line.drain();
            sent
        }
    };
    let complete = sent.map_err(Failure::Line)?;
    tell_pages(complete.pages_read, complete.pages_unreadable, job.source.old.dropped);
    say!(
        "first block after {} ms, complete after {} ms, {} KiB on the line, {}; {} KiB of memory used",
        complete.first_block_us / 1000,
        complete.last_block_us / 1000,
        complete.wire_bytes >> 10,
        if complete.confirmed { "all of it received" } else { "nobody said that it was received" },
        job.payload.memory_used >> 10
    );
    Ok(())
}

fn tell_pages(read: u64, unreadable: u64, dropped: u64) {
    say!("{read} pages read, {unreadable} unreadable, {dropped} headers dropped");
}

/// The machine as the dump logic sees it.
pub struct ThisMachine<'a> {
    /// Its memory.
    pub memory: &'a PhysicalMemory<'a>,
    /// When the time for the dump is over, in microseconds since the first instruction.
    pub until_us: u64,
}

impl<'a> ThisMachine<'a> {
    fn new(memory: &'a PhysicalMemory<'a>, options: &Options<'_>) -> ThisMachine<'a> {
        let us = |seconds: u64| seconds.saturating_mul(1_000_000);
        ThisMachine { memory, until_us: options.timeout_s.map_or(u64::MAX, us) }
    }
}

impl Machine for ThisMachine<'_> {
    fn read_old(&mut self, at: OldPhys, into: &mut [u8]) -> Result<(), Unreadable> {
        if self.memory.read(PhysAddr(at.0), into) { Ok(()) } else { Err(Unreadable) }
    }

    fn now_us(&self) -> u64 {
        PayloadClock.now_us()
    }

    fn is_time_over(&self) -> bool {
        self.until_us != u64::MAX && self.now_us() >= self.until_us
    }

    fn say(&mut self, line: fmt::Arguments<'_>) {
        console::line(line);
    }
}

fn finish(after: After, reason: Reason) -> ! {
    let firmware = FIRMWARE.get();
    let way = match after {
        After::Reboot => "rebooting",
        After::PowerOff => "switching off",
        After::Halt => "halted",
    };
    match reason {
        Reason::None => say!("{way}"),
        reason => say!("{way} after reason {}: {}", reason as u32, reason.text()),
    }
    console::drain();
    match after {
        After::Reboot => arch::reset::reboot(firmware),
        After::PowerOff => arch::reset::power_off(firmware),
        After::Halt => arch::reset::halt(),
    }
}

/// The way out when the payload itself has failed: there is nothing to wait for.
fn finish_after_failure() -> ! {
    finish(After::Reboot, Reason::PayloadFailed)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // SAFETY: what panicked does not go on.
    unsafe { console::take_from_abandoned() };
    say!("the payload has failed: {info}");
    rescue::after_failure()
}
