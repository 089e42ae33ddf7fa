//! `qemu-img info`.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use imgfmt::{BackingFile, Format, FormatDetails, Passphrase};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::image_report::{DescribedImage, describe};
use nbd_jobs::qemu_name::FormatInName;
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::known::Opt;
use super::options::SECTOR;
use super::place::{Place, shown_name};
use super::refusal::Refusal;
use super::text::{human_size, json, properties, snapshots};
use crate::output::{Output, ReportFormat, printable};

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let format = arguments.output()?;
    let mut place =
        Place::to_describe(arguments, arguments.only_operand()?, Opt::Format, Opt::None)?;
    if !place.location.key_secrets().is_empty() {
        // Nothing is decrypted, so it stands for all secrets, also for those that are not given.
        place.options.passphrases.push(Passphrase::new(Vec::new()));
    }
    let is_chain = arguments.has(Opt::BackingChain);
    let mut images = match is_chain {
        true => place.layers()?,
        false => {
            let image = describe(place.location.clone(), &place.options, &place.remotes);
            vec![image.map_err(|error| place.failed(&error))?]
        }
    };
    for image in &mut images {
        look_into_extents(&place, image)?;
    }
    let mut output = Output::new();
    match format {
        ReportFormat::Json if is_chain => {
            json(&images.iter().map(report).collect::<Result<Vec<_>, _>>()?, &mut output)?;
        }
        ReportFormat::Json => {
            for image in &images {
                json(&report(image)?, &mut output)?;
            }
        }
        ReportFormat::Text => {
            for (index, image) in images.iter().enumerate() {
                if index > 0 {
                    output.line("")?;
                }
                text(image, &mut output)?;
            }
        }
    }
    output.finish()?;
    Ok(0)
}

/// Adds what only the extents of a VMDK tell. As in QEMU, one is not described if one of its
/// extents is missing or damaged.
fn look_into_extents(place: &Place, image: &mut DescribedImage) -> Result<(), Refusal> {
    if image.info.format != Format::Vmdk {
        return Ok(());
    }
    let options = place.options.clone().format(Format::Vmdk).backing(BackingFile::Ignored);
    let opened = image.location.open(&options, &place.remotes);
    let opened = opened.map_err(|error| place.failed(&error))?;
    let info = opened.info()?;
    (image.info.block_size, image.info.details) = (info.block_size, info.details);
    Ok(())
}

/// The report of an image, with the keys of qemu-img and no others.
fn report(image: &DescribedImage) -> Result<Value, Refusal> {
    if is_protocol_alone(image) {
        return Ok(file(image));
    }
    let report = serde_json::to_value(image.report());
    let mut report = report.map_err(|error| Refusal::new(error.to_string()))?;
    if let Value::Object(members) = &mut report {
        members.remove("backup");
        if image.info.format == Format::Raw && image.location.is_remote() {
            members.remove("dirty-flag");
        }
        let name = shown_name(&image.location);
        if let (true, Some(Value::String(full))) =
            (name != image.location.name(), members.get_mut("full-backing-filename"))
            && name.starts_with("./")
            && Path::new(full).is_relative()
        {
            // The directory is named, and so the files in it begin with it.
            full.insert_str(0, "./");
        }
        members.insert("filename".to_owned(), name.into());
        if let Some(FormatDetails::Vdi(_) | FormatDetails::Vpc(_) | FormatDetails::Vhdx(_)) =
            image.info.details
        {
            members.remove("format-specific");
        }
        if image.info.format == Format::Parallels {
            members.remove("cluster-size");
            members.remove("dirty-flag");
        }
        let extents = members
            .get_mut("format-specific")
            .and_then(|specific| specific.pointer_mut("/data/extents"))
            .and_then(Value::as_array_mut);
        let children = children(image, extents.into_iter().flatten());
        if children.len() > 1 {
            let sizes = children.iter().filter_map(|child| child["info"]["actual-size"].as_u64());
            members.insert("actual-size".to_owned(), sizes.sum::<u64>().into());
        }
        let bitmaps = members
            .get_mut("format-specific")
            .and_then(|specific| specific.pointer_mut("/data/bitmaps"))
            .and_then(Value::as_array_mut);
        for bitmap in bitmaps.into_iter().flatten().filter_map(Value::as_object_mut) {
            bitmap.remove("frozen");
        }
        let encryption = match image.info.qcow2 {
            None => "/data",
            Some(_) => "/data/encrypt",
        };
        let luks = members.get_mut("format-specific").and_then(|it| it.pointer_mut(encryption));
        if let Some(Value::Object(luks)) = luks {
            luks.remove("version");
        }
        let data = members.get_mut("format-specific").and_then(|it| it.get_mut("data"));
        if let Some(Value::Object(data)) = data
            && data.get("compat").is_some_and(|compat| compat == "0.10")
        {
            for feature_of_version_3 in ["lazy-refcounts", "corrupt", "extended-l2"] {
                data.remove(feature_of_version_3);
            }
        }
        members.insert("children".to_owned(), children.into());
    }
    Ok(report)
}

/// The reports of the files of an image, its own last; `extents` are those in its report.
fn children<'a>(
    image: &DescribedImage,
    extents: impl Iterator<Item = &'a mut Value>,
) -> Vec<Value> {
    let mut children = vec![json!({ "name": "file", "info": file(image) })];
    if let Some(FormatDetails::Vmdk(vmdk)) = &image.info.details {
        for (known, extent) in vmdk.extents.iter().zip(extents) {
            if known.file.is_none() {
                // QEMU does not say the type of one in the image's own file.
                extent["format"] = "".into();
                continue;
            }
            let name = format!("extents.{}", children.len() - 1);
            let info = file_of_extent(extent["filename"].as_str().unwrap_or_default());
            children.push(json!({ "name": name, "info": info }));
        }
    }
    children.reverse();
    children
}

/// The report of the file or export of an image.
fn file(image: &DescribedImage) -> Value {
    let protocol = protocol(image);
    let mut info = json!({
        "children": [],
        "virtual-size": length(image),
        "filename": shown_name(&image.location),
        "format": protocol,
    });
    if let Value::Object(members) = &mut info {
        if let Some(bytes) = image.actual_size {
            members.insert("actual-size".to_owned(), bytes.into());
        }
        if protocol == "file" {
            members.insert("format-specific".to_owned(), json!({ "type": "file", "data": {} }));
        }
        if !image.location.is_remote() {
            members.insert("dirty-flag".to_owned(), false.into());
        }
    }
    info
}

/// The report of a file with a part of the disk.
fn file_of_extent(name: &str) -> Value {
    let metadata = Path::new(name).metadata().ok();
    let length = metadata.as_ref().map_or(0, |metadata| metadata.len());
    json!({
        "children": [],
        "virtual-size": length.next_multiple_of(SECTOR),
        "filename": name,
        "format": "file",
        "actual-size": metadata.map(|metadata| metadata.blocks() * SECTOR),
        "format-specific": { "type": "file", "data": {} },
        "dirty-flag": false,
    })
}

/// Whether the options name the driver of a file or an export alone, without a format above it.
fn is_protocol_alone(image: &DescribedImage) -> bool {
    matches!(image.location, ImageLocation::Described { format: FormatInName::Bytes, .. })
}

fn protocol(image: &DescribedImage) -> &'static str {
    use std::os::unix::fs::FileTypeExt as _;
    match image.location.uri() {
        Some(_) => "nbd",
        None if image.location.is_remote() => "https",
        None => match image.location.path().metadata() {
            Ok(metadata) if metadata.file_type().is_block_device() => "host_device",
            _ => "file",
        },
    }
}

/// The length of the file or the export, in whole sectors.
fn length(image: &DescribedImage) -> u64 {
    let metadata = image.location.path().metadata();
    match protocol(image) {
        "file" => metadata.map_or(0, |metadata| metadata.len()).next_multiple_of(512),
        // The length of a device is not in its metadata, nor that of an export.
        _ => image.info.file_length.unwrap_or(image.info.size),
    }
}

fn text(image: &DescribedImage, output: &mut Output) -> Result<(), Refusal> {
    let report = report(image)?;
    let info = &image.info;
    let name = printable(&shown_name(&image.location));
    output.line(&format!("image: {name}"))?;
    output.line(&format!("file format: {}", report["format"].as_str().unwrap_or_default()))?;
    output.line(&format!("virtual size: {} ({} bytes)", human_size(info.size), info.size))?;
    let taken = |report: &Value| {
        let size = report["actual-size"].as_u64();
        format!("disk size: {}", size.map_or("unavailable".to_owned(), human_size))
    };
    output.line(&taken(&report))?;
    if info.encryption.is_some() {
        output.line("encrypted: yes")?;
    }
    if let Some(size) = report["cluster-size"].as_u64() {
        output.line(&format!("cluster_size: {size}"))?;
    }
    if report["dirty-flag"] == true {
        output.line("cleanly shut down: no")?;
    }
    if let Some(backing) = report["backing-filename"].as_str() {
        let full = report["full-backing-filename"].as_str();
        let place = full
            .filter(|full| *full != backing)
            .map_or_else(String::new, |full| format!(" (actual path: {})", printable(full)));
        output.line(&format!("backing file: {}{place}", printable(backing)))?;
    }
    if let Some(format) = report["backing-filename-format"].as_str() {
        output.line(&format!("backing file format: {}", printable(format)))?;
    }
    if let Some(qcow2) = info.qcow2.as_ref().filter(|qcow2| !qcow2.snapshots.is_empty()) {
        snapshots(&qcow2.snapshots, output)?;
    }
    let specific = &report["format-specific"]["data"];
    if specific.as_object().is_some_and(|members| !members.is_empty()) {
        output.line("Format specific information:")?;
        properties(specific, 4, output)?;
    }
    for child in report["children"].as_array().into_iter().flatten() {
        let (info, text) =
            (&child["info"], |value: &Value| printable(value.as_str().unwrap_or("")));
        output.line(&format!("Child node '/{}':", text(&child["name"])))?;
        output.line(&format!("    filename: {}", text(&info["filename"])))?;
        output.line(&format!("    protocol type: {}", text(&info["format"])))?;
        let length = info["virtual-size"].as_u64().unwrap_or(0);
        output.line(&format!("    file length: {} ({length} bytes)", human_size(length)))?;
        output.line(&format!("    {}", taken(info)))?;
    }
    Ok(())
}
