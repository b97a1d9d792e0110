//! Rules of this repository that neither rustfmt nor clippy checks, applied to the text of `src`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Type names are unique, so that a search for a name finds only that type.
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

/// Conditions are written with `if`.
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

/// Functions fit a screen.
#[test]
fn no_function_is_longer_than_60_lines() {
    const LINES_MAX: usize = 60;
    let mut faults = Vec::new();
    let mut count = 0;
    for (path, text) in sources_without_tests() {
        for function in functions(&text) {
            count += 1;
            if function.lines > LINES_MAX {
                let (name, lines) = (function.name, function.lines);
                faults.push(format!(
                    "{path}: {name} has {lines} lines: give parts of it names"
                ));
            }
        }
    }
    assert!(count > 3_000, "only {count} functions were found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Comments have the same width as code.
#[test]
fn no_comment_is_wider_than_100() {
    let mut faults = Vec::new();
    for (path, text) in sources() {
        let wide = |line: &&str| line.trim_start().starts_with("//") && line.chars().count() > 100;
        for line in text.lines().filter(wide) {
            faults.push(format!("{}: {}", path.display(), line.trim()));
        }
    }
    assert!(
        faults.is_empty(),
        "wrap these comments:\n{}",
        faults.join("\n")
    );
}

/// Errors are typed up to the edge of the program, because a `String` tells the caller nothing.
#[test]
fn no_error_is_a_string() {
    let mut faults = Vec::new();
    for (path, text) in sources_without_tests() {
        for line in text.lines().filter(|line| has_string_for_error(line)) {
            faults.push(format!("{path}: {}", line.trim()));
        }
    }
    assert!(
        faults.is_empty(),
        "give each of these errors a type:\n{}",
        faults.join("\n")
    );
}

/// Returns the name that a line defines as a type. Indented aliases are associated types, which are
/// named by their traits.
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

/// A function with a body.
struct FoundFunction {
    name: String,
    /// Number of lines from its signature to its closing brace.
    lines: usize,
}

/// Returns the functions of a formatted source, nested ones included.
fn functions(text: &str) -> Vec<FoundFunction> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(name) = defined_function(line) else {
            continue;
        };
        let lines = item_lines(&lines[start..]);
        if lines.last().is_some_and(|last| last.ends_with('}')) {
            found.push(FoundFunction {
                name: name.to_owned(),
                lines: lines.len(),
            });
        }
    }
    found
}

fn defined_function(line: &str) -> Option<&str> {
    let mut line = without_visibility(line.trim_start());
    for qualifier in ["const ", "async ", "unsafe "] {
        line = line.strip_prefix(qualifier).unwrap_or(line);
    }
    let rest = line.strip_prefix("fn ")?;
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_')?;
    Some(&rest[..end])
}

/// Returns the lines of the item that begins with the first one, up to its closing brace or
/// semicolon.
fn item_lines<'a, 't>(lines: &'a [&'t str]) -> &'a [&'t str] {
    let head = lines
        .iter()
        .position(|line| line.ends_with(['{', ';', '}']))
        .expect("an item ends");
    if !lines[head].ends_with('{') {
        return &lines[..=head];
    }
    let indent = lines[0].len() - lines[0].trim_start().len();
    let is_end = |line: &&str| {
        line.len() > indent && line[..indent].trim().is_empty() && line[indent..].starts_with('}')
    };
    let body = lines[head + 1..]
        .iter()
        .position(is_end)
        .expect("a body ends");
    &lines[..=head + 1 + body]
}

/// Returns a source without the items after `#[cfg(test)]`.
fn without_tests(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut kept = String::new();
    let mut at = 0;
    while at < lines.len() {
        if lines[at].trim() == "#[cfg(test)]" {
            at += lines[at..]
                .iter()
                .take_while(|line| line.trim_start().starts_with(['#', '/']))
                .count();
            at += item_lines(&lines[at..]).len();
        } else {
            kept.push_str(lines[at]);
            kept.push('\n');
            at += 1;
        }
    }
    kept
}

/// Whether the line has a `Result<_, String>`, or a trait's error type that is `String`.
fn has_string_for_error(line: &str) -> bool {
    let line = line.replace("->", "");
    line.contains("type Err = String;")
        || line.contains("type Error = String;")
        || line
            .match_indices("Result<")
            .any(|(at, head)| last_argument(&line[at + head.len()..]) == Some("String"))
}

/// Returns the last of several generic arguments, where `text` starts with the first. Returns
/// `None` if the line does not have them all.
fn last_argument(text: &str) -> Option<&str> {
    let (mut depth, mut from) = (0, None);
    for (at, c) in text.char_indices() {
        match c {
            '<' | '(' | '[' => depth += 1,
            '>' if depth == 0 => return from.map(|from: usize| text[from..at].trim()),
            '>' | ')' | ']' => depth -= 1,
            ',' if depth == 0 => from = Some(at + 1),
            _ => {}
        }
    }
    None
}

/// Returns the sources without tests, with their paths below the repository's root.
fn sources_without_tests() -> impl Iterator<Item = (String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    sources()
        .into_iter()
        .filter(|(path, _)| !path.ends_with("tests.rs"))
        .map(move |(path, text)| {
            let path = path.strip_prefix(root).expect("a path of the crate");
            (path.display().to_string(), without_tests(&text))
        })
}

/// Returns the sources of the crate with their paths, in order.
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
    assert!(has_string_for_error(
        "fn read() -> Result<Vec<(u8, u8)>, String> {"
    ));
    assert!(has_string_for_error("    type Err = String;"));
    assert!(!has_string_for_error("fn read() -> Result<String, Poor> {"));
    assert!(!has_string_for_error(
        "fn read(a: Result<u8, Poor>, b: String) -> Vec<String> {"
    ));
    let found = functions(&without_tests(
        "trait Reader {\n    fn read(\n        &self,\n    );\n}\n#[cfg(test)]\nmod scripted;\npub(super) async fn of<'a>(\n    a: u8,\n) {\n    work();\n}\n#[cfg(test)]\nmod tests {\n    fn a() {}\n}\n",
    ));
    let found: Vec<(&str, usize)> = found
        .iter()
        .map(|function| (function.name.as_str(), function.lines))
        .collect();
    assert_eq!(found, [("of", 5)]);
}
