//! Lists of security hooks: which functions each holds is in the image.

use super::flow::Flow;
use super::globals::Globals;
use super::values::{Op, Value};
use crate::image::Image;
use rustc_hash::{FxHashMap, FxHashSet};

/// The kernel's security modules put their functions into lists, one a hook, from initialised tables (include/linux/lsm_hooks.h,
/// `LSM_HOOK_INIT`); nobody may add any later.
pub struct Hooks {
    /// Where the heads are.
    heads: (u64, u64),
    /// Where in a list's entry the function stands.
    function: i32,
    /// By head.
    by_head: FxHashMap<u64, Vec<u64>>,
}

impl Hooks {
    /// Finds the heads and what the tables put into their lists.
    pub fn find(image: &Image, globals: &Globals) -> Hooks {
        let mut hooks = Hooks {
            heads: (0, 0),
            function: 0,
            by_head: FxHashMap::default(),
        };
        let member = |name| {
            let at = image.btf.member("security_hook_list", name)?.byte()?;
            i32::try_from(at).ok()
        };
        let size = image.btf.size_of("security_hook_heads");
        let heads = image.symbol("security_hook_heads");
        if let (Some(heads), Some(size), Some(head), Some(function)) =
            (heads, size, member("head"), member("hook"))
        {
            hooks.heads = (heads.0, heads.0 + u64::from(size));
            hooks.function = function;
            for (place, to) in &globals.initial {
                if (hooks.heads.0..hooks.heads.1).contains(to) {
                    let entry = place.wrapping_sub(head as u64);
                    if let Some(one) = globals.initial.get(&(entry + function as u64)) {
                        hooks.by_head.entry(*to).or_default().push(*one);
                    }
                }
            }
        }
        hooks
    }

    /// The functions that `value` is one of, when it is read from an entry of one hook's list.
    pub fn functions(&self, flow: &Flow, value: Value) -> Option<Vec<u64>> {
        let Op::Load(entry, offset, 8) = flow.values.op(value) else {
            return None;
        };
        if offset != self.function || self.heads.0 == 0 {
            return None;
        }
        let mut seen = FxHashSet::default();
        let mut open = vec![entry];
        let mut head = None;
        while let Some(value) = open.pop() {
            if !seen.insert(value) {
                continue;
            }
            match flow.values.op(value) {
                Op::Phi(index) => open.extend(flow.values.operands(index)),
                Op::Const(0) => {}
                Op::Load(base, 0, 8) => match flow.values.op(base) {
                    Op::Const(at) if (self.heads.0..self.heads.1).contains(&at) => {
                        if head.is_some_and(|head| head != at) {
                            return None;
                        }
                        head = Some(at);
                    }
                    _ => open.push(base),
                },
                _ => return None,
            }
        }
        Some(self.by_head.get(&head?).cloned().unwrap_or_default())
    }
}
