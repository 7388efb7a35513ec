//! Tasks.

use std::collections::HashSet;

use crate::kernel::Kernel;
use crate::kernel::machine::Machine;
use crate::{Error, ReadContext, ReadError, VirtAddr, bytes};

use super::printk::Log;
use super::{Linux, list};

/// Where the members of struct task_struct lie, in bytes. Names as in include/linux/sched.h.
#[derive(Clone, Debug)]
pub struct TaskLayout {
    pid: u64,
    tgid: u64,
    comm: u64,
    stack: u64,
    tasks: u64,
    cpu: u64,
    /// `__state`, before 5.14 `state`.
    state: u64,
    exit_state: u64,
    /// `on_cpu`, in kernels for several CPUs.
    on_cpu: Option<u64>,
    /// `signal`, `thread_node` and `signal_struct.thread_head`: the threads of a process.
    threads: Option<(u64, u64, u64)>,
    run_queue_current: u64,
    run_queue_idle: u64,
}

/// Length of task_struct.comm (TASK_COMM_LEN).
const COMM: usize = 16;

impl TaskLayout {
    /// Looks the members up in the kernel's types.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn new(kernel: &Kernel<'_>) -> Result<TaskLayout, Error> {
        let task = "task_struct";
        let threads = || {
            let signal = kernel.offset(task, "signal").ok()?;
            let node = kernel.offset(task, "thread_node").ok()?;
            Some((signal, node, kernel.offset("signal_struct", "thread_head").ok()?))
        };
        Ok(TaskLayout {
            pid: kernel.offset(task, "pid")?,
            tgid: kernel.offset(task, "tgid")?,
            comm: kernel.offset(task, "comm")?,
            stack: kernel.offset(task, "stack")?,
            tasks: kernel.offset(task, "tasks")?,
            cpu: kernel.offset_of_any(task, &["thread_info.cpu", "cpu"])?,
            state: kernel.offset_of_any(task, &["__state", "state"])?,
            exit_state: kernel.offset(task, "exit_state")?,
            on_cpu: kernel.field(task, "on_cpu")?.map(|field| field.offset as u64),
            threads: threads(),
            run_queue_current: kernel.offset_of_any("rq", &["curr", "donor"])?,
            run_queue_idle: kernel.offset("rq", "idle")?,
        })
    }
}

/// A task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Address of its struct task_struct.
    pub address: VirtAddr,
    /// Its PID (that of the thread).
    pub pid: u32,
    /// PID of the process it belongs to.
    pub tgid: u32,
    /// Its name.
    pub comm: String,
    /// The CPU it runs on or last ran on.
    pub cpu: u32,
    /// Lowest address of its stack.
    pub stack: VirtAddr,
    /// Whether a CPU was running it, as the task itself says (`on_cpu`).
    pub on_cpu: bool,
    state: u32,
    exit_state: u32,
}

impl Task {
    /// Reads the task at `address`.
    ///
    /// # Errors
    /// [`ReadError`] of the first member that could not be read.
    pub fn read(
        kernel: &Kernel<'_>,
        layout: &TaskLayout,
        address: VirtAddr,
    ) -> Result<Task, ReadError> {
        let memory = kernel.memory();
        let word = |offset| memory.u32(address.offset(offset));
        Ok(Task {
            address,
            pid: word(layout.pid)?,
            tgid: word(layout.tgid)?,
            comm: bytes::c_string(&memory.bytes(address.offset(layout.comm), COMM)?),
            cpu: word(layout.cpu)?,
            stack: memory.pointer(address.offset(layout.stack))?,
            on_cpu: layout.on_cpu.map(word).transpose()?.is_some_and(|it| it != 0),
            state: word(layout.state)?,
            exit_state: word(layout.exit_state)?,
        })
    }

    /// A task for tests.
    #[cfg(test)]
    pub(crate) fn example(address: VirtAddr, pid: u32, comm: &str) -> Task {
        let stack = VirtAddr(0);
        let comm = comm.to_owned();
        Task {
            address,
            pid,
            tgid: pid,
            comm,
            cpu: 0,
            stack,
            on_cpu: false,
            state: 0,
            exit_state: 0,
        }
    }

    /// What the task was doing.
    #[must_use]
    pub fn state(&self) -> State {
        State::new(self.state, self.exit_state)
    }
}

/// What a task was doing, in crash's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Two letters, as `ps` shows them.
    pub short: &'static str,
    /// The kernel's name for it.
    pub name: &'static str,
}

impl State {
    /// Tells the state from `__state` (before 5.14 `state`) and `exit_state`. The bits mean the same
    /// from 4.14 on (include/linux/sched.h, 4.14, 6.1 and 6.12); those above 0x800 only qualify others,
    /// as TASK_FREEZABLE does from 6.1 on, but for TASK_RTLOCK_WAIT and TASK_FROZEN.
    fn new(state: u32, exit_state: u32) -> State {
        const IDLE: u32 = 0x402;
        /// TASK_UNINTERRUPTIBLE, TASK_RTLOCK_WAIT (5.15 on) and TASK_FROZEN (6.1 on).
        const UNINTERRUPTIBLE: u32 = 2 | 0x1000 | 0x8000;
        let (short, name) = match (state, exit_state) {
            (_, exit) if exit & 0x20 != 0 => ("ZO", "EXIT_ZOMBIE"),
            (_, exit) if exit & 0x10 != 0 => ("DE", "EXIT_DEAD"),
            (0, _) => ("RU", "TASK_RUNNING"),
            (state, _) if state & 1 != 0 => ("IN", "TASK_INTERRUPTIBLE"),
            (state, _) if state & IDLE == IDLE => ("ID", "TASK_IDLE"),
            (state, _) if state & UNINTERRUPTIBLE != 0 => ("UN", "TASK_UNINTERRUPTIBLE"),
            (state, _) if state & 4 != 0 => ("ST", "TASK_STOPPED"),
            (state, _) if state & 8 != 0 => ("TR", "TASK_TRACED"),
            (state, _) if state & 0x40 != 0 => ("PA", "TASK_PARKED"),
            (state, _) if state & 0x80 != 0 => ("DE", "TASK_DEAD"),
            (state, _) if state & 0x200 != 0 => ("WA", "TASK_WAKING"),
            (state, _) if state & 0x800 != 0 => ("NE", "TASK_NEW"),
            _ => ("??", "unknown"),
        };
        State { short, name }
    }
}

/// A list of tasks, and what could not be read of it.
#[derive(Debug, Default)]
pub struct TaskList {
    /// The tasks: per CPU present the idle one, then the others in the order of the kernel's list.
    pub tasks: Vec<Task>,
    /// What is missing, one sentence each.
    pub problems: Vec<String>,
}

impl Linux<'_, '_> {
    /// Reads the task at `address`.
    ///
    /// # Errors
    /// [`Error::Read`], and those of [`Linux::task_layout`].
    pub fn task(&self, address: VirtAddr) -> Result<Task, Error> {
        Task::read(self.kernel, self.task_layout()?, address).reading("a task")
    }

    /// The task that `text` names: a PID (of several idle tasks the first), or the address of a task.
    ///
    /// # Errors
    /// [`Error::NoTask`], [`Error::TaskNotFound`] when not all could be read, [`Error::Read`].
    pub fn named_task(&self, text: &str) -> Result<Task, Error> {
        let hexadecimal = text.strip_prefix("0x").unwrap_or(text);
        let Ok(pid) = text.parse::<u32>() else {
            return match u64::from_str_radix(hexadecimal, 16) {
                Ok(address) if address >> 63 == 1 => self.task(VirtAddr(address)),
                _ => Err(Error::NoTask(text.to_owned())),
            };
        };
        let TaskList { tasks, problems } = self.all_tasks()?;
        tasks.into_iter().find(|task| task.pid == pid).ok_or_else(|| match problems.is_empty() {
            true => Error::NoTask(text.to_owned()),
            false => Error::TaskNotFound(text.to_owned(), problems.join("; ")),
        })
    }

    /// The task that `cpu` was running.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::NoSymbol`], and those of the layouts.
    pub fn current(&self, cpu: u32) -> Result<Task, Error> {
        self.task(self.current_address(cpu)?)
    }

    /// Where the task is that `cpu` was running. In the middle of a switch the run queue names the next one
    /// already: x86_64 has a variable that says which one it is.
    fn current_address(&self, cpu: u32) -> Result<VirtAddr, Error> {
        let at = self.current_variable()?.and_then(|at| self.percpu().ok()?.address(at, cpu));
        match at.and_then(|at| self.kernel.memory().pointer(at).ok()) {
            Some(task) => Ok(task),
            None => {
                self.run_queue_task(cpu, self.task_layout()?.run_queue_current).or_else(|why| {
                    let tasks =
                        self.on_cpus.get_or_init(|| self.tasks_on_cpus().unwrap_or_default());
                    let own = tasks.iter().find(|(of, _)| *of == cpu);
                    own.map(|&(_, task)| task).ok_or(why)
                })
            }
        }
    }

    /// The tasks that say of themselves that a CPU was running them, for kernels whose run queues cannot
    /// be found (arm64 before BTF described per-CPU variables). Idle tasks but the first are on no list.
    fn tasks_on_cpus(&self) -> Result<Vec<(u32, VirtAddr)>, Error> {
        let layout = self.task_layout()?;
        if layout.on_cpu.is_none() {
            return Ok(Vec::new());
        }
        let (mut list, mut seen) = (TaskList::default(), HashSet::new());
        let init = self.kernel.need_symbol("init_task", "tasks cannot be listed")?;
        self.add_listed(init, layout, &mut list, &mut seen);
        list.tasks.extend(self.task(init).ok());
        let on_cpu = list.tasks.into_iter().filter(|task| task.on_cpu);
        Ok(on_cpu.map(|task| (task.cpu, task.address)).collect())
    }

    /// The per-CPU variable that holds a CPU's task: `current_task`, from 6.2 to 6.14 in `pcpu_hot`.
    fn current_variable(&self) -> Result<Option<VirtAddr>, Error> {
        if self.kernel.machine() != Machine::X86_64 {
            return Ok(None);
        }
        if let Some(variable) = self.kernel.symbol("current_task")? {
            return Ok(Some(variable));
        }
        let Some(hot) = self.kernel.symbol("pcpu_hot")? else { return Ok(None) };
        Ok(Some(hot.offset(self.kernel.offset("pcpu_hot", "current_task")?)))
    }

    /// Every CPU and the task that it was running, and which CPUs' tasks are not known.
    #[must_use]
    pub fn running(&self) -> (Vec<(u32, VirtAddr)>, Vec<String>) {
        let cpus = match self.percpu().map(|percpu| percpu.present.as_slice()) {
            Ok(cpus) => cpus,
            Err(error) => {
                return (Vec::new(), vec![format!("which tasks were running: {error}")]);
            }
        };
        let (mut running, mut missing) = (Vec::new(), Vec::new());
        for &cpu in cpus {
            match self.current_address(cpu) {
                Ok(task) => running.push((cpu, task)),
                Err(error) => missing.push(format!("the task of CPU {cpu}: {error}")),
            }
        }
        (running, missing)
    }

    /// Where the run queue of `cpu` is (struct rq).
    pub(super) fn run_queue(&self, cpu: u32) -> Result<VirtAddr, Error> {
        let symbol = self.kernel.need_symbol("runqueues", "running tasks cannot be found")?;
        let missing = ReadError::NotMapped(symbol);
        self.percpu()?.address(symbol, cpu).ok_or(missing).reading("a run queue")
    }

    fn run_queue_task(&self, cpu: u32, member: u64) -> Result<VirtAddr, Error> {
        let queue = self.run_queue(cpu)?;
        self.kernel.memory().pointer(queue.offset(member)).reading("a run queue")
    }

    /// The CPU that panicked; without a panic the one that crashed, else the one whose registers
    /// were saved on the way into the capture kernel, else the one that the log says it of (those of an
    /// exception are saved where it happened), else the first.
    ///
    /// # Errors
    /// Those of [`Linux::percpu`].
    pub fn crashed_cpu(&self) -> Result<u32, Error> {
        let percpu = self.percpu()?;
        for name in ["panic_cpu", "crashing_cpu"] {
            let Some(at) = self.kernel.symbol(name)? else { continue };
            match self.kernel.memory().u32(at) {
                Ok(cpu) if percpu.present.contains(&cpu) => return Ok(cpu),
                _ => {}
            }
        }
        let left = |&&cpu: &&u32| {
            self.saved_registers(cpu).is_some_and(|registers| self.left_for_capture(&registers))
        };
        if let Some(&left) = percpu.present.iter().find(left) {
            return Ok(left);
        }
        let said = Log::read(self.kernel).ok().and_then(|log| log.reporting_cpu());
        let said = said.filter(|cpu| percpu.present.contains(cpu));
        Ok(said.or(percpu.online.first().copied()).unwrap_or(0))
    }

    /// Whether a CPU saved these registers as its own before it jumped to the capture kernel: other
    /// CPUs save those of what they were stopped in.
    #[must_use]
    pub fn left_for_capture(&self, registers: &[u8]) -> bool {
        let stand = self.kernel.machine().stand(registers);
        // crash_setup_regs() is inlined there (kernel/kexec_core.c; crash_core.c from 6.7 on).
        let place = stand.and_then(|stand| self.place(stand.pc));
        place.is_some_and(|place| matches!(&*place.name, "__crash_kexec" | "crash_kexec"))
    }

    /// All tasks, idle ones included.
    ///
    /// # Errors
    /// Those of the layouts; what cannot be read is in [`TaskList::problems`].
    pub fn all_tasks(&self) -> Result<TaskList, Error> {
        let layout = self.task_layout()?;
        let mut list = TaskList::default();
        let mut seen = HashSet::new();
        let present = match self.percpu() {
            Ok(percpu) => percpu.present.as_slice(),
            Err(error) => {
                list.problems.push(format!("idle tasks: {error}"));
                &[]
            }
        };
        for &cpu in present {
            match self.run_queue_task(cpu, layout.run_queue_idle).and_then(|at| self.task(at)) {
                Ok(task) => {
                    seen.insert(task.address);
                    list.tasks.push(task);
                }
                Err(error) => list.problems.push(format!("idle task of CPU {cpu}: {error}")),
            }
        }
        let init = self.kernel.need_symbol("init_task", "tasks cannot be listed");
        match &init {
            Ok(init) => self.add_listed(*init, layout, &mut list, &mut seen),
            Err(error) => list.problems.push(error.to_string()),
        }
        // Where the lists are torn, run queues lead to some more.
        if !list.problems.is_empty() {
            let running = self.running().0.into_iter().map(|(_, address)| address);
            let found = init.into_iter().chain(running).filter(|&it| seen.insert(it));
            list.tasks.extend(found.filter_map(|address| self.task(address).ok()));
        }
        Ok(list)
    }

    /// Adds all tasks but the idle ones, `init` being the first of these.
    fn add_listed(
        &self,
        init: VirtAddr,
        layout: &TaskLayout,
        list: &mut TaskList,
        seen: &mut HashSet<VirtAddr>,
    ) {
        let walk = list::walk(self.kernel.memory(), init.offset(layout.tasks));
        list.problems.extend(walk.broken.map(|why| format!("tasks: {why}")));
        for node in walk.nodes {
            self.add_process(node.back(layout.tasks), layout, list, seen);
        }
    }

    fn add_process(
        &self,
        leader: VirtAddr,
        layout: &TaskLayout,
        list: &mut TaskList,
        seen: &mut HashSet<VirtAddr>,
    ) {
        let mut members = vec![leader];
        match self.threads(leader, layout) {
            Some(Ok(walk)) => {
                members.extend(walk.nodes);
                list.problems.extend(walk.broken.map(|why| format!("threads: {why}")));
            }
            Some(Err(error)) => list.problems.push(format!("threads of {leader:#x}: {error}")),
            None => {}
        }
        for address in members.into_iter().filter(|&address| seen.insert(address)) {
            match Task::read(self.kernel, layout, address) {
                Ok(task) => list.tasks.push(task),
                Err(error) => list.problems.push(format!("task {address:#x}: {error}")),
            }
        }
    }

    /// The threads of a process, as addresses of tasks.
    fn threads(
        &self,
        leader: VirtAddr,
        layout: &TaskLayout,
    ) -> Option<Result<list::Walk, ReadError>> {
        let (signal, node, head) = layout.threads?;
        let signal = match self.kernel.memory().pointer(leader.offset(signal)) {
            Ok(signal) => signal,
            Err(error) => return Some(Err(error)),
        };
        let mut walk = list::walk(self.kernel.memory(), signal.offset(head));
        for thread in &mut walk.nodes {
            *thread = thread.back(node);
        }
        Some(Ok(walk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_told_by_their_bits_whatever_qualifies_them() {
        let short = |state, exit| State::new(state, exit).short;
        assert_eq!((short(0, 0), short(1, 0), short(2, 0)), ("RU", "IN", "UN"));
        // TASK_FREEZABLE beside TASK_INTERRUPTIBLE and TASK_IDLE; TASK_WAKEKILL beside three others.
        assert_eq!((short(0x2001, 0), short(0x2402, 0)), ("IN", "ID"));
        assert_eq!((short(0x102, 0), short(0x104, 0), short(0x108, 0)), ("UN", "ST", "TR"));
        assert_eq!((short(0x40, 0), short(0x1000, 0), short(0x8000, 0)), ("PA", "UN", "UN"));
    }

    #[test]
    fn task_that_has_ended_is_a_zombie_until_its_parent_has_asked() {
        assert_eq!(State::new(0x80, 0x20).name, "EXIT_ZOMBIE");
        assert_eq!(State::new(0x80, 0x10).name, "EXIT_DEAD");
    }
}
