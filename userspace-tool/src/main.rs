// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `krab`: boots a kernel in a virtual machine on /dev/krab or /dev/kvm.
//!
//! A small PC: CPUs with APICs, RAM, COM1, a CMOS clock, ACPI for power-off, reset and CPU discovery, and a port
//! through which the guest gives an exit code. No PCI, no disks, no network.

mod acpi;
mod boot;
mod cpuid;
mod device;
mod devices;
mod exit;
mod main_loop;
mod memory;
mod stats;
mod terminal;
mod vcpu;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Boots a kernel in a virtual machine.
#[derive(Parser)]
#[command(name = "krab", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a kernel; the guest's serial console is on standard input and output. On a terminal, Ctrl-A x quits and Ctrl-A h helps.
    ///
    /// Input that comes before the guest has opened its console may be lost, as on any serial line.
    #[command(after_help = exit::EXIT_CODES_HELP, args_override_self = true)]
    Run(Run),
    /// Show the hypervisor's API version and capabilities.
    Info {
        #[command(flatten)]
        device: Device,
    },
}

#[derive(Args)]
struct Device {
    /// The hypervisor's device node.
    #[arg(long, value_name = "NODE", default_value = "/dev/krab")]
    device: PathBuf,
}

#[derive(Args)]
struct Run {
    /// Kernel: an x86-64 bzImage, or an ELF vmlinux with PVH entry.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0", allow_hyphen_values = true)]
    cmdline: String,
    /// Number of CPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// Size of the guest's RAM: bytes, or with a unit, as 512M, 2G, 1536MiB.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory::parse_size)]
    memory: u64,
    /// Show the hypervisor's statistics of all CPUs together, on standard error at the end.
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    device: Device,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(run) => vm::run(&vm::Config {
            device: run.device.device,
            kernel: run.kernel,
            initrd: run.initrd,
            cmdline: run.cmdline,
            cpus: run.cpus,
            memory: run.memory,
            stats: run.stats,
        })
        .map(|outcome| outcome.report()),
        Command::Info { device } => device::info(&device.device).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("krab: error: {error:#}");
        ExitCode::from(exit::CODE_LAUNCHER_ERROR)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::error::ErrorKind;

    fn parse(arguments: &str) -> Result<Run, clap::Error> {
        match Cli::try_parse_from(arguments.split_whitespace())?.command {
            Command::Run(run) => Ok(run),
            Command::Info { .. } => unreachable!("`run` was given"),
        }
    }

    #[test]
    fn defaults() {
        let run = parse("krab run --kernel k").unwrap();
        assert_eq!((run.cpus, run.memory, run.cmdline.as_str()), (1, 512 << 20, "console=ttyS0"));
        assert_eq!(run.device.device, PathBuf::from("/dev/krab"));
    }

    #[test]
    fn all_options() {
        let line = "krab run --kernel k --initrd i --cmdline -x --cpus 64 --memory 2G --stats --device /dev/kvm";
        let run = parse(line).unwrap();
        assert!(run.stats && !parse("krab run --kernel k").unwrap().stats);
        assert_eq!((run.cpus, run.memory, run.cmdline.as_str()), (64, 2 << 30, "-x"));
    }

    #[test]
    fn the_last_of_an_option_counts() {
        let run = parse("krab run --kernel k --memory 1G --memory 2G --cpus 1 --cpus 2").unwrap();
        assert_eq!((run.cpus, run.memory), (2, 2 << 30));
    }

    #[test]
    fn bad_usage_has_code_2() {
        for (line, kind) in [
            ("krab run", ErrorKind::MissingRequiredArgument),
            ("krab run --kernel k --cpus 0", ErrorKind::ValueValidation),
            ("krab run --kernel k --cpus two", ErrorKind::ValueValidation),
            ("krab run --kernel k --memory 512", ErrorKind::ValueValidation),
            ("krab run --kernel k --memory 2X", ErrorKind::ValueValidation),
            ("krab run --kernel k --disk d", ErrorKind::UnknownArgument),
            ("krab", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ] {
            let error = parse(line).err().expect(line);
            assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{line}");
        }
    }
}
