//! The first lines of the card: what, why, when, who.

use crate::card::cpus::Cpu;
use crate::card::facts::Member;
use crate::card::log::LastWords;
use crate::card::text::{Clean, Date, Taint, Time, between, contains, number};

use super::Report;

impl Report<'_, '_> {
    /// Release, panic message, cause and time.
    pub(super) fn write_head(&mut self, words: &LastWords) {
        let info = &self.source.old.vmcoreinfo;
        let release = info.get("OSRELEASE").unwrap_or("unknown: no VMCOREINFO");
        self.line(format_args!("kernel   {}", Clean(release.as_bytes())));
        match &words.panic {
            Some((time, line)) => {
                self.line(format_args!("panic    [{}] {}", Time(*time), Clean(line)))
            }
            None if words.cause.is_some() => {}
            None if self.kernel.facts.log.is_none() => {
                self.line(format_args!("panic    unknown: the log was not found"));
            }
            None => self.line(format_args!("panic    no such message in the log")),
        }
        if let Some((time, line)) = &words.cause {
            self.line(format_args!("cause    [{}] {}", Time(*time), Clean(line)));
        }
        let date = info.get("CRASHTIME").and_then(|time| time.parse().ok());
        match (date, words.time) {
            (Some(date), Some(up)) => self.line(format_args!(
                "time     {}, {} s after boot",
                Date(date),
                Time(up).trimmed()
            )),
            (Some(date), None) => self.line(format_args!("time     {}", Date(date))),
            (None, Some(up)) => {
                self.line(format_args!("time     {} s after boot", Time(up).trimmed()))
            }
            (None, None) => self.line(format_args!("time     unknown")),
        }
    }

    /// CPU and task that died.
    pub(super) fn write_task(&mut self, crasher: Option<&Cpu>, words: &LastWords) {
        let who = words.who.as_deref().unwrap_or_default();
        let said = between(who, " PID: ", &[]).and_then(number);
        let comm = between(who, " Comm: ", &[" Kdump: ", " Tainted: ", " Not tainted"]);
        let Some(cpu) = crasher else {
            return self.line(format_args!("task     unknown"));
        };
        let number = cpu.number;
        // In the middle of a switch the run queue names the next task already.
        let task = self.kernel.task_of(number).filter(|task| task.pid == cpu.pid);
        match (task, comm) {
            (Some(task), _) => self.line(format_args!(
                "task     CPU {number}, PID {}, command \"{}\", task_struct {:016x}",
                task.pid,
                Clean(&task.comm),
                task.address
            )),
            (None, Some(comm)) if said == Some(cpu.pid.into()) => self.line(format_args!(
                "task     CPU {number}, PID {}, command \"{}\" (by the log)",
                cpu.pid,
                Clean(comm)
            )),
            _ => self.line(format_args!(
                "task     CPU {number}, PID {}, command unknown: {}",
                cpu.pid,
                self.missing()
            )),
        }
    }

    /// The taint.
    pub(super) fn write_taint(&mut self, words: &LastWords) {
        let release = self.source.old.vmcoreinfo.get("OSRELEASE").unwrap_or("\n");
        let who = words.who.as_deref().unwrap_or_default();
        let mask = self.kernel.facts.taint.and_then(|at| self.kernel.memory.u64(at));
        if let Some(mask) = mask {
            self.line(format_args!("taint    {}", Taint(mask)));
        } else if let Some(said) = between(who, " Tainted: ", &[release]) {
            self.line(format_args!("taint    {} (by the log)", Clean(said.trim_ascii())));
        } else if contains(who, " Not tainted") {
            self.line(format_args!("taint    none (by the log)"));
        } else {
            self.line(format_args!("taint    unknown: {}", self.missing()));
        }
    }

    /// What keeps the card from saying more.
    fn missing(&self) -> &'static str {
        match self.kernel.facts {
            _ if !self.kernel.memory.is_mapped() => {
                "VMCOREINFO does not say where the page tables are"
            }
            facts if facts.kallsyms.is_none() => "the kernel's symbol table was not found",
            facts if facts.per_cpu.is_none() => "the kernel's symbol table has no variables",
            facts if facts.member(Member::TaskPid).is_none() => "the kernel's types were not found",
            _ => "it cannot be read",
        }
    }
}
