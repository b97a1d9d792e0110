//! Checks deploy/ as far as is possible without a cluster: its files parse, use only names that
//! throng knows, agree with each other, and run nothing as root.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn documents(path: &Path) -> Vec<Value> {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn compose() -> Value {
    documents(&root().join("deploy/compose.yaml")).remove(0)
}

/// Returns all Kubernetes objects.
fn kubernetes() -> Vec<Value> {
    let mut files: Vec<PathBuf> = fs::read_dir(root().join("deploy/kubernetes"))
        .expect("the manifests")
        .map(|file| file.expect("a file").path())
        .collect();
    files.sort();
    files.iter().flat_map(|file| documents(file)).collect()
}

fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// Returns the pods that the objects make, with the name of the object.
fn pods(objects: &[Value]) -> Vec<(&str, &Value)> {
    let pod = |object: &'_ Value| match object["kind"].as_str() {
        Some("Pod") => Some("/spec"),
        Some("Job") => Some("/spec/template/spec"),
        _ => None,
    };
    objects
        .iter()
        .filter_map(|object| {
            Some((
                object["metadata"]["name"].as_str()?,
                object.pointer(pod(object)?)?,
            ))
        })
        .collect()
}

fn texts(list: &Value) -> Vec<&str> {
    list.as_array()
        .into_iter()
        .flatten()
        .map(|text| text.as_str().expect("a text"))
        .collect()
}

fn keys(object: &Value) -> Vec<&str> {
    object
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key.as_str())
        .collect()
}

fn help() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_throng"))
        .arg("--help")
        .output()
        .expect("throng runs");
    String::from_utf8(output.stdout).expect("text")
}

/// Splits a text into words of the characters that `belongs` accepts.
fn words(text: &str, belongs: impl Fn(char) -> bool) -> BTreeSet<&str> {
    text.split(|c| !belongs(c)).collect()
}

fn is_of_a_flag(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'
}

fn is_of_a_variable(c: char) -> bool {
    c.is_ascii_uppercase() || c == '_'
}

/// Returns throng's arguments in the manifests and in the commands of the README.
fn arguments() -> Vec<String> {
    let mut arguments = Vec::new();
    for (_, service) in compose()["services"].as_object().expect("services") {
        arguments.extend(texts(&service["command"]).into_iter().map(str::to_owned));
    }
    for (_, pod) in pods(&kubernetes()) {
        arguments.extend(
            pod["containers"]
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|container| texts(&container["args"]))
                .map(str::to_owned),
        );
    }
    let readme = read("deploy/README.md");
    let commands = readme
        .lines()
        .filter_map(|line| line.strip_prefix("throng "));
    arguments.extend(commands.flat_map(str::split_whitespace).map(str::to_owned));
    arguments.retain(|argument| argument.starts_with("--"));
    arguments
}

fn expected(arguments: &Value) -> u64 {
    let expected = texts(arguments)
        .into_iter()
        .find_map(|argument| argument.strip_prefix("--expect="));
    expected.expect("--expect").parse().expect("a number")
}

#[test]
fn every_flag_is_one_of_throngs() {
    let help = help();
    let known = words(&help, is_of_a_flag);
    let used = arguments();
    assert!(used.len() > 15, "{used:?}");
    for argument in used {
        let flag = argument.split('=').next().unwrap_or_default();
        assert!(known.contains(flag), "{flag} is not in throng --help");
    }
}

#[test]
fn every_variable_is_one_that_throng_reads() {
    let help = help();
    let known = words(&help, is_of_a_variable);
    let mut used: BTreeSet<String> = BTreeSet::new();
    let compose = compose();
    for (name, service) in compose["services"].as_object().expect("services") {
        if name != "livekit" {
            used.extend(keys(&service["environment"]).into_iter().map(str::to_owned));
        }
    }
    let objects = kubernetes();
    used.extend(
        keys(&object(&objects, "Secret", "throng")["stringData"])
            .into_iter()
            .map(str::to_owned),
    );
    for (_, pod) in pods(&objects) {
        let variables = pod["containers"][0]["env"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let values: String = variables
            .iter()
            .filter_map(|variable| variable["value"].as_str())
            .collect();
        let names = variables
            .iter()
            .map(|variable| variable["name"].as_str().expect("a name").to_owned());
        // Some variables exist only for use in the values of others.
        used.extend(names.filter(|name| !values.contains(&format!("$({name})"))));
    }
    let fly: toml::Table = read("deploy/prober/fly.toml").parse().expect("TOML");
    used.extend(fly["env"].as_table().expect("a table").keys().cloned());
    used.insert("FLY_REGION".to_owned());
    assert!(
        used.contains("COORDINATOR_URL") && used.contains("VOICEGW_REGION") && used.len() >= 6,
        "{used:?}"
    );
    for name in used {
        assert!(
            known.contains(name.as_str()),
            "{name} is not in throng --help"
        );
    }
}

#[test]
fn a_prober_needs_its_environment_alone() {
    let entry = |container: &Value, command: &str| {
        assert!(
            container[command].is_null() && container["entrypoint"].is_null(),
            "{container}"
        )
    };
    let compose = compose();
    let probers: Vec<&Value> = compose["services"]
        .as_object()
        .expect("services")
        .iter()
        .filter(|(name, _)| name.starts_with("prober-"))
        .map(|(_, service)| service)
        .collect();
    let labels: BTreeSet<&str> = probers
        .iter()
        .map(|prober| {
            prober["environment"]["VOICEGW_REGION"]
                .as_str()
                .expect("a label")
        })
        .collect();
    assert_eq!(labels.len(), probers.len(), "no two vantages are the same");
    probers.iter().for_each(|prober| entry(prober, "command"));
    assert_eq!(
        expected(&compose["services"]["coordinator"]["command"]),
        probers.len() as u64
    );

    let objects = kubernetes();
    let job = &object(&objects, "Job", "throng-prober")["spec"];
    let container = &job["template"]["spec"]["containers"][0];
    entry(container, "command");
    assert!(container["args"].is_null() && job["completionMode"] == "Indexed");
    let coordinator =
        &object(&objects, "Job", "throng-coordinator")["spec"]["template"]["spec"]["containers"][0];
    let expected = Value::from(expected(&coordinator["args"]));
    assert_eq!(
        (&job["completions"], &job["parallelism"]),
        (&expected, &expected)
    );
    assert!(
        read("deploy/prober/Dockerfile")
            .lines()
            .any(|line| line == "ENTRYPOINT [\"throng\"]")
    );
}

#[test]
fn all_find_the_coordinator_where_it_listens() {
    const PORT: u64 = 8787;
    let compose = compose();
    for (name, service) in compose["services"].as_object().expect("services") {
        if let Some(url) = service["environment"]["COORDINATOR_URL"].as_str() {
            assert_eq!(url, format!("http://coordinator:{PORT}"), "{name}");
        }
    }
    let objects = kubernetes();
    let service = object(&objects, "Service", "throng-coordinator");
    let coordinator = &object(&objects, "Job", "throng-coordinator")["spec"]["template"];
    assert_eq!(
        service["spec"]["selector"]["app"],
        coordinator["metadata"]["labels"]["app"]
    );
    assert_eq!(service["spec"]["ports"][0]["port"], PORT);
    assert_eq!(
        coordinator["spec"]["containers"][0]["ports"][0]["containerPort"],
        PORT
    );
    let prober =
        &object(&objects, "Job", "throng-prober")["spec"]["template"]["spec"]["containers"][0];
    let url = prober["env"]
        .as_array()
        .expect("a list")
        .iter()
        .find(|variable| variable["name"] == "COORDINATOR_URL");
    assert_eq!(
        url.expect("its address")["value"],
        format!("http://throng-coordinator:{PORT}")
    );
    assert!(
        help().contains(&PORT.to_string()),
        "it is the port where nothing else is said"
    );
}

#[test]
fn nobody_is_root() {
    let dockerfile = read("deploy/prober/Dockerfile");
    let last_stage = dockerfile.rsplit_once("\nFROM ").expect("several stages").1;
    let user = last_stage
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("USER "))
        .expect("a user");
    let ids: Vec<u32> = user
        .split(':')
        .map(|id| id.parse().expect("a number: schedulers look at it"))
        .collect();
    assert!(ids.len() == 2 && ids.iter().all(|id| *id > 0), "{user}");
    let objects = kubernetes();
    let pods = pods(&objects);
    assert_eq!(pods.len(), 3);
    for (name, pod) in pods {
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(
            pod["securityContext"]["fsGroup"], ids[1],
            "{name} may write into its volume"
        );
        let container = &pod["containers"][0]["securityContext"];
        assert_eq!(
            (
                &container["allowPrivilegeEscalation"],
                &container["capabilities"]["drop"][0]
            ),
            (&Value::from(false), &Value::from("ALL")),
            "{name}"
        );
    }
}

#[test]
fn the_image_is_built_of_what_is_here() {
    let kept: Vec<String> = read("deploy/prober/Dockerfile.dockerignore")
        .lines()
        .filter_map(|line| line.strip_prefix('!').map(str::to_owned))
        .collect();
    assert!(
        kept.iter().all(|path| root().join(path).exists()),
        "{kept:?}"
    );
    // Cargo reads the manifest only if all the files that it names are there.
    let manifest: toml::Table = read("Cargo.toml").parse().expect("TOML");
    let benches = manifest["bench"].as_array().expect("benches");
    assert!(!benches.is_empty() && kept.iter().any(|path| path == "benches"));
    let included = fs::read_dir(root().join("src")).expect("the source");
    assert!(
        included.count() > 0
            && kept.iter().any(|path| path == "src")
            && kept.iter().any(|path| path == "Cargo.lock")
    );
}
