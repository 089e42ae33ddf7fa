//! The images that commands name.

use std::ffi::OsStr;

use nbd_jobs::image_location::ImageLocation;

use super::open::TrustArgs;
use crate::connect::ServerArgs;
use crate::error::CommandError;

/// Parses an argument; the options for servers must apply to it, or to servers that it may name.
pub(in crate::commands) fn parse_one(
    word: &OsStr,
    server: &ServerArgs,
    trust: &TrustArgs,
) -> Result<ImageLocation, CommandError> {
    let location = ImageLocation::parse(word)?;
    if !trust.trust_image {
        server.check(location.uri())?;
    }
    Ok(location)
}

/// Parses an argument of a command that opens no other files.
pub(super) fn parse_alone(
    word: &OsStr,
    server: &ServerArgs,
) -> Result<ImageLocation, CommandError> {
    let location = ImageLocation::parse(word)?;
    server.check(location.uri())?;
    Ok(location)
}

/// Parses two arguments; the options for servers must apply to one of them, or to servers that it
/// may name.
pub(super) fn parse_two(
    words: [&OsStr; 2],
    server: &ServerArgs,
    trust: &TrustArgs,
) -> Result<[ImageLocation; 2], CommandError> {
    let locations = [ImageLocation::parse(words[0])?, ImageLocation::parse(words[1])?];
    if !trust.trust_image {
        server.check(locations.iter().filter_map(ImageLocation::uri))?;
    }
    Ok(locations)
}

/// Parses arguments; the options for servers must apply to one of them, or to servers that it may
/// name.
#[cfg(feature = "mount")]
pub(in crate::commands) fn parse_all(
    words: &[&OsStr],
    server: &ServerArgs,
    trust: &TrustArgs,
) -> Result<Vec<ImageLocation>, CommandError> {
    let locations = words.iter().map(|word| ImageLocation::parse(word));
    let locations: Vec<_> = locations.collect::<Result<_, _>>()?;
    if !trust.trust_image {
        server.check(locations.iter().filter_map(ImageLocation::uri))?;
    }
    Ok(locations)
}
