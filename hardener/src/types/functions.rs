//! The functions of the text: where each lies, its prototypes, and what it is given in registers.

use super::alike::are_alike;
use super::btf::{Btf, Type, VOID};
use crate::image::{Image, Tables};
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::SmallVec;

/// Code in the image: the text, and what runs at boot only. Offsets are from the text's start.
pub struct Places<'a> {
    /// The text's link address.
    pub start: u64,
    parts: Vec<(u32, &'a [u8])>,
}

impl<'a> Places<'a> {
    /// All sections with code that start at or behind `start` and within reach of 32 bits.
    pub fn of(image: &'a Image, start: u64) -> Places<'a> {
        let mut parts: Vec<(u32, &[u8])> = Vec::new();
        for name in [".text", ".init.text"] {
            let Some(section) = image.section(name) else {
                continue;
            };
            let at = section.range.start.0.checked_sub(start);
            let at = at.and_then(|at| u32::try_from(at).ok());
            let bytes = image.section_bytes(name).unwrap_or_default();
            let fits = at.and_then(|at| at.checked_add(u32::try_from(bytes.len()).ok()?));
            if let (Some(at), Some(_)) = (at, fits) {
                parts.push((at, bytes));
            }
        }
        Places { start, parts }
    }

    /// One section that starts at 0.
    #[cfg(test)]
    pub fn alone(bytes: &'a [u8]) -> Places<'a> {
        Places {
            start: 0,
            parts: vec![(0, bytes)],
        }
    }

    /// The offset of an address in code.
    pub fn offset(&self, va: u64) -> Option<u32> {
        let at = u32::try_from(va.checked_sub(self.start)?).ok()?;
        self.part(at).map(|_| at)
    }

    /// The bytes from one offset to another in the same section.
    pub fn bytes(&self, from: u32, to: u32) -> &'a [u8] {
        let inside = self.part(from).and_then(|(start, bytes)| {
            bytes.get((from - start) as usize..((to - start) as usize).min(bytes.len()))
        });
        inside.unwrap_or_default()
    }

    /// The first offset behind the section around `at`.
    fn end(&self, at: u32) -> u32 {
        self.part(at)
            .map_or(at, |(start, bytes)| start + bytes.len() as u32)
    }

    fn part(&self, at: u32) -> Option<(u32, &'a [u8])> {
        let mut parts = self.parts.iter().copied();
        parts.find(|(start, bytes)| at >= *start && ((at - start) as usize) < bytes.len())
    }
}

/// Why what BTF says of a function may be another one's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doubt {
    /// BTF has fewer prototypes than there are functions of its name (pahole keeps the first, or one for each of its threads).
    Name,
    /// Its address is put where something else is declared: BTF has an inlined namesake's, or C casts the pointer.
    Place,
    /// Its code takes for a pointer what is none by its declaration.
    Code,
}

/// One function.
#[derive(Debug, Default)]
pub struct Function {
    /// Its parts, entry first: offsets in the text, and the first offsets behind.
    pub ranges: Vec<(u32, u32)>,
    /// BTF ids of the prototypes that its name has and that may be believed; several when static functions share the name.
    pub prototypes: Vec<u32>,
    /// The same, whether they may be believed or not.
    pub declared: Vec<u32>,
    /// Why the declared ones are not believed.
    pub doubt: Option<Doubt>,
    /// Its first name.
    pub name: String,
    /// Whether all its names are a compiler's clones (`.isra.0`), whose parameters differ from the declared ones.
    pub clone: bool,
    /// It is a cold part of another function.
    pub cold: bool,
    /// Argument registers of which what is believed does not say what they point to: bit 0 is rdi.
    pub untold: u8,
}

/// No argument register is told of.
const UNTOLD: u8 = 0x3f;

impl Function {
    /// Where it is entered.
    pub fn start(&self) -> u32 {
        self.ranges[0].0
    }
}

/// All functions, by where they start.
#[derive(Default)]
pub struct FunctionIndex {
    /// The functions, ascending.
    pub all: Vec<Function>,
    by_start: FxHashMap<u32, u32>,
}

/// `__traceiter_X(void *, ...)` is what the tracepoint calls; its own callees return nothing
/// (include/linux/tracepoint.h, `__DECLARE_TRACE`).
pub const TRACE_ITERATOR: &str = "__traceiter_";

impl FunctionIndex {
    /// Finds all functions.
    pub fn find(image: &Image, tables: &Tables, places: &Places<'_>, btf: &Btf) -> FunctionIndex {
        // Few places and names are shared.
        let mut starts: FxHashMap<u32, SmallVec<[&str; 2]>> = FxHashMap::default();
        let mut sharing: FxHashMap<&str, FxHashSet<u64>> = FxHashMap::default();
        for symbol in image.symbols.iter().filter(|symbol| symbol.is_code()) {
            if btf.functions.contains_key(&symbol.name) {
                sharing.entry(&symbol.name).or_default().insert(symbol.va.0);
            }
            if let Some(at) = places.offset(symbol.va.0) {
                starts.entry(at).or_default().push(&symbol.name);
            }
        }
        let four = if tables.sealed_endbr.is_empty() { 0 } else { 4 };
        for va in &tables.fentry {
            if let Some(at) = places.offset(va.0)
                && !starts.contains_key(&at)
                && !starts.contains_key(&at.wrapping_sub(four))
            {
                starts.entry(at - four.min(at)).or_default();
            }
        }
        let mut entries: Vec<(u32, SmallVec<[&str; 2]>)> = starts.into_iter().collect();
        entries.sort_unstable();
        let next = entries
            .iter()
            .skip(1)
            .map(|entry| entry.0)
            .chain([u32::MAX]);
        let ends = entries.iter().zip(next);
        let ends: Vec<u32> = ends
            .map(|((at, _), next)| next.min(places.end(*at)))
            .collect();
        // Names of which BTF has fewer prototypes than there are functions, and which mean different ones.
        let mut doubtful: FxHashSet<&str> = FxHashSet::default();
        let short = sharing
            .iter()
            .filter(|(name, all)| all.len() > btf.functions[**name].len());
        for (name, all) in short {
            let range = |va: &u64| {
                let at = places.offset(*va)?;
                let number = entries.binary_search_by_key(&at, |entry| entry.0).ok()?;
                Some((at, ends[number]))
            };
            let ranges: Option<Vec<(u32, u32)>> = all.iter().map(range).collect();
            if !ranges.is_some_and(|ranges| are_alike(places, &ranges)) {
                doubtful.insert(*name);
            }
        }
        let mut index = FunctionIndex::default();
        let mut cold: Vec<(&str, (u32, u32))> = Vec::new();
        let mut by_name: FxHashMap<&str, SmallVec<[u32; 2]>> = FxHashMap::default();
        for ((start, names), end) in entries.into_iter().zip(ends) {
            let number = index.all.len() as u32;
            index.by_start.insert(start, number);
            let mut declared = Vec::new();
            let mut doubt = None;
            let mut clone = !names.is_empty();
            for name in &names {
                clone &= name.contains('.');
                // Only the clone whose parameters are as declared may have the name's prototype.
                let known = btf.functions.get(*name).map_or(&[][..], Vec::as_slice);
                declared.extend(known);
                if doubtful.contains(name) {
                    doubt = Some(Doubt::Name);
                }
                by_name.entry(name).or_default().push(number);
            }
            declared.sort_unstable();
            declared.dedup();
            let part = names.iter().find_map(|name| cold_parent(name));
            if let Some(parent) = part {
                cold.push((parent, (start, end)));
            }
            let prototypes = match doubt {
                Some(_) => Vec::new(),
                None => declared.clone(),
            };
            index.all.push(Function {
                ranges: vec![(start, end)],
                untold: match prototypes[..] {
                    [prototype] if !clone => untold(btf, prototype),
                    _ => UNTOLD,
                },
                prototypes,
                declared,
                doubt,
                name: names.first().copied().unwrap_or_default().to_owned(),
                clone,
                cold: part.is_some(),
            });
        }
        for (parent, range) in cold {
            // Statics share names: the part belongs to the one that branches there, and following both is harmless.
            let parents = by_name.get(parent).map_or(&[][..], SmallVec::as_slice);
            for number in parents {
                index.all[*number as usize].ranges.push(range);
            }
            if parents.is_empty()
                && let Some(number) = index.number(range.0)
            {
                // Followed by itself: nothing is known at its start, but what it refers to is.
                index.all[number as usize].cold = false;
            }
        }
        index
    }

    /// Believes what BTF says of a function no longer; whether it was believed.
    pub fn disbelieve(&mut self, number: u32, why: Doubt) -> bool {
        let function = &mut self.all[number as usize];
        if function.doubt.is_some() || function.declared.is_empty() {
            return false;
        }
        function.doubt = Some(why);
        function.prototypes.clear();
        function.untold = UNTOLD;
        true
    }

    /// The function that starts at `at`.
    pub fn at(&self, at: u32) -> Option<&Function> {
        self.by_start
            .get(&at)
            .map(|number| &self.all[*number as usize])
    }

    /// Whether `at` lies in a function.
    pub fn holds(&self, at: u32) -> bool {
        let after = self.all.partition_point(|function| function.start() <= at);
        let last = after.checked_sub(1).map(|last| self.all[last].ranges[0]);
        last.is_some_and(|range| (range.0..range.1).contains(&at))
    }

    /// The same, as its number.
    pub fn number(&self, at: u32) -> Option<u32> {
        self.by_start.get(&at).copied()
    }

    /// Callees that do not return to their callers (tools/objtool/check.c has such a list too).
    pub fn no_return(&self) -> FxHashSet<u32> {
        const NAMES: [&str; 22] = [
            "__stack_chk_fail",
            "__module_put_and_kthread_exit",
            "__reiserfs_panic",
            "cpu_bringup_and_idle",
            "cpu_startup_entry",
            "do_exit",
            "do_group_exit",
            "do_task_dead",
            "ex_handler_msr_mce",
            "fortify_panic",
            "kthread_complete_and_exit",
            "kthread_exit",
            "kunit_try_catch_throw",
            "machine_real_restart",
            "make_task_dead",
            "panic",
            "rewind_stack_and_make_dead",
            "stop_this_cpu",
            "usercopy_abort",
            "xen_start_kernel",
            "nmi_panic_self_stop",
            "rest_init",
        ];
        let all = self.all.iter();
        all.filter(|function| NAMES.contains(&function.name.as_str()))
            .map(Function::start)
            .collect()
    }

    /// Functions without a prototype that are no clones: assembly, which has its own rules about registers.
    pub fn assembly(&self) -> FxHashSet<u32> {
        let all = self.all.iter();
        all.filter(|function| function.declared.is_empty() && !function.clone)
            .map(Function::start)
            .collect()
    }
}

/// The function whose cold part is called `name`.
fn cold_parent(name: &str) -> Option<&str> {
    let (parent, number) = name.split_once(".cold")?;
    (number.is_empty() || number.starts_with('.')).then_some(parent)
}

/// What a prototype has in each argument register: the parameter's type, or none for what is no single parameter.
pub fn registers(btf: &Btf, prototype: u32) -> [Option<u32>; 6] {
    let mut out = [None; 6];
    let Some((_, parameters, _)) = btf.prototype(prototype) else {
        return out;
    };
    let mut next = 0;
    for parameter in parameters {
        let plain = btf.plain(*parameter);
        let takes = match btf.at(plain) {
            // In memory (System V psABI, 3.2.3).
            Type::Composite { size, .. } if size > 16 => 0,
            Type::Composite { size, .. } if size > 8 => 2,
            _ => 1,
        };
        if takes == 1
            && let Some(place) = out.get_mut(next)
        {
            *place = Some(plain);
        }
        next += takes;
    }
    out
}

/// The argument registers of which a prototype does not say what they point to: bit 0 is rdi.
fn untold(btf: &Btf, prototype: u32) -> u8 {
    let is_untold = |ty: u32| match btf.at(ty) {
        Type::Pointer(_) => pointee(btf, ty).is_none(),
        Type::Scalar(_) => btf.size(ty) == 8,
        _ => false,
    };
    let all = registers(btf, prototype).into_iter().enumerate();
    all.filter(|(_, ty)| ty.is_some_and(is_untold))
        .fold(0, |bits, (number, _)| bits | 1 << number)
}

/// How many argument registers a prototype fills at most; with `...`, all.
pub fn arity(btf: &Btf, prototype: u32) -> u8 {
    let Some((_, parameters, false)) = btf.prototype(prototype) else {
        return 6;
    };
    let takes = |parameter: &u32| match btf.at(btf.plain(*parameter)) {
        Type::Composite { size, .. } if size > 16 => 0,
        Type::Composite { size, .. } if size > 8 => 2u32,
        _ => 1,
    };
    parameters.iter().map(takes).sum::<u32>().min(6) as u8
}

/// How many argument registers a prototype fills at least. A structure may be passed in memory whatever its size, when its
/// members are packed or registers are short.
pub fn least_arity(btf: &Btf, prototype: u32) -> u8 {
    let Some((_, parameters, _)) = btf.prototype(prototype) else {
        return 0;
    };
    let parameters = parameters.iter().map(|ty| btf.at(btf.plain(*ty)));
    let plain = parameters.filter(|ty| !matches!(ty, Type::Composite { .. }));
    plain.count().min(6) as u8
}

/// What a pointer type points to, when something is to be gained from knowing it.
pub fn pointee(btf: &Btf, ty: u32) -> Option<u32> {
    let Type::Pointer(to) = btf.at(btf.plain(ty)) else {
        return None;
    };
    let to = btf.plain(to);
    match btf.at(to) {
        Type::Void | Type::Scalar(_) | Type::Forward | Type::Tag => None,
        _ if to == VOID => None,
        _ => Some(to),
    }
}
