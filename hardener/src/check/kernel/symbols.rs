//! Symbols by name and by address.

use super::KernelError;
use super::kallsyms::KernelSymbol;
use penumbra_bundle::{LinkVa, VaRange};
use std::collections::HashMap;

/// All symbols of the image.
pub struct SymbolMap {
    by_address: Vec<KernelSymbol>,
    /// First symbol of each name.
    by_name: HashMap<String, LinkVa>,
}

impl SymbolMap {
    /// Indexes symbols, which are by address.
    pub fn new(by_address: Vec<KernelSymbol>) -> SymbolMap {
        let mut by_name = HashMap::with_capacity(by_address.len());
        for symbol in &by_address {
            by_name.entry(symbol.name.clone()).or_insert(symbol.at);
        }
        SymbolMap {
            by_address,
            by_name,
        }
    }

    /// The symbol called `name`.
    pub fn find(&self, name: &str) -> Option<LinkVa> {
        self.by_name.get(name).copied()
    }

    /// From the symbol `start` to the symbol `end`.
    pub fn between(&self, start: &'static str, end: &'static str) -> Result<VaRange, KernelError> {
        let find = |name| {
            self.find(name).ok_or(KernelError::Missing {
                what: "symbol",
                name,
            })
        };
        Ok(VaRange {
            start: find(start)?,
            end: find(end)?,
        })
    }

    /// All symbols by address.
    pub fn iter(&self) -> impl Iterator<Item = &KernelSymbol> {
        self.by_address.iter()
    }

    /// The addresses of all symbols called `name`.
    pub fn named(&self, name: &str) -> impl Iterator<Item = LinkVa> {
        let first = self.find(name);
        let others = first.into_iter().flat_map(move |_| {
            self.by_address
                .iter()
                .filter(move |symbol| symbol.name == name)
        });
        others.map(|symbol| symbol.at)
    }

    /// The symbols at exactly `at`.
    pub fn at(&self, at: LinkVa) -> impl Iterator<Item = &KernelSymbol> {
        let from = self.by_address.partition_point(|symbol| symbol.at < at);
        self.by_address[from..]
            .iter()
            .take_while(move |symbol| symbol.at == at)
    }

    /// From the last symbol at or before `at` to the next one after it: the function, or a part of it, that holds `at`.
    pub fn around(&self, at: LinkVa) -> Option<VaRange> {
        let after = self.by_address.partition_point(|symbol| symbol.at <= at);
        let start = self.by_address[..after].last()?.at;
        let end = self.by_address.get(after)?.at;
        Some(VaRange { start, end })
    }

    /// `name+0x12` for messages; none where no symbol is before.
    pub fn name(&self, at: LinkVa) -> Option<String> {
        let after = self.by_address.partition_point(|symbol| symbol.at <= at);
        let last = self.by_address[..after].last()?;
        // Of several names for one address the first one in the image's own order is as good as any.
        let first = self.at(last.at).next().unwrap_or(last);
        Some(format!("{}+{:#x}", first.name, at.0 - first.at.0))
    }
}

/// An address as in all output.
pub fn hex(at: LinkVa) -> String {
    format!("{:#x}", at.0)
}
