//! The `kirsa` binary: dispatches the subcommands.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used)]

use std::process::ExitCode;

use kirsa::{
    agent,
    config::{self, Command},
    doctor,
    intercept::{Backend, rule},
};

fn main() -> ExitCode {
    match config::parse() {
        Ok(Command::Run(config)) => agent::main(*config),
        Ok(Command::Doctor(config, options)) => doctor::main(&config, options),
        Ok(Command::Health(socket, health)) => doctor::health(&socket, health),
        Ok(Command::Uninstall(backend)) => uninstall(backend),
        Err(code) => code,
    }
}

fn uninstall(backend: Backend) -> ExitCode {
    match rule::uninstall(backend) {
        Ok(removed) if removed.is_empty() => println!("nothing to remove: this node has no rules of kirsa"),
        Ok(removed) => removed.iter().for_each(|what| println!("removed {what}")),
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
