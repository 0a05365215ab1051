use std::process::ExitCode;

fn main() -> ExitCode {
    tune::backend::wgpu::quiet_layers();
    ExitCode::from(tune::cli::main(std::env::args_os()))
}
