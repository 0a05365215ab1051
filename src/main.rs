use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(tune::cli::main(std::env::args_os()))
}
