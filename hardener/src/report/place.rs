//! What a person means by an address or a name.

use super::cave::{CaveView, Thunk};
use crate::passes;
use penumbra_bundle::{
    Bundle, Cave, LinkVa, Offending, PassSummary, SlotKind, TextOff, VaRange, Variant,
};
use thiserror::Error;

/// A function of the kernel or a thunk, and perhaps an address in it.
pub struct Place {
    /// Its name.
    pub name: String,
    /// Other names of the same address.
    pub aliases: Vec<String>,
    /// Its code.
    pub range: VaRange,
    /// Whether it is a thunk.
    pub thunk: bool,
    /// The address, when one was asked for.
    pub at: Option<LinkVa>,
}

/// Why what was asked for is nowhere.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlaceError {
    /// No address and no name.
    #[error(
        "`{0}` is no address like 0xffffffff81000000 and no symbol like vfs_read or vfs_read+0x12"
    )]
    Malformed(String),
    /// No such symbol.
    #[error("no symbol `{name}` in the kernel's text and no such thunk; {hint}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What may be meant.
        hint: String,
    },
    /// Static functions of one name.
    #[error("{} functions are called `{name}`; give one of their addresses: {}", .at.len(), list(.at))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Where they are.
        at: Vec<LinkVa>,
    },
    /// An offset past a function.
    #[error("`{name}` has {size} bytes; {offset:#x} lies behind it")]
    Past {
        /// The function.
        name: String,
        /// Its length.
        size: u64,
        /// The offset.
        offset: u64,
    },
    /// Neither text nor cave.
    #[error(
        "{at} lies outside the kernel's text ({} to {}); addresses are as linked, so take the slide off one that a running kernel printed, and ask by name for a module's", .text.start, .text.end
    )]
    Outside {
        /// The address.
        at: LinkVa,
        /// The text.
        text: VaRange,
    },
    /// A table or what is left of the cave.
    #[error("{at} lies in the cave, in {what}; only thunks are code")]
    NoCode {
        /// The address.
        at: LinkVa,
        /// What is there.
        what: String,
    },
}

fn list(all: &[LinkVa]) -> String {
    let all: Vec<String> = all.iter().map(ToString::to_string).collect();
    all.join(", ")
}

/// Finds `what`: `0xffffffff81345678`, `name`, `name+0x12`, or as an oops prints it, `name+0x12/0x345`.
pub fn find(bundle: &Bundle, cave: &CaveView<'_>, what: &str) -> Result<Place, PlaceError> {
    let malformed = || PlaceError::Malformed(what.to_owned());
    if let Some(digits) = what.strip_prefix("0x") {
        let at = u64::from_str_radix(digits, 16).map_err(|_| malformed())?;
        return at_address(bundle, cave, LinkVa(at));
    }
    // As System.map and oopses have addresses.
    if what.len() == 16 && what.starts_with("ffff") {
        let at = u64::from_str_radix(what, 16).map_err(|_| malformed())?;
        return at_address(bundle, cave, LinkVa(at));
    }
    let (name, offset) = match what.split_once('+') {
        None => (what, None),
        Some((name, offset)) => {
            let offset = offset.split('/').next().unwrap_or_default();
            let number = match offset.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => offset.parse(),
            };
            (name, Some(number.map_err(|_| malformed())?))
        }
    };
    if name.is_empty() {
        return Err(malformed());
    }
    let mut place = named(bundle, cave, name)?;
    if let Some(offset) = offset {
        if offset >= place.range.len() {
            return Err(PlaceError::Past {
                name: name.to_owned(),
                size: place.range.len(),
                offset,
            });
        }
        place.at = place.range.start.checked_add(offset);
    }
    Ok(place)
}

fn named(bundle: &Bundle, cave: &CaveView<'_>, name: &str) -> Result<Place, PlaceError> {
    if let Some(thunk) = cave.thunks().iter().find(|thunk| thunk.name == name) {
        return Ok(Place {
            name: name.to_owned(),
            aliases: Vec::new(),
            range: thunk.range,
            thunk: true,
            at: None,
        });
    }
    let symbols = &bundle.symbols.0;
    let mut found: Vec<TextOff> = symbols
        .iter()
        .filter(|symbol| symbol.name == name)
        .map(|symbol| symbol.at)
        .collect();
    found.dedup();
    let start = bundle.manifest.text.start;
    match found[..] {
        [] => {
            let names = symbols.iter().map(|symbol| symbol.name.as_str());
            let thunks = cave.thunks().iter().map(|thunk| thunk.name.as_str());
            // Longer than any name: not worth the quadratic distance.
            let near = names
                .chain(thunks)
                .filter(|_| name.len() <= 80)
                .map(|known| (strsim::osa_distance(name, known), known))
                .min()
                .filter(|(distance, _)| *distance <= name.len() / 3);
            let hint = match near {
                Some((_, near)) => format!("did you mean `{near}`?"),
                None => {
                    "`hardener inspect` names the thunks, /proc/kallsyms the functions".to_owned()
                }
            };
            Err(PlaceError::Unknown {
                name: name.escape_debug().to_string(),
                hint,
            })
        }
        [at] => Ok(function(bundle, at, Some(name))),
        _ => Err(PlaceError::Ambiguous {
            name: name.to_owned(),
            at: found
                .iter()
                .map(|at| LinkVa(start.0 + u64::from(at.0)))
                .collect(),
        }),
    }
}

fn at_address(bundle: &Bundle, cave: &CaveView<'_>, at: LinkVa) -> Result<Place, PlaceError> {
    let manifest = &bundle.manifest;
    if let Some(thunk) = cave.thunk_at(at) {
        return Ok(Place {
            name: thunk.name.clone(),
            aliases: Vec::new(),
            range: thunk.range,
            thunk: true,
            at: Some(at),
        });
    }
    if manifest.cave.range.contains(at) {
        let mut tables = manifest.cave.tables.iter();
        let table = tables.find(|table| table.range.contains(at));
        return Err(PlaceError::NoCode {
            at,
            what: table.map_or("filler".to_owned(), |table| {
                format!("table `{}`", table.name)
            }),
        });
    }
    let text = manifest.text.range();
    if !text.contains(at) {
        return Err(PlaceError::Outside { at, text });
    }
    let mut place = function(bundle, TextOff((at.0 - text.start.0) as u32), None);
    place.at = Some(at);
    Ok(place)
}

/// The function around `at`: from the last symbol at or before it to the next.
fn function(bundle: &Bundle, at: TextOff, name: Option<&str>) -> Place {
    let (symbols, text) = (&bundle.symbols.0, bundle.manifest.text.range());
    let after = symbols.partition_point(|symbol| symbol.at <= at);
    let start = symbols[..after]
        .last()
        .map_or(TextOff(0), |symbol| symbol.at);
    let end = symbols
        .get(after)
        .map_or(text.len(), |next| u64::from(next.at.0));
    let first = symbols.partition_point(|symbol| symbol.at < start);
    let mut names: Vec<String> = symbols[first..after]
        .iter()
        .map(|symbol| symbol.name.clone())
        .collect();
    let own = names
        .iter()
        .position(|one| Some(one.as_str()) == name)
        .unwrap_or(0);
    let name = match names.is_empty() {
        true => "(no symbol)".to_owned(),
        false => names.remove(own),
    };
    Place {
        name,
        aliases: names,
        range: VaRange {
            start: LinkVa(text.start.0 + u64::from(start.0)),
            end: LinkVa(text.start.0 + end),
        },
        thunk: false,
        at: None,
    }
}

/// The design's letter for a kind of slot, and what it is.
pub fn slot(kind: SlotKind) -> (char, &'static str) {
    match kind {
        SlotKind::Call => ('C', "direct call"),
        SlotKind::Return => ('R', "return"),
        SlotKind::Indirect => ('I', "indirect branch"),
    }
}

/// The pass of `variant` whose edit leads to `thunk`: that which the thunk's traps or its name tell, else the first that edits
/// such slots.
pub fn pass_of<'v>(
    cave: &Cave,
    variant: &'v Variant,
    slot: SlotKind,
    thunk: Option<&Thunk>,
) -> Option<&'v PassSummary> {
    let traps = thunk.map_or(&[][..], |thunk| cave.traps_in(thunk.range));
    let by_trap = |pass: &&PassSummary| traps.first().is_some_and(|trap| trap.pass == pass.name);
    let known = passes::known();
    let of_kind = |pass: &&PassSummary| {
        let pass = known.get(pass.name.as_str());
        pass.is_some_and(|pass| pass.slot() == slot)
    };
    let named = |pass: &&PassSummary| {
        let pass = known.get(pass.name.as_str());
        thunk.is_some_and(|thunk| pass.is_some_and(|pass| pass.is_in(&thunk.name)))
    };
    let all = || variant.passes.iter();
    let alone = |pass: &&PassSummary| {
        let pass = known.get(pass.name.as_str());
        pass.is_some_and(|pass| !pass.shares_slots())
    };
    let found = all().find(by_trap);
    let found = found.or_else(|| all().filter(alone).find(named));
    found.or_else(|| all().find(of_kind))
}

/// Where a trap's value stands.
pub fn offending(place: Offending) -> String {
    match place {
        Offending::Register(number) => {
            let name = crate::text::REGISTERS.get(usize::from(number));
            format!("%{}", name.unwrap_or(&"?"))
        }
        Offending::Stack(word) => format!("the word at {}(%rsp)", 8 * word),
    }
}
