//! Imports point down: lists the modules of the crate in layers, and checks that each imports only
//! modules of lower layers.
//!
//! `cargo test --test cli architecture -- --nocapture` shows the layers and the imports of each
//! module.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Layers from the top. A module imports only modules of lower layers, so there is no cycle.
/// `docs/architecture.md` has the same table.
const LAYERS: &[(&str, &[&str])] = &[
    ("command line", &["cli"]),
    ("one host of many", &["prober"]),
    ("many runs, or many hosts", &["calibrate", "coordinator"]),
    ("one run", &["run"]),
    ("report", &["preflight", "report"]),
    ("a server's own figures", &["server_metrics"]),
    ("signalling", &["signal"]),
    ("engine; embedded SFU", &["engine", "sfu"]),
    ("recording", &["recording"]),
    ("wire", &["transport"]),
    ("plan; host and paths", &["host", "path", "plan"]),
    ("media and codecs", &["codec", "media"]),
    ("measurements", &["measure"]),
    (
        "ground",
        &[
            "http",
            "knee",
            "metrics_page",
            "net",
            "secrets",
            "seeded",
            "units",
            "words",
        ],
    ),
];

/// Files by import: from the importing module to the imported one.
type Imports = BTreeMap<(String, String), BTreeSet<PathBuf>>;

#[test]
fn imports_point_down() {
    let source = root().join("src");
    let mut imports = Imports::new();
    read_module_files(&source, &mut imports);
    let modules = modules_of_the_crate(&source);
    println!("{}", picture(&imports));
    let placed: BTreeSet<String> = layers().into_keys().collect();
    assert_eq!(
        placed, modules,
        "the table of layers and src/lib.rs name different modules"
    );
    let wrong = not_downward(&imports);
    assert!(
        wrong.is_empty(),
        "these do not point down:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_document_has_the_same_layers() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).expect("docs");
    let section = page.split("\n## Layers\n").nth(1).expect("its section");
    let section = section.split("\n## ").next().expect("a section");
    let rows: Vec<(String, Vec<String>)> = section
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains('`'))
        .map(|line| {
            let mut cells = line.split('|').skip(1).map(str::trim);
            let name = cells.next().expect("a name").to_owned();
            let modules = cells.next().expect("modules");
            let modules = modules.split('`').skip(1).step_by(2);
            (name, modules.map(str::to_owned).collect())
        })
        .collect();
    let table: Vec<(String, Vec<String>)> = LAYERS
        .iter()
        .map(|(name, modules)| {
            let modules = modules.iter().map(|module| (*module).to_owned());
            ((*name).to_owned(), modules.collect())
        })
        .collect();
    assert_eq!(rows, table);
}

#[test]
fn an_import_is_found_however_it_is_written() {
    let text = r#"
        use crate::{net, plan::{Plan, Role}, units::Time};
        use crate::media as pictures;
        // use crate::cli::Comment;
        /* crate::cli */
        const TEXT: &str = "crate::cli \" crate::cli"; const C: char = '"';
        fn of<'a>(x: &'a crate::measure::Record) {}
        #[cfg(test)]
        mod tests { use crate::run; fn of() { let brace = '}'; } }
        #[cfg(test)]
        #[path = "x.rs"]
        mod scripted;
        fn after() -> crate::words::Word { crate::seeded::draw() }
    "#;
    let found = imported(&without_tests(&code_alone(text)));
    let found: Vec<&str> = found.iter().map(String::as_str).collect();
    let expected = [
        "measure", "media", "net", "plan", "seeded", "units", "words",
    ];
    assert_eq!(found, expected);
}

#[test]
fn what_does_not_point_down_is_found() {
    let imports = |pairs: &[(&str, &str)]| -> Imports {
        pairs
            .iter()
            .map(|(from, to)| {
                let file = BTreeSet::from([PathBuf::from(format!("src/{from}.rs"))]);
                (((*from).to_owned(), (*to).to_owned()), file)
            })
            .collect()
    };
    assert!(not_downward(&imports(&[("cli", "run"), ("plan", "media")])).is_empty());
    assert_eq!(
        not_downward(&imports(&[("run", "cli"), ("engine", "sfu")])),
        ["engine -> sfu in src/engine.rs", "run -> cli in src/run.rs"]
    );
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the height of each module. 0 is the lowest layer.
fn layers() -> BTreeMap<String, usize> {
    let from_below = LAYERS.iter().rev().enumerate();
    from_below
        .flat_map(|(height, (_, modules))| {
            modules.iter().map(move |name| ((*name).to_owned(), height))
        })
        .collect()
}

fn not_downward(imports: &Imports) -> Vec<String> {
    let layers = layers();
    let points_down = |(from, to): &(String, String)| layers.get(from) > layers.get(to);
    imports
        .iter()
        .filter(|(import, _)| !points_down(import))
        .map(|((from, to), files)| {
            let files: Vec<String> = files
                .iter()
                .map(|file| {
                    file.strip_prefix(root())
                        .unwrap_or(file)
                        .display()
                        .to_string()
                })
                .collect();
            format!("{from} -> {to} in {}", files.join(", "))
        })
        .collect()
}

/// Lists each layer with its modules, and beside each module its imports.
fn picture(imports: &Imports) -> String {
    let mut lines = Vec::new();
    for (layer, modules) in LAYERS {
        lines.push(format!("{layer:-<76}"));
        for module in *modules {
            let known = imports.keys().filter(|(from, _)| from == module);
            let known: Vec<&str> = known.map(|(_, to)| to.as_str()).collect();
            lines.push(format!("  {module:<15} {}", known.join(" ")));
        }
    }
    lines.join("\n")
}

/// Returns the modules that `src/lib.rs` declares.
fn modules_of_the_crate(source: &Path) -> BTreeSet<String> {
    let text = code_alone(&fs::read_to_string(source.join("lib.rs")).expect("lib.rs"));
    text.split(';')
        .filter_map(|item| item.rsplit_once("mod ").map(|(_, name)| name.trim()))
        .map(str::to_owned)
        .collect()
}

/// Reads every file below `source` except tests (`tests.rs`) and `main.rs` and `lib.rs`, which are
/// the crate's own ends.
fn read_module_files(source: &Path, imports: &mut Imports) {
    let mut folders = vec![source.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).expect("a folder of src");
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            let name = path.file_name().unwrap_or_default().to_owned();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|kind| kind == "rs")
                && (folder != source || (name != "main.rs" && name != "lib.rs"))
                && name != "tests.rs"
            {
                read_file(source, &path, imports);
            }
        }
    }
}

fn read_file(source: &Path, path: &Path, imports: &mut Imports) {
    let inside = path.strip_prefix(source).expect("below src");
    let module = inside.iter().next().expect("a name");
    let module = Path::new(module).with_extension("").display().to_string();
    let text = fs::read_to_string(path).expect("a text");
    for other in imported(&without_tests(&code_alone(&text))) {
        if other != module {
            let files = imports.entry((module.clone(), other)).or_default();
            files.insert(path.to_owned());
        }
    }
}

/// Returns the text without comments, strings and characters.
fn code_alone(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let skipped = literal_len(rest);
        if skipped > 0 {
            code.push(' ');
            rest = &rest[skipped..];
        } else {
            code.push(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    code
}

/// Returns the length of the comment, string or character at the start of the text; 0 if it starts
/// with code.
fn literal_len(text: &str) -> usize {
    let until = |end: &str, from: usize| {
        let found = text[from..].find(end);
        found.map_or(text.len(), |at| from + at + end.len())
    };
    if text.starts_with("//") {
        return until("\n", 2);
    }
    if text.starts_with("/*") {
        return until("*/", 2);
    }
    for hashes in ["", "#", "##"] {
        let start = format!("r{hashes}\"");
        if text.starts_with(&start) {
            return until(&format!("\"{hashes}"), start.len());
        }
    }
    let mut chars = text.char_indices();
    match chars.next() {
        Some((_, '"')) => {
            let mut is_escaped = false;
            for (at, next) in chars {
                if next == '"' && !is_escaped {
                    return at + 1;
                }
                is_escaped = next == '\\' && !is_escaped;
            }
            text.len()
        }
        // A character, not a lifetime.
        Some((_, '\'')) => match (chars.next(), chars.next()) {
            (Some((_, '\\')), _) => until("'", 3),
            (_, Some((at, '\''))) => at + 1,
            _ => 0,
        },
        _ => 0,
    }
}

/// Returns the code without the items that are compiled only for tests.
fn without_tests(code: &str) -> String {
    let mut kept = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        rest = &rest[at..];
        let mut depth = 0usize;
        // The item ends at its semicolon or last brace. Attributes are in brackets.
        let end = rest.char_indices().find(|(_, next)| {
            match next {
                '{' | '[' | '(' => depth += 1,
                '}' | ']' | ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0 && matches!(next, ';' | '}')
        });
        rest = end.map_or("", |(at, _)| &rest[at + 1..]);
    }
    kept + rest
}

/// Returns the crate's modules with which the paths and `use` items of the code begin.
fn imported(code: &str) -> BTreeSet<String> {
    let mut modules = BTreeSet::new();
    for (at, start) in code.match_indices("crate::") {
        let rest = &code[at + start.len()..];
        match rest.strip_prefix('{') {
            None => modules.extend(name(rest)),
            Some(list) => {
                let mut depth = 0;
                let mut is_start = true;
                for (at, next) in list.char_indices() {
                    match next {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => is_start = true,
                        _ if is_start && !next.is_whitespace() => {
                            modules.extend(name(&list[at..]));
                            is_start = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    modules
}

/// Returns the name at the start of the text if it is a module's.
fn name(text: &str) -> Option<String> {
    let end = text
        .find(|next: char| !next.is_alphanumeric() && next != '_')
        .unwrap_or(text.len());
    let name = &text[..end];
    let is_module = name.starts_with(|first: char| first.is_lowercase());
    is_module.then(|| name.to_owned())
}
