//! A real bundle, and hands to break it with.

use goblin::elf::Elf;
use hardener::check::{Checker, Rule, RuleReport};
use hardener::recipe::Recipe;
use iced_x86::{Decoder, DecoderOptions, Instruction};
use penumbra_bundle::{
    Bundle, Edit, LinkVa, PassSummary, SiteKind, SlotKind, TextOff, Trap, VaRange,
};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Debian's current cloud kernel.
pub fn vmlinuz() -> PathBuf {
    crate::common::cloud().to_owned()
}

/// Some modules of a kernel: a large one, one with all kinds of poke site, a small one.
pub fn modules(folder: &Path) -> Vec<PathBuf> {
    ["xfs", "kvm", "af_key"]
        .map(|name| crate::common::module(folder, name))
        .to_vec()
}

/// The image, read by the checker, and the bundle that the emitter makes of it; both once for all tests.
pub fn real() -> &'static (Checker, Bundle) {
    static REAL: OnceLock<(Checker, Bundle)> = OnceLock::new();
    REAL.get_or_init(|| made(&vmlinuz(), crate::common::modules()))
}

/// The same of the next release's kernel, which keeps code and data of modules apart.
pub fn next() -> &'static (Checker, Bundle) {
    static NEXT: OnceLock<(Checker, Bundle)> = OnceLock::new();
    NEXT.get_or_init(|| {
        made(
            crate::common::cloud_backports(),
            crate::common::modules_backports(),
        )
    })
}

fn made(vmlinuz: &Path, folder: &Path) -> (Checker, Bundle) {
    let modules = modules(folder);
    let recipe = Recipe::default();
    let emitted = hardener::emit::emit_with(vmlinuz, &recipe, &modules, &mut |_| {}).unwrap();
    let checker = Checker::open(vmlinuz).unwrap().with_modules(&modules);
    (checker.unwrap(), emitted.bundle)
}

/// The same image by a recipe in which returns are logged and calls panic.
pub fn logging() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted(LOGGING))
}

const LOGGING: &str = "schema = 1\n[pass.return-cfi]\non-violation = \"log\"\n[pass.forward-cfi]\non-violation = \"panic\"\n";

/// The image's bundle by a recipe.
pub fn emitted(recipe: &str) -> Bundle {
    let recipe = Recipe::parse("recipe", recipe.as_bytes()).unwrap();
    hardener::emit::emit(&vmlinuz(), &recipe, &mut |_| {}).unwrap()
}

/// What one rule says of `bundle`.
pub fn report(bundle: &Bundle, rule: Rule) -> RuleReport {
    let (checker, _) = real();
    let mut rules = checker.prove(bundle, &[rule]).unwrap();
    rules.pop().expect("one rule was asked for")
}

/// Whether something that is said about `at`, or about any place, has `wanted` in it.
pub fn says(report: &RuleReport, at: Option<LinkVa>, wanted: &str) -> bool {
    let mut violations = report.violations.iter();
    violations.any(|violation| {
        violation.what.contains(wanted) && (at.is_none() || violation.address == at)
    })
}

/// A copy of a real bundle, to be broken.
pub struct Scene {
    pub bundle: Bundle,
}

impl Scene {
    pub fn new() -> Scene {
        Scene::of(&real().1)
    }

    pub fn of(bundle: &Bundle) -> Scene {
        Scene {
            bundle: bundle.clone(),
        }
    }

    /// The trap of the thunk called `name`.
    pub fn trap(&mut self, name: &str) -> &mut Trap {
        let thunk = self.named(name);
        let traps = &mut self.bundle.manifest.cave.traps;
        let trap = traps.iter_mut().find(|trap| trap.at >= thunk);
        trap.expect("a trap")
    }

    pub fn va(&self, at: TextOff) -> LinkVa {
        LinkVa(self.bundle.manifest.text.start.0 + u64::from(at.0))
    }

    pub fn off(&self, va: LinkVa) -> TextOff {
        TextOff((va.0 - self.bundle.manifest.text.start.0) as u32)
    }

    /// The edits of a variant.
    pub fn edits(&mut self, variant: &str) -> &mut Vec<Edit> {
        let variants = &self.bundle.manifest.variants;
        let index = variants.iter().position(|known| known.name == variant);
        &mut self.bundle.edits[index.expect("a variant's name")].0
    }

    /// Changes what the manifest says of a pass.
    pub fn pass<T>(
        &mut self,
        variant: &str,
        pass: &str,
        change: impl FnOnce(&mut PassSummary) -> T,
    ) {
        let mut variants = self.bundle.manifest.variants.iter_mut();
        let variant = variants.find(|known| known.name == variant);
        let mut passes = variant.expect("a variant's name").passes.iter_mut();
        let found = passes.find(|known| known.name == pass);
        change(found.expect("a pass of it"));
    }

    /// An edit of a variant: one from the middle for which `which` holds, changed by `change`; its place before.
    pub fn change(
        &mut self,
        variant: &str,
        which: impl Fn(&Edit) -> bool,
        change: impl FnOnce(&mut Edit),
    ) -> LinkVa {
        let edits = self.edits(variant);
        let middle = edits.len() / 2;
        let edit = edits[middle..].iter_mut().find(|edit| which(edit));
        let edit = edit.expect("the variant has such an edit");
        let at = edit.at;
        change(edit);
        self.va(at)
    }

    /// Adds an edit that jumps where the variant's other return edits jump.
    pub fn add(&mut self, at: LinkVa, slot: SlotKind) -> LinkVa {
        let thunk = self.thunk(|edit| edit.slot == SlotKind::Return);
        let edit = Edit {
            at: self.off(at),
            slot,
            bytes: branch(&[0xe9], at, thunk),
        };
        let edits = self.edits("hardened");
        let index = edits.partition_point(|other| other.at < edit.at);
        edits.insert(index, edit);
        at
    }

    /// The thunk that an edit of `hardened` branches to.
    pub fn thunk(&mut self, which: impl Fn(&Edit) -> bool) -> LinkVa {
        let start = self.bundle.manifest.text.start.0;
        let edits = self.edits("hardened");
        let edit = edits.iter().find(|edit| which(edit)).expect("such an edit");
        let at = start + u64::from(edit.at.0);
        target(&edit.bytes, at)
    }

    /// The thunk of that name.
    pub fn named(&self, name: &str) -> LinkVa {
        let elf = Elf::parse(&self.bundle.cave).unwrap();
        let symbol = elf
            .syms
            .iter()
            .find(|symbol| elf.strtab.get_at(symbol.st_name) == Some(name));
        LinkVa(symbol.expect("a thunk of that name").st_value)
    }

    /// Overwrites the first instruction at or after `thunk` for which `with` has other bytes; where that is.
    pub fn patch(
        &mut self,
        thunk: LinkVa,
        with: impl Fn(&Instruction, &[u8]) -> Option<Vec<u8>>,
    ) -> LinkVa {
        let code = self.cave(thunk, 512).to_vec();
        for instruction in &mut Decoder::with_ip(64, &code, thunk.0, DecoderOptions::NONE) {
            let at = (instruction.ip() - thunk.0) as usize;
            let bytes = &code[at..at + instruction.len()];
            if let Some(new) = with(&instruction, bytes) {
                assert_eq!(new.len(), bytes.len(), "{instruction:?}");
                let at = LinkVa(instruction.ip());
                self.cave(at, new.len()).copy_from_slice(&new);
                return at;
            }
        }
        panic!("no such instruction at {thunk}");
    }

    /// The instruction at `at` in the cave.
    pub fn instruction(&mut self, at: LinkVa) -> Instruction {
        let code = self.cave(at, 15).to_vec();
        Decoder::with_ip(64, &code, at.0, DecoderOptions::NONE).decode()
    }

    /// Bytes of `cave.elf` by address.
    pub fn cave(&mut self, at: LinkVa, len: usize) -> &mut [u8] {
        let elf = Elf::parse(&self.bundle.cave).unwrap();
        let section = elf.section_headers.iter().find(|section| {
            section.sh_flags & 2 != 0
                && (section.sh_addr..section.sh_addr + section.sh_size).contains(&at.0)
        });
        let section = section.expect("an address in a section");
        let offset = (section.sh_offset + at.0 - section.sh_addr) as usize;
        let len = len.min((section.sh_addr + section.sh_size - at.0) as usize);
        &mut self.bundle.cave[offset..offset + len]
    }

    /// Where a symbol of the text lies.
    pub fn symbol(&self, name: &str) -> LinkVa {
        let symbol = self
            .bundle
            .symbols
            .0
            .iter()
            .find(|symbol| symbol.name == name);
        self.va(symbol.expect("a symbol of the text").at)
    }

    /// Takes the edit of a function's first checked return out of `hardened`; where it was.
    pub fn leave_return(&mut self, function: &str) -> LinkVa {
        let from = self.off(self.symbol(function));
        let edits = self.edits("hardened");
        let mut places = edits.iter();
        let index = places.position(|edit| edit.at >= from && edit.slot == SlotKind::Return);
        let removed = edits.remove(index.expect("a checked return"));
        self.va(removed.at)
    }

    /// The first poke site of a kind and length in `range`.
    pub fn site(&self, kind: SiteKind, len: u8, range: VaRange) -> LinkVa {
        let site =
            self.bundle.model.sites.iter().find(|site| {
                site.kind == kind && site.len == len && range.contains(self.va(site.at))
            });
        self.va(site.expect("such a site").at)
    }

    /// From one symbol of the text to another.
    pub fn between(&self, start: &str, end: &str) -> VaRange {
        VaRange {
            start: self.symbol(start),
            end: self.symbol(end),
        }
    }

    /// All of the text.
    pub fn text(&self) -> VaRange {
        self.bundle.manifest.text.range()
    }
}

/// Where the branch in `bytes` at `at` goes.
pub fn target(bytes: &[u8], at: u64) -> LinkVa {
    LinkVa(
        Decoder::with_ip(64, bytes, at, 0)
            .decode()
            .near_branch_target(),
    )
}

/// `prefix rel32` at `at`, to `to`.
pub fn branch(prefix: &[u8], at: LinkVa, to: LinkVa) -> Vec<u8> {
    let next = at.0 + prefix.len() as u64 + 4;
    let displacement = i32::try_from(to.0 as i64 - next as i64).unwrap();
    [prefix, &displacement.to_le_bytes()].concat()
}
