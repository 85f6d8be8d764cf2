//! A domain in memory, for the tests of everything above Xen.
//!
//! It keeps the rules of the real interface that the logic leans on: views exist only while altp2m is on, a default or
//! bound view cannot be destroyed, ENABLE compares the generation, DISABLE drops everything, a binding lapses with its
//! witnesses, protected and hidden frames are not written. `contract` asks both the same questions. Any call can be made
//! to fail.

mod guest;
mod table;

pub use table::{Bound, Table};

use super::{
    Altp2mMode, Binding, BindingReply, DomId, Domain, Errno, Events, Gfn, Group, GuestPa,
    Hypervisor, Life, PAGE, Root, Vcpu, ViewId, Witness, XenError,
};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

/// What runs right before a call that changes the domain; it sees the call's name and may write guest memory.
pub type Hook = Box<dyn Fn(&Fake, &str)>;

/// What one view has of its own.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct View {
    /// Frames in place of the host's.
    pub map: BTreeMap<Gfn, Gfn>,
    /// What the guest cannot write through it.
    pub read_only: BTreeSet<Gfn>,
}

/// A domain in memory.
pub struct Fake {
    /// What Xen says of it.
    pub domain: RefCell<Domain>,
    /// Registers of the vCPUs that are up.
    pub vcpus: RefCell<Vec<Vcpu>>,
    /// Frames of the host view.
    pub memory: RefCell<BTreeMap<Gfn, Box<[u8; PAGE]>>>,
    /// altp2m in its configuration.
    pub mode: Cell<Altp2mMode>,
    /// altp2m now.
    pub on: Cell<bool>,
    /// What each view has of its own.
    pub views: RefCell<BTreeMap<ViewId, View>>,
    /// The binding table.
    pub table: RefCell<Table>,
    /// Whether this Xen knows HVMOP_altp2m_binding.
    pub patched: Cell<bool>,
    /// Most roots in the table.
    pub room: Cell<usize>,
    /// Calls that changed something, in order.
    pub log: RefCell<Vec<String>>,
    /// The changing call (counted from 0) that fails, and how.
    pub fail: Cell<Option<(usize, Errno)>>,
    /// Every later call fails too: as if the installer had been killed there.
    pub for_good: Cell<bool>,
    /// See [`Hook`].
    pub hook: RefCell<Option<Hook>>,
    /// The same for requests that only ask.
    pub asked: RefCell<Option<Hook>>,
}

impl Fake {
    /// A domain with `pages` pages of memory from frame 0 on and one vCPU.
    pub fn with_ram(pages: u64) -> Fake {
        let fake = Fake {
            domain: RefCell::new(Domain {
                id: DomId(1),
                uuid: "c0ffee".to_owned(),
                max_vcpu: 0,
                pages,
                max_pages: pages + 1,
                address_bits: 40,
                hvm: true,
                hap: true,
                life: Life::Runs,
            }),
            vcpus: RefCell::new(vec![Vcpu::default()]),
            memory: RefCell::default(),
            mode: Cell::new(Altp2mMode::External),
            on: Cell::new(false),
            views: RefCell::default(),
            table: RefCell::default(),
            patched: Cell::new(true),
            room: Cell::new(8192),
            log: RefCell::default(),
            fail: Cell::new(None),
            for_good: Cell::new(false),
            hook: RefCell::default(),
            asked: RefCell::default(),
        };
        for page in 0..pages {
            fake.memory
                .borrow_mut()
                .insert(Gfn(page), Box::new([0; PAGE]));
        }
        fake
    }

    /// Writes guest memory without any of the rules.
    pub fn poke(&self, at: GuestPa, bytes: &[u8]) {
        let mut memory = self.memory.borrow_mut();
        for (offset, byte) in bytes.iter().enumerate() {
            let at = GuestPa(at.0 + offset as u64);
            let page = memory.get_mut(&at.gfn()).expect("the test's own memory");
            page[(at.0 % PAGE as u64) as usize] = *byte;
        }
    }

    /// Reads guest memory as `view` has it.
    pub fn peek(&self, view: ViewId, at: GuestPa, len: usize) -> Vec<u8> {
        let views = self.views.borrow();
        let memory = self.memory.borrow();
        (0..len as u64)
            .map(|offset| {
                let at = GuestPa(at.0 + offset);
                let gfn = views
                    .get(&view)
                    .and_then(|view| view.map.get(&at.gfn()))
                    .copied()
                    .unwrap_or(at.gfn());
                memory[&gfn][(at.0 % PAGE as u64) as usize]
            })
            .collect()
    }

    /// One entry of a view.
    fn map(
        &self,
        view: ViewId,
        gfn: Gfn,
        copy: Option<Gfn>,
        read_only: bool,
    ) -> Result<(), XenError> {
        let memory = self.memory.borrow();
        let there = memory.contains_key(&gfn) && copy.is_none_or(|copy| memory.contains_key(&copy));
        let mut views = self.views.borrow_mut();
        let Some(view) = views.get_mut(&view) else {
            return refuse("Remap", Errno::INVAL);
        };
        if !there {
            return refuse("Remap", Errno::SRCH);
        }
        match copy {
            Some(copy) => view.map.insert(gfn, copy),
            None => view.map.remove(&gfn),
        };
        if read_only {
            view.read_only.insert(gfn);
        } else {
            view.read_only.remove(&gfn);
        }
        Ok(())
    }

    /// Counts a changing call, lets the hook run, and fails it if that was asked for.
    fn change(&self, what: String) -> Result<(), XenError> {
        if let Some(hook) = &*self.hook.borrow() {
            hook(self, &what);
        }
        let index = self.log.borrow().len();
        self.log.borrow_mut().push(what.clone());
        match self.fail.get() {
            Some((at, errno)) if at == index || (self.for_good.get() && at < index) => {
                Err(XenError::Call { what, errno })
            }
            _ => Ok(()),
        }
    }
}

impl AsRef<dyn Hypervisor> for Fake {
    fn as_ref(&self) -> &(dyn Hypervisor + 'static) {
        self
    }
}

fn refuse<T>(what: &str, errno: Errno) -> Result<T, XenError> {
    Err(XenError::Call {
        what: what.to_owned(),
        errno,
    })
}

impl Hypervisor for Fake {
    fn domain(&self) -> Result<Domain, XenError> {
        Ok(self.domain.borrow().clone())
    }

    fn vcpu(&self, index: u32) -> Result<Vcpu, XenError> {
        match self.vcpus.borrow().get(index as usize) {
            Some(vcpu) => Ok(*vcpu),
            None => refuse("a vCPU that is down", Errno::NOENT),
        }
    }

    fn read(&self, gfn: Gfn, offset: usize, buf: &mut [u8]) -> Result<(), XenError> {
        let memory = self.memory.borrow();
        let page = memory.get(&gfn).ok_or(XenError::NoFrame(gfn))?;
        buf.copy_from_slice(&page[offset..offset + buf.len()]);
        Ok(())
    }

    fn write(&self, gfn: Gfn, offset: usize, bytes: &[u8]) -> Result<(), XenError> {
        self.change(format!("write {gfn}"))?;
        let mut memory = self.memory.borrow_mut();
        let page = memory.get_mut(&gfn).ok_or(XenError::NoFrame(gfn))?;
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn refresh(&self) {}

    fn highest_gfn(&self) -> Result<Gfn, XenError> {
        let memory = self.memory.borrow();
        Ok(*memory.keys().next_back().expect("a domain has memory"))
    }

    fn set_max_pages(&self, pages: u64) -> Result<(), XenError> {
        self.change(format!("set_max_pages {pages}"))?;
        self.domain.borrow_mut().max_pages = pages;
        Ok(())
    }

    fn populate(&self, first: Gfn, count: u64) -> Result<(), XenError> {
        // Half of them are there when it fails, as with the real one.
        let result = self.change(format!("populate {count}"));
        let done = if result.is_ok() { count } else { count / 2 };
        let mut domain = self.domain.borrow_mut();
        for index in 0..done {
            if domain.pages == domain.max_pages {
                return refuse("populate", Errno::NOMEM);
            }
            domain.pages += 1;
            let gfn = Gfn(first.0 + index);
            let there = self.memory.borrow_mut().insert(gfn, Box::new([0; PAGE]));
            assert!(there.is_none(), "populate never replaces guest memory");
        }
        result
    }

    fn depopulate(&self, first: Gfn, count: u64) -> Result<u64, XenError> {
        self.change(format!("depopulate {count}"))?;
        let mut taken = 0;
        for index in 0..count {
            let gfn = Gfn(first.0 + index);
            let used = self
                .views
                .borrow()
                .values()
                .any(|view| view.map.values().any(|copy| *copy == gfn));
            assert!(!used, "a frame that a view maps is not taken away");
            taken += u64::from(self.memory.borrow_mut().remove(&gfn).is_some());
        }
        self.domain.borrow_mut().pages -= taken;
        Ok(taken)
    }

    fn altp2m_mode(&self) -> Result<Altp2mMode, XenError> {
        Ok(self.mode.get())
    }

    fn altp2m_on(&self) -> Result<bool, XenError> {
        Ok(self.on.get())
    }

    fn altp2m_set(&self, on: bool) -> Result<(), XenError> {
        self.change(format!("altp2m_set {on}"))?;
        if !on {
            self.views.borrow_mut().clear();
            *self.table.borrow_mut() = Table::default();
        }
        self.on.set(on);
        Ok(())
    }

    fn create_view(&self) -> Result<ViewId, XenError> {
        self.change("create_view".to_owned())?;
        assert!(self.on.get(), "views need altp2m");
        let mut views = self.views.borrow_mut();
        let view = (1..10).map(ViewId).find(|view| !views.contains_key(view));
        match view {
            Some(view) => {
                views.insert(view, View::default());
                Ok(view)
            }
            None => refuse("create_view", Errno::INVAL),
        }
    }

    fn destroy_view(&self, view: ViewId) -> Result<(), XenError> {
        self.change(format!("destroy_view {view}"))?;
        let table = self.table.borrow();
        if table.enabled
            && (table.default == view || table.bound.values().any(|to| to.view == view))
        {
            return refuse("destroy_view", Errno::BUSY);
        }
        match self.views.borrow_mut().remove(&view) {
            Some(_) => Ok(()),
            // Xen's word for that, too.
            None => refuse("destroy_view", Errno::BUSY),
        }
    }

    fn remap_all(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        read_only: bool,
    ) -> Result<(), XenError> {
        self.armed("Remap")?;
        let fails = self.change(format!("Remap {view}"));
        if view == ViewId::HOST {
            return refuse("Remap", Errno::INVAL);
        }
        // Half of them are done when it fails, as the real one may do.
        let done = if fails.is_ok() {
            pages.len()
        } else {
            pages.len() / 2
        };
        for (gfn, copy) in &pages[..done] {
            self.map(view, *gfn, *copy, read_only)?;
        }
        fails
    }

    fn remap_group(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        group: Group,
    ) -> Result<(), XenError> {
        if self.table.borrow().generation != group.generation {
            return refuse("Remap", Errno::AGAIN);
        }
        self.remap_all(view, pages, true)?;
        let mut table = self.table.borrow_mut();
        let gfns = table.groups.entry(group.key).or_default();
        gfns.extend(pages.iter().map(|(gfn, _)| *gfn));
        Ok(())
    }

    fn binding(&self, request: Binding) -> Result<BindingReply, XenError> {
        self.table_action(request, &[])
    }

    fn set_binding(
        &self,
        root: Root,
        view: ViewId,
        pair: bool,
        witnesses: &[Witness],
    ) -> Result<(), XenError> {
        let request = Binding::new(super::Action::Set)
            .root(root)
            .view(view)
            .flags(u16::from(pair));
        self.table_action(request, witnesses).map(drop)
    }

    fn events(&self) -> Result<Events, XenError> {
        self.take_events()
    }
}
