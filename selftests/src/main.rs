// SPDX-License-Identifier: GPL-2.0
//! `krab-selftests [--device PATH] [--bed NAME] [--list] [--times] [--no-apicv] [--restricted] [FILTER ...]`: the tests, KTAP on standard output.
//!
//! `--no-apicv`: the module was loaded with `apicv=0`; `--restricted`: with `unrestricted_guest=0`. A filter is a substring of `group.name`; `-FILTER` leaves out what matches. The exit code is 0 when no test failed.

mod tests;

use krabtest::harness::{self, Options, Test};

fn main() {
    let mut options =
        Options { device: "/dev/krab".into(), bed: "unknown".into(), times: false, apicv: true, unrestricted: true };
    let (mut list, mut with, mut without) = (false, Vec::new(), Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| usage());
        match a.as_str() {
            "--device" => options.device = value(),
            "--bed" => options.bed = value(),
            "--list" => list = true,
            "--times" => options.times = true,
            "--no-apicv" => options.apicv = false,
            "--restricted" => options.unrestricted = false,
            f if f.starts_with("--") => usage(),
            f => match f.strip_prefix('-') {
                Some(f) => without.push(f.to_string()),
                None => with.push(f.to_string()),
            },
        }
    }
    let chosen: Vec<(String, &Test)> = tests::GROUPS
        .iter()
        .flat_map(|g| g.tests.iter().map(move |t| (format!("{}.{}", g.name, t.name), t)))
        .filter(|(n, _)| with.is_empty() || with.iter().any(|f| n.contains(f.as_str())))
        .filter(|(n, _)| !without.iter().any(|f| n.contains(f.as_str())))
        .collect();
    if list {
        for (name, _) in chosen {
            println!("{name}");
        }
        return;
    }
    harness::set_options(options);
    std::process::exit((harness::run(&chosen) != 0) as i32);
}

fn usage() -> ! {
    eprintln!(
        "usage: krab-selftests [--device PATH] [--bed NAME] [--list] [--times] [--no-apicv] [--restricted] [FILTER ...] [-FILTER ...]"
    );
    std::process::exit(2);
}
