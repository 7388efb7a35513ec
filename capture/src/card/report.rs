//! The card, line by line: the most important first.

use core::fmt::{self, Write};

use heapless::String;

use crate::dump::Source;

use super::Sink;
use super::cpus::{Cpu, Cpus, register_names};
use super::kernel::Kernel;
use super::log::{self, LastWords};
use super::text::{Clean, Time, between, number};
use super::trace::Trace;
use super::unwind::{End, Frame, Kind};

#[path = "report_head.rs"]
mod head;

/// Most bytes of a line; longer ones are cut.
const LINE: usize = log::TEXT + 64;
/// Bytes of the log's end that are shown, and what a record takes of them besides its text.
const LOG_BYTES: usize = 8 << 10;
const LOG_PREFIX: usize = 17;
/// What reading the log may cost, whatever was spent on anything else: it says most.
pub(super) const LOG_COST: u64 = 2 << 20;
/// Registers on a line.
const IN_A_LINE: usize = 3;

/// Functions in which the CPU that starts the crash kernel saves its registers.
const CRASHERS: [&[u8]; 2] = [b"__crash_kexec", b"crash_kexec"];

/// A card in the making.
pub struct Report<'a, 'k> {
    pub kernel: &'a mut Kernel<'k>,
    pub source: Source<'a>,
    /// For the notes of the CPUs.
    pub scratch: &'a mut [u8],
    pub out: &'a mut dyn Sink,
    /// Bytes that may still be written.
    pub room: usize,
    /// Whether the card says already that not everything was read.
    pub is_told: bool,
}

impl Report<'_, '_> {
    /// Writes the whole card.
    pub fn write(&mut self) {
        self.kernel.memory.allow(LOG_COST);
        let words = match self.kernel.facts.log {
            Some(log) => log.last_words(&mut self.kernel.memory),
            None => LastWords::default(),
        };
        let crasher = self.crasher(&words);
        self.write_head(&words);
        self.write_task(crasher.as_ref(), &words);
        self.write_taint(&words);
        match &crasher {
            Some(cpu) => {
                self.line(format_args!("call trace of CPU {}", cpu.number));
                self.write_trace(cpu);
                self.line(format_args!("registers of CPU {}", cpu.number));
                self.write_registers(cpu);
            }
            None => self.line(format_args!("no CPU saved its registers: no call trace")),
        }
        self.tell_if_spent();
        self.kernel.memory.allow(LOG_COST);
        self.write_log();
        self.write_others(crasher.as_ref());
        self.tell_if_spent();
    }

    /// Says once that more was to be read than a card may cost.
    fn tell_if_spent(&mut self) {
        if self.kernel.memory.is_spent() && !self.is_told {
            self.is_told = true;
            self.line(format_args!("(reading took too long: names and values are missing)"));
        }
    }

    /// Writes a line, if there is room.
    fn line(&mut self, text: fmt::Arguments<'_>) {
        const END: &str = "(no room for more)";
        let mut line = String::<LINE>::new();
        // What is longer than a line is cut.
        let _ = line.write_fmt(text);
        let need = line.len() + 1 + END.len() + 1;
        if self.room >= need {
            self.room -= line.len() + 1;
            self.out.line(self.kernel.memory.machine(), &line);
        } else if self.room > 0 {
            self.room = 0;
            self.out.line(self.kernel.memory.machine(), END);
        }
    }

    /// The CPU that started the crash kernel.
    fn crasher(&mut self, words: &LastWords) -> Option<Cpu> {
        let at = self.kernel.facts.panic_cpu;
        let told = at.and_then(|at| self.kernel.memory.u32(at)).filter(|cpu| cpu >> 31 == 0);
        let said = words.who.as_deref().and_then(|who| between(who, "CPU: ", &[])).and_then(number);
        let architecture = self.source.headers.architecture();
        let (mut first, mut by_log) = (None, None);
        let mut cpus = Cpus::default();
        while let Some(cpu) = self.next_cpu(&mut cpus) {
            let is_told = match told {
                Some(told) => u64::from(told) == cpu.number,
                None => cpu
                    .pc(architecture)
                    .and_then(|pc| self.kernel.image_function(pc))
                    .is_some_and(|function| CRASHERS.contains(&function.name.as_slice())),
            };
            if is_told {
                return Some(cpu);
            }
            if said == Some(cpu.number) {
                by_log.get_or_insert(cpu);
            }
            first.get_or_insert(cpu);
        }
        by_log.or(first)
    }

    fn next_cpu(&mut self, cpus: &mut Cpus) -> Option<Cpu> {
        cpus.next(self.source.headers, self.kernel.memory.machine(), self.scratch)
    }

    fn write_trace(&mut self, cpu: &Cpu) {
        let architecture = self.source.headers.architecture();
        let trace = Trace::of(self.kernel, architecture, cpu.registers());
        for (index, frame) in trace.first().iter().enumerate() {
            self.write_frame(frame, index == 0);
        }
        if trace.left_out() > 0 {
            self.line(format_args!("  ({} frames left out)", trace.left_out()));
        }
        for frame in trace.last() {
            self.write_frame(&frame, false);
        }
        if trace.end != End::KernelThread {
            self.line(format_args!("  ({})", trace.end));
        }
    }

    fn write_frame(&mut self, frame: &Frame, is_first: bool) {
        let remark = match frame.kind {
            Kind::Registers if !is_first => "  (interrupted)",
            Kind::LinkRegister => "  (caller in x30)",
            _ => "",
        };
        if let Some(place) = self.kernel.place(frame.lookup()) {
            return self.line(format_args!("  {}{remark}", place.at(frame.pc)));
        }
        let module = self.kernel.module_covering(frame.lookup());
        match module.map(|module| module.name(&mut self.kernel.memory, self.kernel.facts)) {
            Some(name) => {
                self.line(format_args!("  {:#018x} [{}]{remark}", frame.pc, Clean(&name)));
            }
            None => self.line(format_args!("  {:#018x} (no symbol){remark}", frame.pc)),
        }
    }

    fn write_registers(&mut self, cpu: &Cpu) {
        for some in register_names(self.source.headers.architecture()).chunks(IN_A_LINE) {
            let mut line = String::<80>::new();
            for &(name, index) in some {
                if let Some(value) = cpu.word(index.into()) {
                    let _ = write!(line, "  {} {value:016x}", Clean(&name));
                }
            }
            if !line.is_empty() {
                self.line(format_args!("{line}"));
            }
        }
    }

    fn write_log(&mut self) {
        let Some(log) = self.kernel.facts.log else {
            return self.line(format_args!("no log: VMCOREINFO does not describe it"));
        };
        let (mut first, mut bytes) = (0, 0);
        while first < log.len() && bytes < LOG_BYTES {
            let record = log.record(&mut self.kernel.memory, first);
            // A record without text costs a little too: there may be many.
            bytes += record.map_or(1, |record| record.length + LOG_PREFIX);
            first += 1;
        }
        self.line(format_args!("log, its end"));
        for back in (0..first).rev() {
            let Some(record) = log.record(&mut self.kernel.memory, back) else { continue };
            let mut buffer = [0; log::TEXT];
            let text = log.read(&mut self.kernel.memory, &record, &mut buffer);
            for line in text.split(|&byte| byte == b'\n') {
                self.line(format_args!("[{}] {}", Time(record.time), Clean(line)));
            }
        }
    }

    /// The other CPUs: first what each did, then its registers.
    fn write_others(&mut self, crasher: Option<&Cpu>) {
        let crasher = crasher.map(|cpu| cpu.number);
        for with_registers in [false, true] {
            let mut cpus = Cpus::default();
            while let Some(cpu) = self.next_cpu(&mut cpus).filter(|_| self.room > 0) {
                if crasher == Some(cpu.number) {
                    continue;
                }
                if with_registers {
                    self.line(format_args!("registers of CPU {}", cpu.number));
                    self.write_registers(&cpu);
                } else {
                    self.write_other(&cpu);
                }
            }
        }
    }

    fn write_other(&mut self, cpu: &Cpu) {
        let pc = cpu.pc(self.source.headers.architecture()).unwrap_or(0);
        let mut task = String::<64>::new();
        let running = self.kernel.task_of(cpu.number);
        // In the middle of a switch the run queue names the next task already.
        if let Some(found) = running.filter(|task| task.pid == cpu.pid) {
            let _ = write!(task, ", command \"{}\"", Clean(&found.comm));
        }
        let (number, pid) = (cpu.number, cpu.pid);
        match self.kernel.place(pc) {
            Some(place) => {
                self.line(format_args!("CPU {number}: PID {pid}{task}, in {}", place.at(pc)));
            }
            None => self.line(format_args!("CPU {number}: PID {pid}{task}, at {pc:#018x}")),
        }
    }
}
