//! Types of modules: split BTF, which goes on where the kernel's own ends.
//!
//! The kernel keeps that of every loaded module (struct btf_module and struct btf, kernel/bpf/btf.c, 6.1).

use std::ops::Deref;
use std::rc::Rc;

use crate::kernel::Kernel;
use crate::kernel::btf::Btf;
use crate::{Error, ReadError, VirtAddr};

use super::{Linux, list};

/// The kernel's types, or those and a module's.
pub enum Described<'k> {
    /// The kernel's.
    Kernel(&'k Btf<'k>),
    /// Those and a module's.
    Module(Rc<Btf<'static>>),
}

impl<'k> Deref for Described<'k> {
    type Target = Btf<'k>;

    fn deref(&self) -> &Btf<'k> {
        match self {
            Described::Kernel(types) => types,
            Described::Module(types) => types,
        }
    }
}

impl Linux<'_, '_> {
    /// The kernel's types if they fit, else those of the first module that do. The kernel's own again when
    /// none do.
    ///
    /// # Errors
    /// Those of [`Kernel::types`].
    pub fn types_that(&self, fit: impl Fn(&Btf<'_>) -> bool) -> Result<Described<'_>, Error> {
        let own = self.kernel.types()?;
        if fit(own) {
            return Ok(Described::Kernel(own));
        }
        // All of them at once would be some megabytes each.
        let modules = self.modules().list.iter().map(|module| module.address);
        let types = modules.filter_map(|module| read(self.kernel, module).ok()?.ok());
        let found = types.into_iter().find(|types| fit(types));
        Ok(found.map_or(Described::Kernel(own), |types| Described::Module(Rc::new(types))))
    }

    /// The types of the module called `name`, and the kernel's.
    ///
    /// # Errors
    /// Why there are none, as a sentence.
    pub fn module_types(&self, name: &str) -> Result<Rc<Btf<'static>>, String> {
        let module = self.modules().list.iter().find(|module| module.name == name);
        let address = module.ok_or_else(|| format!("no module is called {name}"))?.address;
        let mut known = self.module_types.borrow_mut();
        let types = known.entry(address).or_insert_with(|| {
            let found = read(self.kernel, address).unwrap_or_else(|error| Err(error.to_string()));
            found.map(Rc::new).map_err(|why| format!("the types of the module {name}: {why}"))
        });
        types.clone()
    }
}

fn read(kernel: &Kernel<'_>, module: VirtAddr) -> Result<Result<Btf<'static>, String>, Error> {
    let memory = kernel.memory();
    let head = kernel.need_symbol("btf_modules", "the types of modules cannot be found")?;
    let offset = |member| kernel.offset("btf_module", member);
    let (link, to_module, to_types) = (offset("list")?, offset("module")?, offset("btf")?);
    let walk = list::walk(memory, head);
    let entries = walk.nodes.iter().map(|node| node.back(link));
    let is_it = |entry: &VirtAddr| memory.pointer(entry.offset(to_module)) == Ok(module);
    let Some(entry) = entries.into_iter().find(is_it) else {
        return Ok(Err(walk.broken.unwrap_or_else(|| "it has none (no BTF)".to_owned())));
    };
    let lost = |error: ReadError| error.to_string();
    let data = || {
        let types = memory.pointer(entry.offset(to_types)).map_err(lost)?;
        let member = |name| kernel.offset("btf", name).map_err(|error| error.to_string());
        let at = memory.pointer(types.offset(member("data")?)).map_err(lost)?;
        let size = memory.u32(types.offset(member("data_size")?)).map_err(lost)?;
        memory.bytes(at, size as usize).map_err(lost)
    };
    let types = kernel.types()?;
    Ok(data().and_then(|data| types.with_more(&data)))
}
