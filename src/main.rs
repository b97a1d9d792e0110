//! The `throng` command.

use std::io::{IsTerminal, stderr, stdout};
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use throng::cli::{self, Command, UsageError};
use throng::preflight::{self, Host};
use throng::report::progress::Progress;
use throng::report::text::{self, Style};
use throng::report::{Sinks, Verdict, emit, judge};
use throng::run;

fn main() -> ExitCode {
    let command = match cli::parse(std::env::args_os(), &|name| std::env::var(name).ok()) {
        Ok(command) => command,
        Err(usage) => {
            eprintln!("{usage}");
            return ExitCode::from(UsageError::EXIT_CODE);
        }
    };
    let done = match command {
        Command::Show(text) => emit(&mut stdout(), &text).map(|()| 0).map_err(Into::into),
        Command::Run(run) => load_test(&run),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("throng: {error:#}");
            ExitCode::from(Verdict::Partial.exit_code())
        }
    }
}

fn load_test(run: &cli::Run) -> Result<u8> {
    let host = Host::read();
    let resources = preflight::resources(&run.plan, &host, run.threads);
    let findings = preflight::check(&run.plan, &host, &resources);
    if run.dry_run {
        emit(&mut stdout(), &text::dry_run(&run.plan, &run.judging, &resources))?;
        run.warnings
            .iter()
            .chain(&findings.warnings)
            .for_each(|warning| eprintln!("warning: {warning}"));
        findings.refusals.iter().for_each(|refusal| eprintln!("would refuse: {refusal}"));
        return Ok(if findings.refusals.is_empty() { 0 } else { 1 });
    }
    if !run.quiet {
        emit(&mut stderr(), &text::first_line(&run.plan))?;
    }
    if !findings.refusals.is_empty() {
        return Err(anyhow!("{}", findings.refusals.join("\nthrong: ")));
    }
    findings.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let sinks = Sinks::open(&run.destinations).map_err(|refusals| anyhow!("{}", refusals.join("\nthrong: ")))?;

    let mut progress = Progress::new(stderr().is_terminal() && !run.no_live);
    let quiet = run.quiet;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(signalling_threads(&resources))
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(run::run(run, &resources, |snapshot| {
        if !quiet {
            // Progress that nobody can read is no reason to stop.
            let _ = progress.update(snapshot, &mut stderr());
        }
    }))?;
    let _ = progress.finish(&mut stderr());

    let no_color = std::env::var("NO_COLOR").ok();
    let written = if run.destinations.json_on_stdout() {
        emit(&mut stderr(), &text::render(&outcome, Style::of(&stderr(), no_color.as_deref())))
    } else {
        emit(&mut stdout(), &text::render(&outcome, Style::of(&stdout(), no_color.as_deref())))
    };
    let code = judge(&outcome).verdict.exit_code();
    sinks.write(&outcome).map_err(|error| anyhow!(error))?;
    written?;
    Ok(code)
}

/// One thread serves some thousand WebSockets; a second one where cores allow.
fn signalling_threads(resources: &throng::plan::Resources) -> usize {
    (resources.cpus / 4).clamp(1, 4)
}
