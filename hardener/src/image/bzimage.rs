//! The bzImage container (Linux Documentation/arch/x86/boot.rst: the real-mode setup header).

use super::Fault;
use super::read::Reader;

/// The packed kernel inside a bzImage.
pub fn payload(file: &[u8]) -> Result<&[u8], Fault> {
    let u16_at = |at| Reader::new(file, at).u16();
    let u32_at = |at| Reader::new(file, at).u32();
    if u16_at(0x1fe) != Some(0xaa55) || file.get(0x202..0x206) != Some(b"HdrS") {
        return Err(Fault::not_a_kernel(
            "offset 0x202",
            "there is no bzImage setup header and the file is not ELF",
        ));
    }
    let truncated = || Fault::damaged("setup header", "the file ends inside it");
    let version = u16_at(0x206).ok_or_else(truncated)?;
    // payload_offset and payload_length came with protocol 2.08.
    if version < 0x208 {
        return Err(Fault::unsupported(
            "setup header",
            format!(
                "boot protocol {version:#06x} is older than 2.08 (Linux 2.6.26) and does not say where the kernel is"
            ),
        ));
    }
    let sectors = match file[0x1f1] {
        0 => 4, // "for backwards compatibility"
        n => usize::from(n),
    };
    let base = (sectors + 1) * 512;
    let offset = u32_at(0x248).ok_or_else(truncated)? as usize;
    let length = u32_at(0x24c).ok_or_else(truncated)? as usize;
    let start = base + offset;
    start
        .checked_add(length)
        .and_then(|end| file.get(start..end))
        .filter(|payload| payload.len() > 8)
        .ok_or_else(|| {
            Fault::damaged(
                "payload",
                format!(
                    "the setup header puts {length} bytes at offset {start:#x}, the file has {} in all",
                    file.len()
                ),
            )
        })
}
