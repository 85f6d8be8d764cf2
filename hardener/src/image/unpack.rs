//! The payload of a bzImage: one compressed stream, then the unpacked size (scripts/Makefile.lib, `size_append`).

use super::{Fault, read::Reader};
use std::io::Read;

/// The largest kernel that is unpacked; Debian's is 66 MB.
const MAX_KERNEL: usize = 256 << 20;
/// The largest module that is unpacked; Debian's largest has 7 MB.
const MAX_MODULE: usize = 128 << 20;
/// The blocks of a legacy LZ4 frame unpack to at most this (lz4_Frame_format.md, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;
/// `xz` in the kernel's build uses a dictionary of 32 MiB (scripts/xz_wrap.sh); more is refused.
const XZ_MEMORY_KIB: u32 = 128 << 10;
/// `zstd -22 --ultra` has a window of 128 MiB.
const ZSTD_WINDOW: u64 = 128 << 20;

/// Unpacks `payload`; also the name of its format.
pub fn unpack(payload: &[u8]) -> Result<(Vec<u8>, &'static str), Fault> {
    let format = match payload {
        [0x7f, b'E', b'L', b'F', ..] => return Ok((payload.to_vec(), "none")),
        [0x1f, 0x8b, ..] => "gzip",
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "xz",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [b'B', b'Z', b'h', ..] => return Err(foreign("bzip2")),
        [0x5d, 0, 0, ..] => return Err(foreign("lzma")),
        [0x89, b'L', b'Z', b'O', ..] => return Err(foreign("lzo")),
        _ => {
            return Err(Fault::damaged(
                "payload",
                format!(
                    "starts with {:02x?}, which no known compression does",
                    &payload[..payload.len().min(6)]
                ),
            ));
        }
    };
    let size = payload
        .len()
        .checked_sub(4)
        .and_then(|at| Reader::new(payload, at).u32())
        .unwrap_or(0) as usize;
    if size == 0 || size > MAX_KERNEL {
        return Err(Fault::damaged(
            "payload",
            format!("claims to unpack to {size} bytes, more than {MAX_KERNEL} or none"),
        ));
    }
    let broken = |error: &dyn std::fmt::Display| {
        Fault::damaged(
            "payload",
            format!("{format} stream does not unpack: {error}"),
        )
    };
    let bytes = match format {
        "lz4" => lz4_legacy(&payload[..payload.len() - 4], size).map_err(|error| broken(&error))?,
        "gzip" => {
            read_all(flate2::read::GzDecoder::new(payload), size).map_err(|error| broken(&error))?
        }
        "xz" => {
            let stream = lzma_rust2::XzReader::new_mem_limit(payload, false, XZ_MEMORY_KIB);
            read_all(stream, size).map_err(|error| broken(&error))?
        }
        _ => {
            let stream =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(payload, ZSTD_WINDOW)
                    .map_err(|error| broken(&error))?;
            read_all(stream, size).map_err(|error| broken(&error))?
        }
    };
    if bytes.len() != size {
        return Err(Fault::damaged(
            "payload",
            format!(
                "unpacks to {}{} bytes, its end says {size}",
                if bytes.len() > size { "more than " } else { "" },
                bytes.len().min(size)
            ),
        ));
    }
    Ok((bytes, format))
}

/// Unpacks a module, which carries no size.
pub fn module(file: Vec<u8>) -> Result<Vec<u8>, Fault> {
    let broken = |error: std::io::Error| {
        Fault::damaged("module", format!("the stream does not unpack: {error}"))
    };
    let bytes = match &file[..] {
        [0x7f, b'E', b'L', b'F', ..] => return Ok(file),
        [0x1f, 0x8b, ..] => read_all(flate2::read::GzDecoder::new(&file[..]), MAX_MODULE),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = lzma_rust2::XzReader::new_mem_limit(&file[..], false, XZ_MEMORY_KIB);
            read_all(stream, MAX_MODULE)
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let stream = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(
                &file[..],
                ZSTD_WINDOW,
            );
            let stream =
                stream.map_err(|error| broken(std::io::Error::other(error.to_string())))?;
            read_all(stream, MAX_MODULE)
        }
        _ => {
            let what = "is neither ELF nor packed by gzip, xz or zstd; give a .ko file";
            return Err(Fault::not_a_kernel("module", what));
        }
    };
    let bytes = bytes.map_err(broken)?;
    if bytes.len() > MAX_MODULE {
        let what = format!("unpacks to more than {MAX_MODULE} bytes");
        return Err(Fault::damaged("module", what));
    }
    Ok(bytes)
}

fn foreign(format: &str) -> Fault {
    Fault::unsupported(
        "payload",
        format!(
            "is packed with {format}; Penumbra reads gzip, xz, lz4 and zstd. Unpack it with the kernel's scripts/extract-vmlinux"
        ),
    )
}

/// Reads at most one byte more than `size`, so that a stream that lies about its size is noticed and not followed.
fn read_all(stream: impl Read, size: usize) -> std::io::Result<Vec<u8>> {
    // What a module's stream claims nobody knows, so memory is not asked for beforehand there.
    let expected = if size == MAX_MODULE { 0 } else { size + 1 };
    let mut bytes = Vec::with_capacity(expected);
    stream.take(size as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn lz4_legacy(stream: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let mut out = vec![0; size];
    let (mut filled, mut reader) = (0, Reader::new(stream, 4));
    while reader.position() < stream.len() {
        let at = reader.position();
        let block = reader
            .u32()
            .and_then(|len| reader.take(len as usize))
            .ok_or_else(|| format!("the block at {at:#x} leaves the stream"))?;
        let room = filled..size.min(filled + LZ4_BLOCK);
        filled += lz4_flex::block::decompress_into(block, &mut out[room])
            .map_err(|error| format!("the block at {at:#x}: {error}"))?;
    }
    out.truncate(filled);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::unpack;
    use std::io::Write;

    fn kernel() -> Vec<u8> {
        (0..200_000u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect()
    }

    fn with_size(mut stream: Vec<u8>) -> Vec<u8> {
        stream.extend((kernel().len() as u32).to_le_bytes());
        stream
    }

    fn gzip() -> Vec<u8> {
        // gzip ends with the size by itself (RFC 1952, ISIZE).
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        packer.write_all(&kernel()).unwrap();
        packer.finish().unwrap()
    }

    fn lz4() -> Vec<u8> {
        let mut stream = vec![0x02, 0x21, 0x4c, 0x18];
        let block = lz4_flex::block::compress(&kernel());
        stream.extend((block.len() as u32).to_le_bytes());
        stream.extend(block);
        with_size(stream)
    }

    fn zstd() -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        with_size(ruzstd::encoding::compress_to_vec(
            kernel().as_slice(),
            level,
        ))
    }

    #[test]
    fn each_format_unpacks() {
        for (packed, name) in [(gzip(), "gzip"), (lz4(), "lz4"), (zstd(), "zstd")] {
            let (bytes, format) = unpack(&packed).unwrap();
            assert!(format == name && bytes == kernel(), "{name}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        for packed in [gzip(), lz4(), zstd()] {
            for end in (6..packed.len() - 1).step_by(packed.len() / 40) {
                assert!(
                    unpack(&packed[..end]).is_err(),
                    "{:02x?} cut at {end}",
                    &packed[..4]
                );
            }
        }
    }

    #[test]
    fn a_stream_longer_than_it_says_is_refused_without_unpacking_it_all() {
        for mut packed in [gzip(), lz4(), zstd()] {
            let at = packed.len() - 4;
            packed[at..].copy_from_slice(&5000u32.to_le_bytes());
            assert!(unpack(&packed).is_err(), "{:02x?}", &packed[..4]);
        }
    }
}
