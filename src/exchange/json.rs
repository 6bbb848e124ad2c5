//! EC2's JSON layout: one member per line, two spaces, ` : ` between name and value, lists on one line, no final
//! newline. Scripts extract keys with `grep` and `cut`, and would break silently on a document of one line.

use std::io::{self, Write};

use bytes::Bytes;
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use zeroize::Zeroizing;

/// Renders in EC2's layout, into memory that is zeroed when the last reference is dropped.
///
/// # Errors
/// `serde_json::Error` if the document cannot be serialized.
pub fn ec2(document: &impl Serialize) -> Result<Bytes, serde_json::Error> {
    render_zeroizing(|out| document.serialize(&mut Serializer::with_formatter(out, Ec2Formatter)))
}

/// Renders on one line, into memory that is zeroed when the last reference is dropped.
pub(super) fn compact(document: &impl Serialize) -> Result<Bytes, serde_json::Error> {
    render_zeroizing(|out| serde_json::to_writer(out, document))
}

/// Measures first, then writes into a buffer of that size: growing a buffer would leave copies of secrets behind.
fn render_zeroizing(
    write: impl Fn(&mut dyn Write) -> Result<(), serde_json::Error>,
) -> Result<Bytes, serde_json::Error> {
    let mut counter = ByteCounter(0);
    write(&mut counter)?;
    let mut json = Zeroizing::new(Vec::with_capacity(counter.0));
    write(&mut *json)?;
    Ok(Bytes::from_owner(json))
}

struct ByteCounter(usize);

impl Write for ByteCounter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Formats flat objects; EC2 nests nothing here.
struct Ec2Formatter;

impl Formatter for Ec2Formatter {
    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"\n  " } else { b",\n  " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b" : ")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b"\n}")
    }

    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b"[ ")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b" ]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Sample {
        text: &'static str,
        nothing: Option<u8>,
        list: [&'static str; 2],
    }

    #[test]
    fn layout_matches_ec2_and_escapes_values() {
        let sample = Sample { text: "a\"b\\c\n", nothing: None, list: ["bp-1", "bp-2"] };
        let json = ec2(&sample).unwrap();
        let expected =
            "{\n  \"text\" : \"a\\\"b\\\\c\\n\",\n  \"nothing\" : null,\n  \"list\" : [ \"bp-1\", \"bp-2\" ]\n}";
        assert_eq!(json, expected.as_bytes());
        let read: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!((&read["text"], &read["list"][1]), (&"a\"b\\c\n".into(), &"bp-2".into()));
    }
}
