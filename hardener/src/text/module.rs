//! A module's text: its slots, and how it may differ at run time. What reads a kernel's text reads a module's at its nominal
//! addresses; what came out is then told by what its fields point to, not by where that nominally is.

use super::model;
use super::self_checks::SelfChecks;
use super::slots::{self, Slots};
use super::sweep::{self, Sweep};
use super::{Functions, Regions, Span, TextError};
use crate::image::module::{ModuleImage, TEXT, nominal, target_address, text_offset};
use crate::image::{Fault, Tables};
use penumbra_bundle::{
    Form, FormReloc, LinkVa, Memory, ModuleReloc, Place, Site, Symbol, Target, TextOff, VaRange,
};

/// INT3 between sections, so that each is swept from its start.
const FILLER: u8 = 0xcc;

/// What is known about a module's text.
pub struct ModuleText {
    /// The module.
    pub module: ModuleImage,
    /// What passes may edit.
    pub slots: Slots,
    /// What the kernel itself may edit.
    pub sites: Vec<Site>,
    /// Relocated fields of the sites' forms.
    pub form_relocs: Vec<FormReloc>,
}

impl ModuleText {
    /// Analyses a module; `checks` and `inline_asm_plain` are the kernel's, see [`super::self_checks::find`] and
    /// [`slots::inline_asm_is_plain`].
    pub fn analyse(
        module: ModuleImage,
        checks: &SelfChecks,
        inline_asm_plain: bool,
    ) -> Result<ModuleText, TextError> {
        let image = &module.image;
        let range = VaRange {
            start: TEXT,
            end: LinkVa(TEXT.0 + u64::from(module.text_size)),
        };
        let span = Span { range, code: range };
        let tables = image.module_tables()?;
        let bytes = match module.text_size as usize {
            // Data for others, and nothing else.
            0 => Some(&[][..]),
            size => image.at(range.start, size),
        };
        let bytes = bytes.ok_or(TextError::Missing {
            what: "the module's text",
        })?;
        let bytes = bytes.to_vec();
        let mut swept = vec![FILLER; bytes.len()];
        for section in image.sections().iter().filter(|section| section.exec) {
            if let Some(start) = span.offset(section.range.start) {
                let start = start.0 as usize;
                let part = start..start + section.range.len() as usize;
                swept[part.clone()].copy_from_slice(&bytes[part]);
            }
        }
        let sweep = Sweep::run(&swept, span);
        if sweep.invalid > 0 {
            let what = format!("{} places are no instruction", sweep.invalid);
            return Err(Fault::damaged("text", what).into());
        }
        sweep::gate(&sweep, image, &tables, span)?;
        let regions = Regions::of_module(image, &tables, span);
        let functions = Functions::find(image, &tables, span, &sweep);
        let slots = slots::find(
            &bytes,
            span,
            image,
            &tables,
            &sweep,
            &regions,
            &functions,
            checks,
            inline_asm_plain,
        )?;
        let mut sites = model::build(image, &tables, span)?.sites;
        let form_relocs = form_relocs(&module, &tables, &mut sites)?;
        Ok(ModuleText {
            module,
            slots,
            sites,
            form_relocs,
        })
    }

    /// Names in the text.
    pub fn symbols(&self) -> Vec<Symbol> {
        let size = self.module.text_size;
        let symbols = self
            .module
            .image
            .symbols
            .iter()
            .filter(|symbol| symbol.is_code());
        let mut symbols: Vec<Symbol> = symbols
            .filter_map(|symbol| {
                Some(Symbol {
                    at: text_offset(symbol.va, size)?,
                    name: symbol.name.clone(),
                })
            })
            .collect();
        symbols.sort();
        symbols
    }
}

/// Takes the relocated fields out of the forms of sites, and says what each points to.
fn form_relocs(
    module: &ModuleImage,
    tables: &Tables,
    sites: &mut [Site],
) -> Result<Vec<FormReloc>, Fault> {
    let mut found = Vec::new();
    for (index, site) in sites.iter_mut().enumerate() {
        let start = site.at.0;
        let end = start + u32::from(site.len);
        // A form's field is the site's own or comes from a replacement.
        let mut candidates: Vec<ModuleReloc> = within(module, start, end).to_vec();
        for entry in &tables.alternatives {
            let offset = |va| text_offset(va, module.text_size);
            let inside = offset(entry.site).is_some_and(|at| (start..end).contains(&at.0));
            if let Some(from) = offset(entry.replacement).filter(|_| inside) {
                let to = from.0.saturating_add(u32::from(entry.replacement_len));
                candidates.extend(within(module, from.0, to));
            }
        }
        for (number, form) in site.forms.iter_mut().enumerate() {
            let Form::Exact { bytes, abs32, .. } = form else {
                continue;
            };
            for at in std::mem::take(abs32) {
                let place = TextOff(start + u32::from(at));
                let short = |reloc: &ModuleReloc| shortened(module, reloc, place, bytes, at);
                if candidates.iter().any(short) {
                    continue;
                }
                let field = &mut bytes[usize::from(at)..usize::from(at) + 4];
                let reloc = candidates
                    .iter()
                    .map(|reloc| ModuleReloc {
                        at: place,
                        ..*reloc
                    })
                    .find(|reloc| {
                        let value = nominal_value(module, reloc);
                        value.is_some_and(|value| value[..reloc.kind.width()] == *field)
                    })
                    .ok_or_else(|| {
                        let what = format!(
                            "a replacement for text offset {start:#x} refers to something in a way that cannot be followed"
                        );
                        Fault::unsupported(".altinstructions", what)
                    })?;
                field.fill(0);
                found.push(FormReloc {
                    site: index as u32,
                    form: number as u32,
                    reloc,
                });
            }
        }
    }
    Ok(found)
}

/// Whether a jump with this relocation became one of two bytes (`recompute_jump`): inside the module, so for ever the same.
fn shortened(
    module: &ModuleImage,
    reloc: &ModuleReloc,
    place: TextOff,
    bytes: &[u8],
    at: u8,
) -> bool {
    let Target::Own(Place {
        memory: Memory::Text,
        at: target,
    }) = module.targets[reloc.target as usize]
    else {
        return false;
    };
    // The field of `jmp rel32` begins with the second byte, as that of `jmp rel8` does; its end is 4 bytes later.
    let to = i64::from(target) + reloc.addend + 4;
    let displacement = i8::try_from(to - i64::from(place.0) - 1);
    let opcode = usize::from(at).checked_sub(1).map(|before| bytes[before]);
    opcode == Some(0xeb) && displacement.is_ok_and(|value| value as u8 == bytes[usize::from(at)])
}

fn within(module: &ModuleImage, start: u32, end: u32) -> &[ModuleReloc] {
    let relocs = &module.relocs;
    let from = relocs.partition_point(|reloc| reloc.at.0 < start);
    let to = relocs.partition_point(|reloc| reloc.at.0 < end);
    &relocs[from..to.max(from)]
}

/// What a field holds at nominal addresses. A field that refers to another module has no nominal value to go by.
fn nominal_value(module: &ModuleImage, reloc: &ModuleReloc) -> Option<[u8; 8]> {
    let target = &module.targets[reloc.target as usize];
    let known = !matches!(target, Target::Export(_));
    let field = nominal(Place::new(Memory::Text, reloc.at.0));
    let value = reloc
        .kind
        .value(target_address(target), reloc.addend, field.0);
    value.filter(|_| known)
}
