//! Compressed clusters, in both kinds of compression.
//!
//! The output is exactly one cluster. A stream that yields less is damaged, and one that could
//! yield more is cut off, because the last sector may contain garbage.

use std::io::Read;

use crate::qcow2::on_disk::header::Compression;

/// Decompresses one cluster into `cluster`; the error describes the damage.
pub(crate) fn decompress(
    compression: Compression,
    input: &[u8],
    cluster: &mut [u8],
) -> Result<(), &'static str> {
    match compression {
        Compression::Zlib => inflate(input, cluster),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(input)
                .map_err(|_| "a zstd decoder cannot be set up")?;
            decoder.read_exact(cluster).map_err(|_| "a zstd-compressed cluster is damaged")
        }
    }
}

fn inflate(input: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    // A raw deflate stream: QEMU writes neither header nor checksum.
    let mut inflater = flate2::Decompress::new(false);
    let mut position = 0;
    loop {
        let produced = inflater.total_out() as usize;
        if produced == cluster.len() {
            return Ok(());
        }
        let status = inflater.decompress(
            &input[position..],
            &mut cluster[produced..],
            flate2::FlushDecompress::None,
        );
        let progress =
            inflater.total_in() as usize > position || inflater.total_out() as usize > produced;
        position = inflater.total_in() as usize;
        let is_full = inflater.total_out() as usize == cluster.len();
        match status {
            _ if is_full => return Ok(()),
            Ok(flate2::Status::Ok | flate2::Status::BufError) if progress => {}
            _ => return Err("a zlib-compressed cluster is damaged"),
        }
    }
}

/// Compresses one cluster; `None` if that saves nothing.
pub(crate) fn compress(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let limit = cluster.len().saturating_sub(512);
    let output = match compression {
        Compression::Zlib => {
            // Other readers may decompress with the 4 KiB window that QEMU's writer uses.
            let level = flate2::Compression::default();
            let mut deflater = flate2::Compress::new_with_window_bits(level, false, 12);
            let mut output = vec![0; limit];
            let status =
                deflater.compress(cluster, &mut output, flate2::FlushCompress::Finish).ok()?;
            if status != flate2::Status::StreamEnd {
                return None;
            }
            output.truncate(deflater.total_out() as usize);
            output
        }
        Compression::Zstd => zstd::bulk::compress(cluster, 0).ok()?,
    };
    (output.len() <= limit).then_some(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    #[test]
    fn what_was_compressed_comes_back_despite_garbage_behind_it() {
        let cluster: Vec<u8> = (0..65536u32).map(|i| (i / 97) as u8).collect();
        for compression in BOTH {
            let mut packed = compress(compression, &cluster).unwrap();
            packed.extend([0xff; 300]);
            let mut unpacked = vec![0; 65536];
            decompress(compression, &packed, &mut unpacked).unwrap();
            assert!(unpacked == cluster, "{compression:?}");
        }
    }

    #[test]
    fn damaged_and_short_streams_are_errors() {
        for compression in BOTH {
            let packed = compress(compression, &[7; 4096]).unwrap();
            let mut larger = vec![0; 8192];
            assert!(decompress(compression, &packed, &mut larger).is_err());
            assert!(decompress(compression, &packed[..4], &mut larger).is_err());
            assert!(decompress(compression, &[0xff; 600], &mut larger).is_err());
            assert!(decompress(compression, &[], &mut larger).is_err());
        }
    }

    #[test]
    fn noise_is_not_compressed() {
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(4096)
        .collect();
        assert!(BOTH.iter().all(|compression| compress(*compression, &noise).is_none()));
    }
}
