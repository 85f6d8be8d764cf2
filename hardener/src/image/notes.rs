//! ELF notes (System V gABI, chapter 5): the build-id.

use super::Fault;
use super::read::Reader;

const NT_GNU_BUILD_ID: u32 = 3;
/// What the notes say about the build.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BuildId {
    /// The GNU build-id, in hexadecimal.
    pub hex: String,
}

/// Reads the notes in `section`.
pub fn build_id(section: &[u8]) -> Result<BuildId, Fault> {
    let mut found = BuildId::default();
    let mut reader = Reader::new(section, 0);
    while let (Some(name_len), Some(desc_len), Some(kind)) =
        (reader.u32(), reader.u32(), reader.u32())
    {
        let at = reader.position();
        let (Some(name), Some(desc)) =
            (padded(&mut reader, name_len), padded(&mut reader, desc_len))
        else {
            return Err(Fault::damaged(
                ".notes",
                format!("the note at {at:#x} leaves the section"),
            ));
        };
        if name == b"GNU\0" && kind == NT_GNU_BUILD_ID && (16..=64).contains(&desc.len()) {
            found.hex = desc.iter().map(|byte| format!("{byte:02x}")).collect();
        }
    }
    if found.hex.is_empty() {
        return Err(Fault::unsupported(
            ".notes",
            "there is no GNU build-id, so a running kernel cannot be recognised as this one",
        ));
    }
    Ok(found)
}

/// The next `len` bytes; the padding to four that follows is skipped.
fn padded<'a>(reader: &mut Reader<'a>, len: u32) -> Option<&'a [u8]> {
    let bytes = reader.take(len as usize)?;
    // The last note of a section may lack its padding.
    let _ = reader.take((4 - len as usize % 4) % 4);
    Some(bytes)
}
