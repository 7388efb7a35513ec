//! The kernel's objects: tasks, per-CPU variables, modules, the log, the clock.
//!
//! Layouts come from the kernel's own types. Every walk is bounded; what could not be read is
//! said in words and costs its row only.

pub mod areas;
mod direct_map;
pub mod files;
pub mod list;
pub mod module;
pub mod module_types;
pub mod module_use;
pub mod path;
pub mod percpu;
pub mod printk;
pub mod process;
pub mod slab;
pub mod stacks;
pub mod system;
pub mod task;
pub mod times;

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use crate::kernel::btf::Btf;
use crate::kernel::{Kernel, get_or_try};
use crate::{Error, VirtAddr};

use module::Modules;
use percpu::PerCpu;
use task::TaskLayout;

/// The objects of a kernel. Layouts are looked up once, when first needed.
pub struct Linux<'k, 'd> {
    kernel: &'k Kernel<'d>,
    tasks: OnceCell<TaskLayout>,
    percpu: OnceCell<PerCpu>,
    modules: OnceCell<Modules>,
    /// Types of modules, by the addresses of their struct module; or why there are none.
    module_types: RefCell<HashMap<VirtAddr, Result<Rc<Btf<'static>>, String>>>,
    /// CPUs and their tasks, where only the tasks tell.
    on_cpus: OnceCell<Vec<(u32, VirtAddr)>>,
}

/// A place in the kernel's text as people call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the function.
    pub name: String,
    /// Bytes from its start.
    pub offset: u64,
    /// The module it belongs to; `None` for the kernel's image.
    pub module: Option<String>,
}

impl<'k, 'd> Linux<'k, 'd> {
    /// The objects of `kernel`.
    #[must_use]
    pub fn new(kernel: &'k Kernel<'d>) -> Linux<'k, 'd> {
        let (tasks, percpu) = (OnceCell::new(), OnceCell::new());
        let (modules, module_types) = (OnceCell::new(), RefCell::default());
        Linux { kernel, tasks, percpu, modules, module_types, on_cpus: OnceCell::new() }
    }

    /// The kernel below.
    #[must_use]
    pub fn kernel(&self) -> &'k Kernel<'d> {
        self.kernel
    }

    /// Where the members of a task lie.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn task_layout(&self) -> Result<&TaskLayout, Error> {
        get_or_try(&self.tasks, || TaskLayout::new(self.kernel))
    }

    /// The per-CPU areas.
    ///
    /// # Errors
    /// [`Error::NoSymbol`], [`Error::Read`].
    pub fn percpu(&self) -> Result<&PerCpu, Error> {
        get_or_try(&self.percpu, || PerCpu::new(self.kernel))
    }

    /// The loaded modules; none when their list cannot be read.
    pub fn modules(&self) -> &Modules {
        self.modules.get_or_init(|| Modules::load(self.kernel))
    }

    /// Names the function that `at` lies in.
    #[must_use]
    pub fn place(&self, at: VirtAddr) -> Option<Place> {
        if let Some(symbol) = self.kernel.image_symbol(at) {
            let offset = at.0.wrapping_sub(symbol.start.0);
            return Some(Place { name: symbol.name, offset, module: None });
        }
        self.modules().place(self.kernel, at)
    }

    /// The same, if code lies there and not data.
    #[must_use]
    pub fn code(&self, at: VirtAddr) -> Option<Place> {
        let place = self.place(at)?;
        (place.module.is_some() || self.kernel.may_be_text(at)).then_some(place)
    }
}
