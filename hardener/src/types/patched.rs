//! Branches by a pointer that the kernel makes direct ones: paravirt and static calls.
//!
//! A static call's pointer is changed by `static_call_update` alone. Where all who name one do so to give it a function by name, it holds
//! these functions and what it holds in the image, and nothing else; any other may be given what a module has. A paravirt call's pointer
//! holds functions of the kernel's own only: those that are declared as what it holds in the image, or as it is
//! (arch/x86/include/asm/paravirt_types.h).

use super::btf::{Btf, Type};
use super::functions::FunctionIndex;
use super::layout::{Layout, Ptr};
use super::prototypes::{ProtoId, Prototypes};
use super::sites::{Entries, Forward, Reach};
use crate::image::{Image, Tables};
use crate::text::Text;
use penumbra_bundle::LinkVa;
use rustc_hash::{FxHashMap, FxHashSet};

/// The pointers of paravirt calls, and their type.
const PARAVIRT: &str = "pv_ops";
const PARAVIRT_TYPE: &str = "paravirt_patch_template";
/// `call *disp32(%rip)`.
const CALL_POINTER: [u8; 2] = [0xff, 0x15];
/// `jmp rel32`.
const JMP: u8 = 0xe9;
/// `call rel32`.
const CALL: u8 = 0xe8;
/// Changes a static call.
pub const UPDATE: &str = "__static_call_update";
/// What a static call is given that is to return 0 (kernel/static_call.c).
const RETURNS_ZERO: &str = "__static_call_return0";
/// The length of both a direct call and a direct jump.
const DIRECT: u32 = 5;

/// What is known of the kernel.
pub struct Known<'a> {
    /// The image.
    pub image: &'a Image,
    /// Its text.
    pub text: &'a Text,
    /// Types.
    pub btf: &'a Btf,
    /// Functions.
    pub index: &'a FunctionIndex,
    /// Prototypes.
    pub prototypes: &'a Prototypes,
    /// Members.
    pub layout: &'a Layout<'a>,
}

/// Says of each such branch in the text what it may reach.
pub fn add(known: &Known<'_>, tables: &Tables, entries: &Entries, forward: &mut Forward) {
    let span = known.text.span;
    let ops = known.image.symbol(PARAVIRT);
    let ty = known.btf.ids().find(|id| {
        matches!(known.btf.at(*id), Type::Composite { .. }) && known.btf.name(*id) == PARAVIRT_TYPE
    });
    let mut found = Vec::new();
    let mut by_pointer: FxHashMap<u64, Reach> = FxHashMap::default();
    for site in &tables.paravirt {
        let Some(at) = span.offset(site.site) else {
            continue;
        };
        let pointer = known.pointer(site.site).zip(ops).zip(ty);
        let reach = pointer.map_or(Reach::Any, |((pointer, ops), ty)| {
            let reach = by_pointer.entry(pointer.0);
            let reach = reach.or_insert_with(|| known.paravirt(pointer, ops, ty));
            reach.clone()
        });
        found.push((at, reach));
    }
    let updates = Updates::find(known, tables);
    let mut by_key: FxHashMap<u64, Reach> = FxHashMap::default();
    for site in &tables.static_calls {
        let Some(at) = span.offset(site.site) else {
            continue;
        };
        let trampoline = known.branch(site.site).map(|(_, trampoline)| trampoline);
        let reach = trampoline.map_or(Reach::Any, |trampoline| {
            let reach = by_key.entry(site.key.0);
            let reach = reach.or_insert_with(|| known.static_call(&updates, site.key, trampoline));
            reach.clone()
        });
        found.push((at, reach));
    }
    forward.add_patched(found, entries);
}

impl Known<'_> {
    /// Where the pointer of the call at `at` stands.
    fn pointer(&self, at: LinkVa) -> Option<LinkVa> {
        let code = self.image.at(at, 6)?;
        let displacement = i32::from_le_bytes(code[2..].try_into().ok()?);
        let to = (at.0 + 6).wrapping_add_signed(displacement.into());
        code.starts_with(&CALL_POINTER).then_some(LinkVa(to))
    }

    /// The opcode of the direct branch at `at`, and where it goes.
    fn branch(&self, at: LinkVa) -> Option<(u8, LinkVa)> {
        let code = self.image.at(at, DIRECT as usize)?;
        let displacement = i32::from_le_bytes(code[1..].try_into().ok()?);
        let to = (at.0 + u64::from(DIRECT)).wrapping_add_signed(displacement.into());
        matches!(code[0], CALL | JMP).then_some((code[0], LinkVa(to)))
    }

    /// What the function at `at` is declared as.
    fn declared(&self, at: LinkVa) -> Vec<ProtoId> {
        let at = self.text.span.offset(at);
        let function = at.and_then(|at| self.index.at(at.0));
        let declared = function.filter(|function| !function.clone);
        let declared = declared.map_or(&[][..], |function| &function.declared);
        let classes = declared.iter();
        classes
            .filter_map(|ty| self.prototypes.class(*ty))
            .collect()
    }

    fn paravirt(&self, pointer: LinkVa, ops: LinkVa, ty: u32) -> Reach {
        let delta = pointer.0.checked_sub(ops.0);
        let Some(delta) = delta.and_then(|delta| i32::try_from(delta).ok()) else {
            return Reach::Any;
        };
        let held = self.image.u64_at(pointer).map(LinkVa);
        let field = self.layout.field(Ptr { ty, delta });
        let offset = held.and_then(|held| self.text.span.offset(held));
        // `struct paravirt_callee_save`: what is called there keeps all registers. Of functions that a compiler makes only the
        // trivial ones do that which stand there from the start; all others are assembly.
        if let (true, Some(held)) = (field.anything, offset) {
            return Reach::functions(vec![held]);
        }
        let mut all = held.map_or_else(Vec::new, |held| self.declared(held));
        all.extend(field.to.iter().filter_map(|to| self.prototypes.class(*to)));
        known(all)
    }

    /// What the static call of `key` may reach, whose `trampoline` the file has as it is built.
    fn static_call(&self, updates: &Updates, key: LinkVa, trampoline: LinkVa) -> Reach {
        let mut held = updates.of_key.get(&key.0).cloned().unwrap_or_default();
        match self.branch(trampoline) {
            Some((JMP, to)) => held.push(to),
            // It returns, with 0 or with nothing.
            _ => held.extend(self.image.symbol(RETURNS_ZERO)),
        }
        if updates.open.contains(&key.0) {
            return Reach::Any;
        }
        let offsets = held.iter().filter_map(|at| self.text.span.offset(*at));
        Reach::functions(offsets.collect())
    }
}

/// Who changes static calls.
#[derive(Default)]
struct Updates {
    /// By key: the functions that it is given by name.
    of_key: FxHashMap<u64, Vec<LinkVa>>,
    /// Keys that may be given something that is not named.
    open: FxHashSet<u64>,
}

impl Updates {
    /// Looks at the arguments of all calls of, and jumps to, `__static_call_update(key, trampoline, function)`, which a compiler puts right before
    /// them where they are constants.
    fn find(known: &Known<'_>, tables: &Tables) -> Updates {
        let mut updates = Updates::default();
        let keys = tables.static_calls.iter().map(|site| site.key.0);
        let keys: FxHashSet<u64> = keys.collect();
        let Some(update) = known.image.symbol(UPDATE) else {
            updates.open = keys;
            return updates;
        };
        // Modules may change what is exported, and who does not name the key has it from a pointer.
        let exported = tables.exports.iter().map(|at| at.0);
        let pointers = known.image.relocs.abs64.iter();
        let pointed = pointers.filter_map(|at| known.image.u64_at(*at));
        let others = exported.chain(pointed).filter(|at| keys.contains(at));
        updates.open.extend(others);
        let mut named: FxHashMap<u64, u32> = FxHashMap::default();
        for name in [".text", ".init.text"] {
            let (Some(section), Some(code)) =
                (known.image.section(name), known.image.section_bytes(name))
            else {
                continue;
            };
            for at in memchr::memchr2_iter(CALL, JMP, code) {
                let va = LinkVa(section.range.start.0 + at as u64);
                if known.branch(va).is_some_and(|(_, to)| to == update)
                    && let Some(key) = updates.add(&code[..at])
                {
                    *named.entry(key).or_default() += 1;
                }
            }
        }
        // Whatever else names a key may lead there too.
        let mut mentioned: FxHashMap<u64, u32> = FxHashMap::default();
        for at in &known.image.relocs.abs32 {
            let word = known.image.u32_at(*at);
            let to = word.map(|word| i64::from(word as i32) as u64);
            if let Some(key) = to.filter(|to| keys.contains(to)) {
                *mentioned.entry(key).or_default() += 1;
            }
        }
        let others = mentioned.into_iter();
        let others = others.filter(|(key, times)| named.get(key) != Some(times));
        updates.open.extend(others.map(|(key, _)| key));
        updates
    }

    /// Adds a call, or jump, that stands behind `code`; the key that it names.
    fn add(&mut self, mut code: &[u8]) -> Option<u64> {
        let (mut key, mut function) = (None, None);
        loop {
            let len = match code {
                // `mov $imm32` to %rdi, %rdx, %rsi.
                [.., 0x48, 0xc7, register @ (0xc7 | 0xc2 | 0xc6), a, b, c, d] => {
                    let value = i64::from(i32::from_le_bytes([*a, *b, *c, *d])) as u64;
                    match register {
                        0xc7 => _ = key.get_or_insert(value),
                        0xc2 => _ = function.get_or_insert(value),
                        _ => {}
                    }
                    7
                }
                // `xor %edx, %edx`.
                [.., 0x31, 0xd2] => {
                    function.get_or_insert(0);
                    2
                }
                // `mov` from an argument to what is none and not new in 64 bits.
                [.., 0x89, 0xfb | 0xf3 | 0xd3 | 0xfd | 0xf5 | 0xd5] => 2,
                _ => break,
            };
            code = &code[..code.len() - len];
        }
        match (key, function) {
            (None, _) => {}
            (Some(key), None) => _ = self.open.insert(key),
            (Some(key), Some(function)) => {
                let given = self.of_key.entry(key).or_default();
                given.extend((function != 0).then_some(LinkVa(function)));
            }
        }
        key
    }
}

fn known(all: Vec<ProtoId>) -> Reach {
    match all.is_empty() {
        true => Reach::Any,
        false => Reach::prototypes(all),
    }
}

#[cfg(test)]
mod tests {
    use super::Updates;
    use penumbra_bundle::LinkVa;

    const KEY: u64 = 0xffff_ffff_82a5_bdb0;
    const FUNCTION: u64 = 0xffff_ffff_81a1_16a0;

    /// What is learned from a call behind `code`.
    fn learned(code: &[&[u8]]) -> Updates {
        let mut updates = Updates::default();
        updates.add(&code.concat());
        updates
    }

    /// `mov $imm32` to `rdx`, `rsi` or `rdi`.
    fn load(register: u8, value: u64) -> Vec<u8> {
        let mut code = vec![0x48, 0xc7, register];
        code.extend((value as u32).to_le_bytes());
        code
    }

    #[test]
    fn a_function_that_is_named_is_known() {
        let (rdx, rsi, rdi) = (
            load(0xc2, FUNCTION),
            load(0xc6, 0x81e0_0578),
            load(0xc7, KEY),
        );
        // `mov %edi, %ebx` between.
        let updates = learned(&[&[0x53], &rdx, &[0x89, 0xfb], &rsi, &rdi]);
        assert_eq!(updates.of_key[&KEY], [LinkVa(FUNCTION)]);
        assert!(updates.open.is_empty());
    }

    #[test]
    fn no_function_is_known_too() {
        let updates = learned(&[&[0x31, 0xd2], &load(0xc7, KEY)]);
        assert!(updates.of_key[&KEY].is_empty() && updates.open.is_empty());
    }

    #[test]
    fn a_function_that_was_given_may_be_any() {
        // `mov %rdi, %rdx`, as in `paravirt_set_sched_clock`.
        let updates = learned(&[&[0x48, 0x89, 0xfa], &load(0xc7, KEY)]);
        assert!(updates.open.contains(&KEY) && updates.of_key.is_empty());
    }

    #[test]
    fn what_does_not_name_the_key_says_nothing_of_it() {
        let updates = learned(&[&load(0xc2, FUNCTION), &[0x48, 0x89, 0xdf]]);
        assert!(updates.open.is_empty() && updates.of_key.is_empty());
    }
}
