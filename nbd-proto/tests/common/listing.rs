//! Byte listings, and messages built by hand without the encoders under test.

/// Reads a listing: hexadecimal digits in any grouping, `'text'` for ASCII, `xN` behind a group to
/// repeat it, and `#` comments up to the end of the line.
pub fn bytes(listing: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in listing.lines() {
        let line = line.split('#').next().unwrap_or("");
        let mut rest = line.trim_start();
        while !rest.is_empty() {
            let group = if let Some(text) = rest.strip_prefix('\'') {
                let (text, behind) = text.split_once('\'').expect("a closing quote");
                rest = behind;
                text.as_bytes().to_vec()
            } else {
                let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                let (word, behind) = rest.split_at(end);
                rest = behind;
                let (digits, times) = word.split_once('x').unwrap_or((word, "1"));
                assert!(digits.len().is_multiple_of(2), "whole bytes: {word}");
                let group: Vec<u8> = (0..digits.len() / 2)
                    .map(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).expect("hex"))
                    .collect();
                group.repeat(times.parse().expect("a count"))
            };
            bytes.extend(group);
            rest = rest.trim_start();
        }
    }
    bytes
}

/// One option.
pub fn option(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// One option reply.
pub fn reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Takes replies to `option` apart into (reply type, payload); panics unless they are whole.
pub fn replies(option: u32, bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut replies = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
        assert_eq!(rest[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes(), "reply magic");
        assert_eq!(word(8), option, "the option a reply answers");
        let end = 20 + word(16) as usize;
        replies.push((word(12), rest[20..end].to_vec()));
        rest = &rest[end..];
    }
    replies
}

/// A string with its 32-bit length in front.
pub fn counted(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// The payload of INFO and GO.
pub fn info_payload(name: &[u8], requests: &[u16]) -> Vec<u8> {
    let mut payload = counted(name);
    payload.extend((requests.len() as u16).to_be_bytes());
    for request in requests {
        payload.extend(request.to_be_bytes());
    }
    payload
}

/// The payload of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_payload(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut payload = counted(name);
    payload.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        payload.extend(counted(query));
    }
    payload
}

/// A compact request header.
pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// An extended request header.
pub fn extended_request(
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u64,
) -> Vec<u8> {
    let mut bytes = 0x21e4_1c71_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// A simple reply without data.
pub fn simple_reply(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

/// A structured chunk.
pub fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// An extended chunk.
pub fn extended_chunk(flags: u16, kind: u16, cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x6e8a_278c_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend((payload.len() as u64).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The payload of OFFSET_DATA.
pub fn data(offset: u64, data: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), data].concat()
}

/// The payload of OFFSET_HOLE.
pub fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

/// The payload of a compact BLOCK_STATUS chunk.
pub fn status(context: u32, descriptors: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (length, flags) in descriptors {
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    payload
}

/// The payload of BLOCK_STATUS_EXT.
pub fn extended_status(context: u32, count: u32, descriptors: &[(u64, u64)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    payload.extend(count.to_be_bytes());
    for (length, flags) in descriptors {
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    payload
}
