//! Rules of this repository that neither rustfmt nor clippy has, checked on the text of `src`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A search for a type's name finds that type alone.
#[test]
fn every_type_has_a_name_of_its_own() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, text) in sources() {
        for (index, line) in text.lines().enumerate() {
            if let Some(name) = defined_type(line) {
                let place = format!("{}:{}", path.display(), index + 1);
                places.entry(name.to_owned()).or_default().push(place);
            }
        }
    }
    assert!(places.len() > 500, "only {} types were found", places.len());
    let faults: Vec<String> = places
        .iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(name, places)| format!("{name}: {}", places.join(", ")))
        .collect();
    assert!(
        faults.is_empty(),
        "these names stand for more than one type; rename all but one of each:\n{}",
        faults.join("\n")
    );
}

/// A condition is an `if`.
#[test]
fn no_match_is_on_a_bool() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        for (index, line) in text.lines().enumerate() {
            if is_bool_arm(line) {
                faults.push(format!("{}:{}: {line}", path.display(), index + 1));
            }
        }
    }
    assert!(
        faults.is_empty(),
        "write these `match` on a bool as `if`:\n{}",
        faults.join("\n")
    );
}

/// The name that a line defines as a type. Indented aliases are associated types: their traits
/// name them.
fn defined_type(line: &str) -> Option<&str> {
    let indented = line.starts_with(' ');
    let line = without_visibility(line.trim_start());
    let (keyword, rest) = line.split_once(' ')?;
    let defines = match keyword {
        "struct" | "enum" | "trait" | "union" => true,
        "type" => !indented,
        _ => false,
    };
    if !defines {
        return None;
    }
    let end = rest
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(rest.len());
    Some(&rest[..end]).filter(|name| name.starts_with(char::is_uppercase))
}

fn without_visibility(line: &str) -> &str {
    let Some(rest) = line.strip_prefix("pub") else {
        return line;
    };
    if let Some(rest) = rest.strip_prefix('(') {
        rest.split_once(") ").map_or(line, |(_, rest)| rest)
    } else {
        rest.strip_prefix(' ').unwrap_or(line)
    }
}

fn is_bool_arm(line: &str) -> bool {
    let line = line.trim_start();
    ["true", "false"].iter().any(|value| {
        line.strip_prefix(value)
            .is_some_and(|rest| rest.starts_with(" =>") || rest.starts_with(" if "))
    })
}

/// The sources of the crate with their paths, in order.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    collect(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut found,
    );
    assert!(found.len() > 100, "only {} sources were found", found.len());
    found.sort();
    found
}

fn collect(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
}

#[test]
fn the_rules_see_what_they_forbid() {
    assert_eq!(defined_type("pub(super) struct Track {"), Some("Track"));
    assert_eq!(defined_type("    enum Track<'a> {"), Some("Track"));
    assert_eq!(defined_type("pub trait Track: Sized {"), Some("Track"));
    assert_eq!(defined_type("type Track = u8;"), Some("Track"));
    assert_eq!(defined_type("    type Track = u8;"), None);
    assert_eq!(defined_type("// struct Track"), None);
    assert!(is_bool_arm("        true => 1,"));
    assert!(is_bool_arm("        false if late => 1,"));
    assert!(!is_bool_arm("        Some(true) => 1,"));
}
