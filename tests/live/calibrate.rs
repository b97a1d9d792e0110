//! `throng calibrate`, shortened. Points are real runs, and the result that is kept is the one that
//! later runs compare themselves with.

use std::time::Duration;

use crate::common::program::alone;
use throng::calibrate::cache::{self, HostId};
use throng::calibrate::{self, Calibration, CalibrationLimit};
use throng::preflight::Host;

/// Time for the first point of each question, and for its repetition if a busy host breaks it.
const PATIENCE: Duration = Duration::from_secs(40);

#[test]
fn every_question_is_asked_and_a_later_run_finds_the_answers() {
    let _alone = alone();
    let host = Host::read();
    let mut lines = Vec::new();
    let parse = |flags| Ok(throng::cli::parse_run(flags, host.usable_cpus())?);
    let found = calibrate::calibrate(&host, Some(1), PATIENCE, &parse, |line| {
        lines.push(line.to_owned())
    })
    .unwrap();
    println!("{}\n{}", lines.join("\n"), calibrate::text(&found));
    assert_eq!(
        found.engine_threads,
        usize::from(found.packets.held.is_some())
    );
    for (name, ceiling) in [
        ("joins", &found.joins),
        ("packets", &found.packets),
        ("participants", &found.participants),
    ] {
        let points = lines
            .iter()
            .filter(|line| line.trim_start().starts_with(&format!("{name} ")))
            .count();
        assert!(points > 0, "{name} was never asked");
        // On a busy host it can happen that no point holds. Then there is a reason, and no figure.
        match ceiling.held {
            Some(held) => {
                assert!(held >= 100.0, "{name}: {held}");
                assert!(
                    ceiling
                        .command
                        .as_ref()
                        .is_some_and(|command| command.starts_with("throng --"))
                );
            }
            None => assert!(
                ceiling.limit != CalibrationLimit::Time
                    && !ceiling.reasons.is_empty()
                    && ceiling.command.is_none()
            ),
        }
    }
    assert_eq!(found.us_per_packet.is_some(), found.packets.held.is_some());
    let text = calibrate::text(&found);
    assert!(
        text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );

    let folder = std::env::temp_dir().join(format!("throng-calibrate-{}", std::process::id()));
    let env = |name: &str| (name == "XDG_CACHE_HOME").then(|| folder.display().to_string());
    let path = cache::path(&env).unwrap();
    calibrate::keep(&found, &env).unwrap();
    let kept = cache::read(&path, &HostId::read(host.usable_cpus()));
    assert_eq!(
        kept.as_ref().map(calibrate::json),
        Some(calibrate::json(&found))
    );
    // A host with another number of CPUs is another host, and a file that is no calibration is
    // ignored.
    assert!(cache::read(&path, &HostId::read(host.usable_cpus() + 1)).is_none());
    std::fs::write(&path, "{}").unwrap();
    assert!(cache::read(&path, &HostId::read(host.usable_cpus())).is_none());
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn without_a_home_nothing_is_kept_and_the_user_is_told() {
    let nothing = r#"{"schema":"throng-calibration/1","version":"0.1.0","calibrated_at_unix":1,"host":{"processor":"","kernel":"","cpus":1},"engine_threads":0,
        "sfu_routers":0,"us_per_packet":null,"packets_per_second_per_thread":null,
        "packets":{"held":null,"command":null,"limit":"generator","reasons":["late"]},
        "joins":{"held":null,"command":null,"limit":"host","reasons":["files"]},
        "participants":{"held":null,"command":null,"limit":"time","reasons":[]}}"#;
    let nothing: Calibration = serde_json::from_str(nothing).unwrap();
    let error = calibrate::keep(&nothing, &|_| None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("XDG_CACHE_HOME"), "{error}");
    assert!(calibrate::text(&nothing).contains("nothing held"));
}
