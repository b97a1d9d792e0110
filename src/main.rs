//! The `throng` command.

use std::fmt::Display;
use std::io::{IsTerminal, stderr, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use throng::calibrate::cache::{self, HostId};
use throng::calibrate::{self, Calibration};
use throng::cli::{self, CliCommand, UsageError};
use throng::coordinator::{self, Merged, document};
use throng::plan::Resources;
use throng::preflight::{self, Findings, Host};
use throng::prober::Prober;
use throng::recording;
use throng::report::progress::{Progress, ProgressSnapshot};
use throng::report::text;
use throng::report::{self, Outcome, Sinks, Style, Verdict, emit, judge};
use throng::run::{self, Clips, Embedded, Interrupts};
use throng::sfu::server::{self, ServerConfig, SfuServer};
use throng::signal::{Secret, trust};

fn main() -> ExitCode {
    match throng() {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is::<UsageError>() => {
            say(&error);
            ExitCode::from(UsageError::EXIT_CODE)
        }
        Err(error) => {
            say(&format_args!("throng: {error:#}"));
            ExitCode::from(Verdict::Partial.exit_code())
        }
    }
}

fn throng() -> Result<u8> {
    let host = Host::read();
    let invocation = cli::parse(
        std::env::args_os(),
        &|name| std::env::var(name).ok(),
        host.usable_cpus(),
    )?;
    invocation.log.start();
    match invocation.command {
        CliCommand::Show(text) => Ok(emit(&mut stdout(), &text).map(|()| 0)?),
        CliCommand::Run(run) => load_test(*run, &host),
        CliCommand::Probe(probe) => take_part(*probe, &host),
        CliCommand::Coordinate(asked) => lead(&asked, &host),
        CliCommand::Sfu(sfu) => serve(&sfu, &host),
        CliCommand::Calibrate(calibrate) => measure_host(&calibrate, &host),
    }
}

/// Runs the embedded SFU until it is told to stop.
fn serve(sfu: &cli::Sfu, host: &Host) -> Result<u8> {
    if let Some(warning) = preflight::server_files(host) {
        say(&format_args!("warning: {warning}"));
    }
    let (api_key, api_secret) = match &sfu.credentials {
        Some(own) => (own.api_key.clone(), own.api_secret.clone()),
        None => (server::DEV_KEY.to_owned(), server::DEV_SECRET.to_owned()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Signals come first, so that one that arrives while the server starts is noticed.
    let mut interrupts = runtime.block_on(async { Interrupts::listen() });
    let started = Instant::now();
    let server = SfuServer::start(ServerConfig {
        listen: sfu.listen,
        media_ip: None,
        send: sfu.send,
        connections: server::CONNECTIONS_MAX,
        routers: sfu
            .threads
            .unwrap_or_else(|| host.usable_cpus().saturating_sub(1).max(1)),
        api_key: api_key.clone(),
        api_secret: Secret::new(api_secret),
        seed: sfu.seed,
        limit: None,
    })?;
    emit(
        &mut stdout(),
        &report::server::greeting(
            &server.url(),
            &api_key,
            sfu.credentials.is_none().then_some(server::DEV_SECRET),
        ),
    )?;
    runtime.block_on(interrupts.next());
    let statistics = server.stop();
    emit(
        &mut stdout(),
        &report::server::summary(&statistics, started.elapsed()),
    )?;
    Ok(0)
}

/// Measures this host's own ceiling, for people, scripts and later runs.
fn measure_host(asked: &cli::Calibrate, host: &Host) -> Result<u8> {
    let sinks = Sinks::open(&asked.destinations())
        .or_else(|refusals| none_of(&refusals).map(|()| Sinks::default()))?;
    if !asked.quiet {
        say(&calibrate::GREETING);
    }
    let parse = |flags| Ok(cli::parse_run(flags, host.usable_cpus())?);
    let calibration =
        calibrate::calibrate(host, asked.threads, calibrate::PATIENCE, &parse, |line| {
            if !asked.quiet {
                say(&line);
            }
        })?;
    let text = calibrate::text(&calibration);
    if asked.destinations().json_on_stdout() {
        say(&text.trim_end());
    } else {
        emit(&mut stdout(), &text)?;
    }
    sinks
        .write_json(&calibrate::json(&calibration))
        .map_err(|error| anyhow!(error))?;
    let kept = calibrate::keep(&calibration, &|name| std::env::var(name).ok())?;
    say(&format_args!(
        "Kept in {kept}: later runs say how near they come to it."
    ));
    Ok(0)
}

/// Writes a line to standard error. If nobody can read it, that is no reason to stop.
fn say(line: &impl Display) {
    let _ = emit(&mut stderr(), &format!("{line}\n"));
}

fn load_test(mut run: cli::RunSpec, host: &Host) -> Result<u8> {
    let mut resources = preflight::resources(&run.plan, host, run.threads);
    if run.destinations.record.is_some() {
        resources.files += recording::files(&run.plan);
    }
    let findings = preflight::check(&run.plan, host, &resources);
    if run.dry_run {
        return dry_run(&run, &resources, &findings);
    }
    none_of(&findings.refusals)?;
    trust::settle(&run.trust)?;
    let sinks = Sinks::open(&run.destinations)
        .or_else(|refusals| none_of(&refusals).map(|()| Sinks::default()))?;
    let clips = generate(&run, &resources)?;
    // Nothing is started or connected to until it is clear that there can be a run.
    let embedded = Embedded::start_for(&mut run, &resources)?;
    settle_connection(&mut run)?;
    if !run.quiet {
        say(&text::first_line(&run.plan).trim_end());
    }
    findings
        .warnings
        .iter()
        .for_each(|warning| say(&format_args!("warning: {warning}")));
    let mut outcome = measure(&run, &resources, clips)?;
    outcome.sfu = embedded.map(Embedded::stop);
    outcome.nearness =
        last_calibration(host).and_then(|calibration| calibration.nearness(&outcome));
    let code = write_report(&run, &outcome, sinks)?;
    if run.is_tour && !run.quiet {
        say(&text::WHAT_NEXT);
    }
    Ok(code)
}

fn last_calibration(host: &Host) -> Option<Calibration> {
    let path = cache::path(&|name| std::env::var(name).ok())?;
    cache::read(&path, &HostId::read(host.usable_cpus()))
}

/// Resolves `--connection auto`.
fn settle_connection(run: &mut cli::RunSpec) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run::settle_connection(&mut run.plan, &run.gateway));
    Ok(())
}

/// Generates the media. It says what is being made only if that takes time, as several layers of
/// video do.
fn generate(run: &cli::RunSpec, resources: &Resources) -> Result<Clips> {
    let started = Instant::now();
    let clips = Clips::generate(&run.plan, resources.threads, |what| {
        if !run.quiet && started.elapsed() >= Duration::from_secs(1) {
            say(&format_args!("making {what}"));
        }
    });
    Ok(clips.map_err(|error| UsageError::new(&format_args!("{error:#}")))?)
}

fn none_of(refusals: &[impl ToString]) -> Result<()> {
    if refusals.is_empty() {
        return Ok(());
    }
    let refusals: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    Err(anyhow!("{}", refusals.join("\nthrong: ")))
}

fn dry_run(run: &cli::RunSpec, resources: &Resources, findings: &Findings) -> Result<u8> {
    emit(
        &mut stdout(),
        &text::dry_run(&run.plan, &run.judging, resources),
    )?;
    let warnings = run.warnings.iter().chain(&findings.warnings);
    warnings.for_each(|warning| say(&format_args!("warning: {warning}")));
    findings
        .refusals
        .iter()
        .for_each(|refusal| say(&format_args!("would refuse: {refusal}")));
    Ok(if findings.refusals.is_empty() { 0 } else { 1 })
}

fn measure(run: &cli::RunSpec, resources: &Resources, clips: Clips) -> Result<Outcome> {
    watched(run, resources, async |progress| {
        run::run(run, resources, clips, progress).await
    })
}

/// Runs `work` on the runtime that the run's signalling lives on, and shows its progress.
fn watched(
    run: &cli::RunSpec,
    resources: &Resources,
    work: impl AsyncFnOnce(&mut dyn FnMut(&ProgressSnapshot)) -> Result<Outcome>,
) -> Result<Outcome> {
    let mut progress = Progress::new(stderr().is_terminal() && !run.no_live);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(resources.signalling_threads())
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(work(&mut |snapshot| {
        if !run.quiet {
            let _ = progress.update(snapshot, &mut stderr());
        }
    }));
    let _ = progress.finish(&mut stderr());
    outcome
}

/// Leads a run that other hosts play.
fn lead(asked: &cli::Coordinate, host: &Host) -> Result<u8> {
    if asked.run.dry_run {
        return lead_nobody(asked, host);
    }
    let quiet = asked.run.quiet;
    trust::settle(&asked.run.trust)?;
    let sinks = Sinks::open(&asked.run.destinations)
        .or_else(|refusals| none_of(&refusals).map(|()| Sinks::default()))?;
    let finished = coordinator::lead::lead(asked, &mut |line| say(&line), &mut |line| {
        if !quiet {
            say(&line);
        }
    })?;
    let merged = Merged::new(&finished.state, &finished.exhibit.judging);
    let about = document::About {
        series: &finished.series,
        server: finished.server.as_ref(),
        ..finished.exhibit.about(finished.at_us, &finished.notes)
    };
    let no_color = std::env::var("NO_COLOR").ok();
    let text = |style: Style| coordinator::text::render(&merged, &about, style);
    let shown = if asked.run.destinations.json_on_stdout() {
        say(&text(Style::of(&stderr(), no_color.as_deref())).trim_end());
        Ok(())
    } else {
        emit(
            &mut stdout(),
            &text(Style::of(&stdout(), no_color.as_deref())),
        )
    };
    sinks
        .write_json(&document::report(&merged, &finished.state, &about))
        .map_err(|error| anyhow!(error))?;
    shown.map_err(|error| anyhow!("cannot write standard output: {error}"))?;
    finished.told();
    Ok(merged.judgement.verdict.exit_code())
}

/// Shows what the hosts would play. It listens on nothing.
fn lead_nobody(asked: &cli::Coordinate, host: &Host) -> Result<u8> {
    let rehearsal = coordinator::lead::rehearse(asked).map_err(|why| UsageError::new(&why))?;
    let resources = preflight::resources(&rehearsal.first, host, None);
    emit(&mut stdout(), &coordinator::text::rehearsal(&rehearsal))?;
    emit(
        &mut stdout(),
        &text::dry_run(&rehearsal.first, &asked.run.judging, &resources),
    )?;
    asked
        .run
        .warnings
        .iter()
        .for_each(|warning| say(&format_args!("warning: {warning}")));
    Ok(0)
}

/// Plays this host's part in a run that a coordinator leads.
fn take_part(probe: cli::Probe, host: &Host) -> Result<u8> {
    let cli::Probe {
        config,
        run: own,
        shape_given,
    } = probe;
    trust::settle(&own.trust)?;
    let sinks = Sinks::open(&own.destinations)
        .or_else(|refusals| none_of(&refusals).map(|()| Sinks::default()))?;
    let quiet = own.quiet;
    let tell = |line: String| {
        if !quiet {
            say(&line);
        }
    };
    let mut prober = Prober::enlist(config, own.credentials.as_ref(), tell)?;
    let played = prober
        .run(own, shape_given)
        .and_then(|mut run| play(&mut prober, &mut run, host).map(|outcome| (run, outcome)));
    // Report to the coordinator first. Other hosts wait there, and nothing that goes wrong here may
    // hold them up.
    let told = prober.report(played.as_ref().map(|(_, outcome)| outcome), tell);
    let written = played.and_then(|(run, outcome)| write_report(&run, &outcome, sinks));
    say(&told);
    written
}

fn play(prober: &mut Prober, run: &mut cli::RunSpec, host: &Host) -> Result<Outcome> {
    let mut resources = preflight::resources(&run.plan, host, run.threads);
    if run.destinations.record.is_some() {
        resources.files += recording::files(&run.plan);
    }
    let findings = preflight::check(&run.plan, host, &resources);
    none_of(&findings.refusals)?;
    let clips = generate(run, &resources)?;
    settle_connection(run)?;
    if !run.quiet {
        say(&prober.describe());
        say(&text::first_line(&run.plan).trim_end());
    }
    findings
        .warnings
        .iter()
        .for_each(|warning| say(&format_args!("warning: {warning}")));
    let mut outcome = watched(run, &resources, async |progress| {
        prober.measure(run, &resources, clips, progress).await
    })?;
    outcome.nearness =
        last_calibration(host).and_then(|calibration| calibration.nearness(&outcome));
    Ok(outcome)
}

/// Writes every report, even if one of them fails. Returns the first failure.
fn write_report(run: &cli::RunSpec, outcome: &Outcome, sinks: Sinks) -> Result<u8> {
    let no_color = std::env::var("NO_COLOR").ok();
    let text = |style: Style| text::render(outcome, style);
    let shown = if run.destinations.json_on_stdout() {
        say(&text(Style::of(&stderr(), no_color.as_deref())).trim_end());
        Ok(())
    } else {
        emit(
            &mut stdout(),
            &text(Style::of(&stdout(), no_color.as_deref())),
        )
    };
    sinks.write(outcome).map_err(|error| anyhow!(error))?;
    shown.map_err(|error| anyhow!("cannot write standard output: {error}"))?;
    Ok(judge(outcome).verdict.exit_code())
}
