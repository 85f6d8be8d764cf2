//! Code as people read it: instructions in the syntax of `objdump -d`, with names for what they reach.

use super::cave::CaveView;
use iced_x86::{
    Decoder, DecoderOptions, Formatter, GasFormatter, Instruction, SymbolResolver, SymbolResult,
};
use penumbra_bundle::{Bundle, LinkVa, Symbols, TextOff, VaRange};
use std::rc::Rc;

/// One instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Where it stands.
    pub at: LinkVa,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// As `objdump -d` has it.
    pub text: String,
    /// Where it branches to, when it says so itself.
    pub target: Option<LinkVa>,
}

/// Names of addresses in the kernel's text and in the cave.
pub struct Names {
    text: VaRange,
    /// Thunks and tables, by address.
    cave: Vec<(VaRange, String)>,
    symbols: Symbols,
}

impl Names {
    /// Those of a bundle.
    pub fn of(bundle: &Bundle, cave: &CaveView<'_>) -> Rc<Names> {
        let thunks = cave.thunks().iter();
        let thunks = thunks.map(|thunk| (thunk.range, thunk.name.clone()));
        let tables = bundle.manifest.cave.tables.iter();
        let tables = tables.map(|table| (table.range, table.name.clone()));
        let mut named: Vec<(VaRange, String)> = thunks.chain(tables).collect();
        named.sort_by_key(|(range, _)| range.start);
        Rc::new(Names {
            text: bundle.manifest.text.range(),
            cave: named,
            symbols: bundle.symbols.clone(),
        })
    }

    /// `name` or `name+0x12`: a thunk's, a table's, or the last symbol's at or before `va`.
    pub fn name(&self, va: LinkVa) -> Option<String> {
        let after = self.cave.partition_point(|(range, _)| range.start <= va);
        let in_cave = self.cave[..after].last();
        let (name, behind) = match in_cave.filter(|(range, _)| range.contains(va)) {
            Some((range, name)) => (name.as_str(), va.0 - range.start.0),
            None if self.text.contains(va) => {
                let at = TextOff((va.0 - self.text.start.0) as u32);
                let (name, behind) = self.symbols.lookup(at)?;
                (name, u64::from(behind))
            }
            None => return None,
        };
        Some(match behind {
            0 => name.to_owned(),
            _ => format!("{name}+{behind:#x}"),
        })
    }
}

struct Resolver(Rc<Names>);

impl SymbolResolver for Resolver {
    fn symbol(
        &mut self,
        _: &Instruction,
        _: u32,
        _: Option<u32>,
        address: u64,
        size: u32,
    ) -> Option<SymbolResult<'_>> {
        // 32-bit fields are sign-extended in the kernel's code model.
        let full = match size {
            4 => i64::from(address as u32 as i32) as u64,
            _ => address,
        };
        let name = self.0.name(LinkVa(full))?;
        Some(SymbolResult::with_string(address, name))
    }
}

/// Turns bytes into lines.
pub struct Lister {
    formatter: GasFormatter,
}

impl Lister {
    /// One that writes these names.
    pub fn new(names: &Rc<Names>) -> Lister {
        let resolver = Resolver(Rc::clone(names));
        let mut formatter = GasFormatter::with_options(Some(Box::new(resolver)), None);
        let options = formatter.options_mut();
        options.set_first_operand_char_index(7);
        options.set_space_after_operand_separator(false);
        options.set_uppercase_hex(false);
        options.set_small_hex_numbers_in_decimal(false);
        options.set_show_symbol_address(false);
        Lister { formatter }
    }

    /// The instructions of `bytes`, which stand at `start`.
    pub fn lines(&mut self, start: LinkVa, bytes: &[u8]) -> Vec<Line> {
        let mut decoder = Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE);
        let mut lines = Vec::new();
        while decoder.can_decode() {
            let from = decoder.position();
            let instruction = decoder.decode();
            let mut text = String::new();
            self.formatter.format(&instruction, &mut text);
            let target = instruction.near_branch_target();
            lines.push(Line {
                at: LinkVa(instruction.ip()),
                bytes: bytes[from..decoder.position()].to_vec(),
                text: text.trim_end().to_owned(),
                target: (target != 0).then_some(LinkVa(target)),
            });
        }
        lines
    }
}

/// `e8 00 00 00 00`.
pub fn spaced(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}
