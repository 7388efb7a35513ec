//! The dead kernel: its memory, and where things are in it.

use core::fmt;

use super::facts::{Facts, Member};
use super::kallsyms::{Name, Symbol};
use super::memory::KernelMemory;
use super::module::Module;
use super::text::Clean;

/// No function is as long: what is further behind a symbol does not belong to it.
const MAX_FUNCTION: u64 = 1 << 20;
/// Length of task_struct.comm (TASK_COMM_LEN).
const COMM: usize = 16;

/// The dead kernel.
pub struct Kernel<'a> {
    /// Its memory.
    pub memory: KernelMemory<'a>,
    /// Where things are.
    pub facts: &'a Facts,
    /// The module that was found last: neighbours in a trace are of the same one.
    module: Option<Module>,
    /// The function of a module that was found last: to find one, all symbols of its module are read.
    function: Option<(Module, Symbol)>,
}

/// A place in the kernel's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The function it is in.
    pub function: Symbol,
    /// The module that this belongs to; empty for the kernel's image.
    pub module: Name,
}

impl Place {
    /// The place as the kernel prints it (`%pB`): `vfs_write+0xc7/0x3f0 [module]`.
    pub fn at(&self, address: u64) -> impl fmt::Display {
        struct Shown<'p>(&'p Place, u64);
        impl fmt::Display for Shown<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Symbol { name, start, size, .. } = &self.0.function;
                write!(f, "{}+{:#x}/{:#x}", Clean(name), self.1.wrapping_sub(*start), size)?;
                if self.0.module.is_empty() {
                    return Ok(());
                }
                write!(f, " [{}]", Clean(&self.0.module))
            }
        }
        Shown(self, address)
    }
}

/// Whose code it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The kernel's image.
    Image,
    /// A module.
    Module(Module),
}

/// A task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Where its task_struct is.
    pub address: u64,
    /// Its PID (that of the thread).
    pub pid: u32,
    /// Its name.
    pub comm: Name,
}

impl<'a> Kernel<'a> {
    /// The kernel whose memory this is.
    pub fn new(memory: KernelMemory<'a>, facts: &'a Facts) -> Kernel<'a> {
        Kernel { memory, facts, module: None, function: None }
    }

    /// The function that `at` lies in.
    pub fn place(&mut self, at: u64) -> Option<Place> {
        if let Some(function) = self.image_function(at) {
            return Some(Place { function, module: Name::new() });
        }
        let module = self.module_covering(at)?;
        let function = self.module_function(module, at)?;
        Some(Place { function, module: module.name(&mut self.memory, self.facts) })
    }

    fn module_function(&mut self, module: Module, at: u64) -> Option<Symbol> {
        if let Some((of, function)) = &self.function
            && *of == module
            && at.checked_sub(function.start).is_some_and(|skip| skip < function.size)
        {
            return Some(function.clone());
        }
        let function = module.symbol(&mut self.memory, self.facts, at)?;
        self.function = Some((module, function.clone()));
        Some(function)
    }

    /// The function of the kernel's image that `at` lies in.
    pub fn image_function(&mut self, at: u64) -> Option<Symbol> {
        let symbol = self.facts.kallsyms?.covering(&mut self.memory, at)?;
        let is_code = matches!(symbol.kind, b't' | b'T' | b'w' | b'W');
        (is_code && at.wrapping_sub(symbol.start) < MAX_FUNCTION).then_some(symbol)
    }

    /// The module with `at` in its text. A user's address is in none.
    pub fn module_covering(&mut self, at: u64) -> Option<Module> {
        if at >> 63 == 0 {
            return None;
        }
        if self.module.is_none_or(|module| !module.has(at)) {
            self.module = Module::covering(&mut self.memory, self.facts, at);
        }
        self.module
    }

    /// Whose code `at` is an address of.
    pub fn code(&mut self, at: u64) -> Option<Code> {
        if self.facts.text.contains(&at) {
            return Some(Code::Image);
        }
        if let Some(module) = self.module_covering(at) {
            return Some(Code::Module(module));
        }
        self.image_function(at).map(|_| Code::Image)
    }

    /// The task that ran on `cpu`.
    pub fn task_of(&mut self, cpu: u64) -> Option<Task> {
        let facts = self.facts;
        let offset = self.memory.u64(facts.per_cpu?.checked_add(cpu.checked_mul(8)?)?)?;
        // Per-CPU areas lie before or behind the image: the sum wraps.
        let queue = facts.run_queues?.wrapping_add(offset);
        let address = self.memory.u64(queue.checked_add(facts.member(Member::QueueCurrent)?)?)?;
        let pid = self.memory.u32(address.checked_add(facts.member(Member::TaskPid)?)?)?;
        let mut comm = [0; COMM];
        let at = address.checked_add(facts.member(Member::TaskComm)?)?;
        let length = self.memory.text(at, &mut comm);
        let comm = Name::from_slice(comm.get(..length)?).ok()?;
        Some(Task { address, pid, comm })
    }
}
