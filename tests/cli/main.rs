//! Tests of the program's texts, which need no run: the command line, reports, and the documents
//! that must agree with the code.

mod architecture;
mod args;
mod clients_doc;
mod deploy;
mod metrics_doc;
mod report;
mod style;
