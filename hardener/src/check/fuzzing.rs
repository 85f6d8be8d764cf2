//! The checker's readers, for the fuzz targets (`hardener/fuzz`). Each says why it refuses its bytes.

use super::image::own_build_id;
use super::kernel::btf::Btf;
use super::kernel::{Kernel, KernelError, kallsyms, system_map};
use super::module::{elsewhere, exports, load, places, tables};
use penumbra_bundle::LinkVa;

/// Where the seeds' kernel has its text.
pub const TEXT: LinkVa = LinkVa(0xffff_ffff_8100_0000);

/// A kernel as it is unpacked: headers, relocations, symbols, types, tables.
pub fn kernel(file: &[u8]) -> Result<(), KernelError> {
    let kernel = Kernel::read(file.to_vec(), None)?;
    let _ = (own_build_id(&kernel), kernel.thunk_text());
    exports::read(&kernel, &Btf::read(&kernel.vmlinux)?).map(drop)
}

/// `.rodata` with the tables of kallsyms.
pub fn kallsyms(rodata: &[u8]) -> Result<(), KernelError> {
    kallsyms::decode(rodata, TEXT).map(drop)
}

/// A `System.map`.
pub fn system_map(file: &[u8]) -> Result<(), KernelError> {
    let symbols = system_map::read(file)?;
    system_map::compare(&symbols, &symbols)
}

/// A `.BTF` section.
pub fn btf(section: &[u8]) -> Result<(), KernelError> {
    let btf = Btf::parse(section).ok_or(KernelError::Btf)?;
    let _ = (btf.size("page"), btf.offset("page", "none"));
    let _ = btf.enumerator("mod_mem_type", "MOD_TEXT");
    assert!(btf.functions().count() >= btf.least_arities().len());
    Ok(())
}

/// An unpacked module, for a kernel with these types, loaded at two places.
pub fn module(types: &[u8], file: &[u8]) -> Result<(), String> {
    let btf = Btf::parse(types).ok_or("no types")?;
    let layouts = tables::Layouts::read(&btf).map_err(|error| error.to_string())?;
    let none = exports::Exports::new();
    let places = places();
    let at = |place| load::load(file, &none, &layouts.module, place, &elsewhere);
    at(&places[1])?;
    tables::ModuleTables::read(&at(&places[0])?, &layouts, &places[0]).map(drop)
}
