//! Dumps over a serial line: what is of use first, how much there is of it, and what is left when the
//! line is bad.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tests::core_file::CoreFile;
use tests::crash::{analyzer, bench, directory, once};
use tests::trace::{self, from_crash, listing};
use tests::wire::{Settings, Wire};
use tests::{stories, stream};
use xtask::dump::{DUMP, Workbench};
use xtask::guest::Scenario;
use xtask::qemu::Vm;

stories! {
    x86_64:
        crash_card_takes_less_than_a_second_of_the_line,
        backtrace_is_there_after_60_kb,
        all_backtraces_and_the_log_are_there_after_400_kb,
        kernel_dump_is_smaller_than_12_mb_and_complete,
        kernel_dump_needs_no_vmlinux,
        full_dump_is_what_qemu_reads,
        two_way_line_that_spoils_frames_ends_exact,
        one_way_line_that_spoils_frames_names_what_it_lost;
    aarch64:
        crash_card_takes_less_than_a_second_of_the_line,
        backtrace_is_there_after_60_kb,
        all_backtraces_and_the_log_are_there_after_400_kb,
        kernel_dump_is_smaller_than_12_mb_and_complete,
        kernel_dump_needs_no_vmlinux,
        full_dump_is_what_qemu_reads,
        two_way_line_that_spoils_frames_ends_exact,
        one_way_line_that_spoils_frames_names_what_it_lost;
}

/// Bytes that a line of 115200 bits per second takes in a second.
const BYTES_PER_SECOND: usize = 11_520;

/// Memory of the guest all of which is sent: an emulated port takes less than a megabyte per second.
const FULL_MIB: u32 = 128;

/// What stands on the line around the crash card.
const CARD_BEGINS: &[u8] = b"tinykdump: crash card:";
const CARD_ENDS: &[u8] = b"tinykdump: end of the crash card";

/// A guest of 256 MiB without a disk.
fn scenario(bench: &Workbench, options: &str) -> Scenario {
    let usual = bench.scenario().appending("capture.to=serial").appending(options);
    Scenario { memory_mib: 256, ..usual }
}

fn boot(bench: &Workbench, scenario: &Scenario, wire: &Wire, directory: &Path) -> Result<Vm> {
    let guest = bench.guest();
    let mut vm = guest.with_machine(scenario, Vec::new(), directory, |machine| {
        machine.start_over(directory, |input, output| wire.lay(input, output))
    })?;
    guest.wait_for_crash(&mut vm)?;
    Ok(vm)
}

/// `host-analyzer receive SOURCE -o DUMP`.
fn receive(source: &str, dump: &Path) -> Result<Command> {
    let mut command = analyzer()?.command(&["receive"], Path::new(source), None);
    command.arg("-o").arg(dump);
    Ok(command)
}

/// Decodes what came over the line; its exit code must be `code`. Returns what it said of itself.
fn decode(bytes: &[u8], directory: &Path, name: &str, code: i32) -> Result<(PathBuf, String)> {
    let (line, dump) =
        (directory.join(format!("{name}.line")), directory.join(format!("{name}.elf")));
    std::fs::write(&line, bytes)?;
    let output = receive(&line.display().to_string(), &dump)?.output()?;
    Ok((dump, finished(&output, code)?))
}

fn finished(output: &Output, code: i32) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{:?} instead of {code}:\n{said}", output.status);
    Ok(said)
}

/// A guest whose line is paced until everything that is to come first has come.
struct Paced {
    directory: PathBuf,
    vmlinux: PathBuf,
    /// Everything that the kernel and the payload sent.
    bytes: Vec<u8>,
    wire: Wire,
    /// Where the payload begins.
    begin: usize,
}

fn paced(arch: &'static str) -> Result<&'static Paced> {
    static X86_64: OnceLock<Result<Paced, String>> = OnceLock::new();
    static AARCH64: OnceLock<Result<Paced, String>> = OnceLock::new();
    let cell = if arch == "x86_64" { &X86_64 } else { &AARCH64 };
    once(cell, || {
        let bench = bench(arch)?;
        let scenario = scenario(bench, "");
        let vmlinux = bench.vmlinux(&scenario)?;
        let directory = directory(&format!("serial/{arch}-paced"))?;
        let settings = Settings { baud: Some(115_200), paced_bytes: 410_000, one_in: 0 };
        let wire = Wire::new(&directory, settings);
        let mut vm = boot(bench, &scenario, &wire, &directory)?;
        vm.wait_for_end(DUMP)?;
        vm.quit()?;
        let bytes = wire.bytes();
        let begin = find(&bytes, b"the kernel has died").context("no payload on the line")?;
        let begin = bytes[..begin].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        Ok(Paced { directory, vmlinux, bytes, wire, begin })
    })
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

impl Paced {
    /// The dump as it is when so many bytes of the payload have come.
    fn after(&self, count: usize, name: &str) -> Result<PathBuf> {
        let end = (self.begin + count).min(self.bytes.len());
        Ok(decode(&self.bytes[..end], &self.directory, name, 2)?.0)
    }

    /// The whole dump.
    fn whole(&self, name: &str) -> Result<PathBuf> {
        Ok(decode(&self.bytes, &self.directory, name, 0)?.0)
    }

    /// Fails unless the backtrace of `dump` is the one that the kernel printed.
    fn check_backtrace(&self, dump: &Path, vmlinux: Option<&Path>) -> Result<()> {
        let text = String::from_utf8_lossy(&self.bytes[..self.begin]);
        let printed = trace::of_kernel(&text)?;
        let said = analyzer()?.run(&["bt"], dump, vmlinux)?;
        let ours = trace::of_analyzer(&said)?;
        let (ours, printed) = (from_crash(&ours)?, from_crash(&printed)?);
        let agree = trace::agree(ours, printed, &self.vmlinux)?;
        ensure!(agree, "{said}\nthe kernel printed\n{:#?}", listing(printed));
        Ok(())
    }
}

fn crash_card_takes_less_than_a_second_of_the_line(arch: &'static str) -> Result<()> {
    let paced = paced(arch)?;
    let end = find(&paced.bytes, CARD_ENDS).context("no card on the line")?;
    let card = &paced.bytes[find(&paced.bytes, CARD_BEGINS).context("no card")?..end];
    let first = paced.wire.arrival(paced.begin).context("nothing came")?;
    let took = paced.wire.arrival(end).context("nothing came")?.duration_since(first);
    println!("{} bytes, {took:?} from the payload's first to the card's last", end - paced.begin);
    for part in ["kernel   ", "panic    ", "call trace of CPU", "registers of CPU", "log, its end"]
    {
        ensure!(find(card, part.as_bytes()).is_some(), "the card has no {part:?}");
    }
    ensure!(end - paced.begin <= BYTES_PER_SECOND, "{} bytes", end - paced.begin);
    Ok(())
}

fn backtrace_is_there_after_60_kb(arch: &'static str) -> Result<()> {
    let paced = paced(arch)?;
    let dump = paced.after(60_000, "60-kb")?;
    paced.check_backtrace(&dump, Some(&paced.vmlinux))
}

fn all_backtraces_and_the_log_are_there_after_400_kb(arch: &'static str) -> Result<()> {
    let paced = paced(arch)?;
    let (part, whole) = (paced.after(400_000, "400-kb")?, paced.whole("400-kb-whole")?);
    for command in [&["bt", "-a"][..], &["bt", "--all-tasks"], &["log"]] {
        let said = |dump: &Path| analyzer()?.run(command, dump, Some(&paced.vmlinux));
        let (part, whole) = (said(&part)?, said(&whole)?);
        let (part, whole) = (without_head(&part), without_head(&whole));
        ensure!(part == whole, "{command:?} differs:\n{part}\n--- instead of\n{whole}");
    }
    Ok(())
}

/// What a command said, without what it said of the dump.
fn without_head(said: &str) -> String {
    let lines = said.lines().filter(|line| !line.starts_with("INCOMPLETE DUMP"));
    lines.flat_map(|line| [line, "\n"]).collect()
}

fn kernel_dump_is_smaller_than_12_mb_and_complete(arch: &'static str) -> Result<()> {
    let paced = paced(arch)?;
    let size = paced.bytes.len() - paced.begin;
    println!("{size} bytes on the line");
    ensure!(size < 12_000_000, "{size} bytes on the line");
    let dump = paced.whole("whole")?;
    CoreFile::open(&dump)?.check_layout()?;
    paced.check_backtrace(&dump, Some(&paced.vmlinux))
}

fn kernel_dump_needs_no_vmlinux(arch: &'static str) -> Result<()> {
    let paced = paced(arch)?;
    let dump = paced.whole("no-vmlinux")?;
    paced.check_backtrace(&dump, None)?;
    for command in ["log", "ps", "mod"] {
        let said = |vmlinux| analyzer()?.run(&[command], &dump, vmlinux);
        let (without, with) = (said(None)?, said(Some(&paced.vmlinux))?);
        ensure!(without == with, "{command} differs:\n{without}\n--- with vmlinux\n{with}");
        ensure!(without.lines().count() > 3, "{command} shows nothing:\n{without}");
    }
    let said = |vmlinux| analyzer()?.run(&["bt", "-a"], &dump, vmlinux);
    let functions = |said: &str| Ok::<_, anyhow::Error>(listing(&trace::of_analyzer(said)?));
    let (without, with) = (said(None)?, said(Some(&paced.vmlinux))?);
    ensure!(functions(&without)? == functions(&with)?, "{without}\n--- with vmlinux\n{with}");
    Ok(())
}

/// A receiver at the far end of the line.
struct Receiver(Child);

impl Receiver {
    fn start(wire: &Wire, dump: &Path) -> Result<Receiver> {
        let mut command = receive(&wire.source(), dump)?;
        let said = std::fs::File::create(dump.with_extension("said"))?;
        command.stdout(Stdio::null()).stderr(said);
        Ok(Receiver(command.spawn()?))
    }

    /// Waits for its end, which must be a good one.
    fn finish(mut self, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait()? {
                ensure!(status.success(), "the receiver ended with {status}");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("the receiver does not end")
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn full_dump_is_what_qemu_reads(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    // Without a speed: the line is as fast as the machine finds it.
    let console = format!("console={}", bench.target.qemu.console);
    let options = format!("{console} capture.serial=full capture.after=halt");
    let scenario = Scenario { memory_mib: FULL_MIB, ..scenario(bench, &options) };
    let directory = directory(&format!("serial/{arch}-full"))?;
    let wire = Wire::new(&directory, Settings::default());
    let mut vm = boot(bench, &scenario, &wire, &directory)?;
    let dump = directory.join("dump.elf");
    let receiver = Receiver::start(&wire, &dump)?;
    println!("{}", vm.expect(&["tinykdump: first block after"], DUMP)?);
    vm.expect(&["tinykdump: halted"], DUMP)?;
    receiver.finish(DUMP)?;
    vm.pause()?;
    let core = CoreFile::open(&dump)?;
    core.check_layout()?;
    let differences = core.differences_to(&mut vm, &directory)?;
    ensure!(differences.is_empty(), "{differences:#?}");
    let bytes: u64 = core.loads().map(|load| load.p_filesz).sum();
    ensure!(bytes >= (u64::from(FULL_MIB) << 20) / 100 * 90, "{} MiB are in the dump", bytes >> 20);
    vm.quit()?;
    std::fs::remove_file(&dump)?;
    Ok(())
}

fn two_way_line_that_spoils_frames_ends_exact(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = scenario(bench, "capture.after=halt");
    let directory = directory(&format!("serial/{arch}-two-way"))?;
    let wire = Wire::new(&directory, Settings { one_in: 100, ..Settings::default() });
    let mut vm = boot(bench, &scenario, &wire, &directory)?;
    let dump = directory.join("dump.elf");
    let first = Receiver::start(&wire, &dump)?;
    // Somewhere in the middle of it.
    wait_for_bytes(&wire, 3_000_000)?;
    drop(first);
    wait_for_bytes(&wire, 5_000_000)?;
    let second = Receiver::start(&wire, &dump)?;
    let line = vm.expect(&["tinykdump: first block after"], DUMP)?;
    println!("{line}; {} frames spoiled", wire.spoiled());
    ensure!(line.contains("all of it received"), "{line}");
    vm.expect(&["tinykdump: halted"], DUMP)?;
    second.finish(DUMP)?;
    ensure!(wire.spoiled() > 0, "no frame was spoiled");
    vm.pause()?;
    let core = CoreFile::open(&dump)?;
    core.check_layout()?;
    let differences = core.differences_to(&mut vm, &directory)?;
    ensure!(differences.is_empty(), "{differences:#?}");
    vm.quit()?;
    for command in ["ps", "mod", "log"] {
        analyzer()?.run(&[command], &dump, None)?;
    }
    Ok(())
}

fn wait_for_bytes(wire: &Wire, count: usize) -> Result<()> {
    let deadline = Instant::now() + DUMP;
    while wire.bytes().len() < count {
        ensure!(Instant::now() < deadline, "{} bytes came", wire.bytes().len());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn one_way_line_that_spoils_frames_names_what_it_lost(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = scenario(bench, "capture.after=halt");
    let directory = directory(&format!("serial/{arch}-one-way"))?;
    let wire = Wire::new(&directory, Settings { one_in: 100, ..Settings::default() });
    let mut vm = boot(bench, &scenario, &wire, &directory)?;
    vm.expect(&["tinykdump: halted"], DUMP)?;
    vm.pause()?;
    let (whole, _) = decode(&wire.sent(), &directory, "whole", 0)?;
    let (lossy, said) = decode(&wire.bytes(), &directory, "lossy", 2)?;
    println!("{} frames spoiled\n{said}", wire.spoiled());
    let (whole, lossy) = (CoreFile::open(&whole)?, CoreFile::open(&lossy)?);
    let differences = lossy.differences_to(&mut vm, &directory)?;
    ensure!(differences.is_empty(), "{differences:#?}");
    vm.quit()?;
    // Every page that was sent is there, but for those whose frames were lost.
    let (sent, received) = stream::pages(&wire.sent(), &wire.bytes())?;
    println!("{} pages of {}", received.len(), sent.len());
    ensure!(received.len() < sent.len(), "nothing was lost");
    ensure!(stream::pages_of(&whole) == sent, "the whole dump has other pages than were sent");
    ensure!(
        stream::pages_of(&lossy) == received,
        "other pages than those that were lost are missing"
    );
    Ok(())
}
