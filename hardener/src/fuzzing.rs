//! Readers that no public function reaches by themselves, for the fuzz targets (`hardener/fuzz`): the emitter's here, the
//! checker's in `check/fuzzing.rs`. Each says why it refuses its bytes.

pub use crate::check::fuzzing as check;

use crate::image::module::{Arrangement, Exports, Host, read};
use crate::image::{Btf, Fault, Image};
use crate::text::module::ModuleText;
use crate::text::self_checks::SelfChecks;
use crate::text::{Text, TextError};
use crate::types::btf::Btf as Types;
use std::sync::Arc;

/// A kernel as it is unpacked: headers, relocations, symbols, types, tables.
pub fn kernel(file: &[u8]) -> Result<(), Fault> {
    let image = Image::parse(file.to_vec())?;
    let tables = image.tables()?;
    image.banner()?;
    image.exports()?;
    // The seeds have no bytes of text.
    let _ = Text::analyse(&image, &tables);
    Ok(())
}

/// `.rodata` with the tables of kallsyms.
pub fn kallsyms(rodata: &[u8]) -> Result<(), Fault> {
    crate::image::kallsyms::read(rodata).map(drop)
}

/// A `System.map`.
pub fn system_map(file: &[u8]) -> Result<(), Fault> {
    let symbols = crate::image::system_map::read(file)?;
    crate::image::system_map::agrees(&symbols, &symbols)
}

/// A `.BTF` section: layouts.
pub fn btf(section: &[u8]) -> Result<(), Fault> {
    let btf = Btf::parse(section)?;
    let _ = (btf.size_of("page"), btf.is_function("vfs_read"));
    let _ = (btf.member("page", "none"), Arrangement::of(&btf));
    Ok(())
}

/// A `.BTF` section: all types.
pub fn types(section: &[u8]) -> Result<(), Fault> {
    let btf = Types::parse(section)?;
    for id in btf.ids() {
        let _ = (btf.size(id), btf.members_of(id).len(), btf.prototype(id));
        let _ = (btf.name(id).len(), btf.pointer_to(btf.plain(id)));
    }
    Ok(())
}

/// An unpacked module, for a kernel with these types.
pub fn module(types: &[u8], file: &[u8]) -> Result<(), TextError> {
    let btf = Arc::new(Btf::parse(types)?);
    let host = Host {
        exports: &Exports::new(),
        arrangement: Arrangement::of(&btf)?,
        btf: &btf,
        // What slots of a module are told by.
        thunks: &[("__x86_return_thunk".to_owned(), check::TEXT)],
    };
    ModuleText::analyse(read(file, &host)?, &SelfChecks::new(), true).map(drop)
}
