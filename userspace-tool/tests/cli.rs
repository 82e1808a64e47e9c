// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line from outside: exit codes and messages that need no hypervisor.

use std::process::{Command, Output, Stdio};

fn krab(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_krab"));
    command.args(arguments).stdin(Stdio::null()).output().expect("the launcher starts")
}

#[test]
fn errors_have_their_codes_and_one_clear_line() {
    let table: [(&[&str], i32, &str); 9] = [
        (&["run"], 2, "--kernel"),
        (&["run", "--kernel", "k", "--cpus", "0"], 2, "--cpus"),
        (&["run", "--kernel", "k", "--memory", "512"], 2, "did you mean 512M?"),
        (&["run", "--kernel", "k", "--memory", "2X"], 2, "unknown unit"),
        (&["walk"], 2, "walk"),
        (&["run", "--kernel", "k", "--device", "/dev/no-krab"], 1, "does not exist: is krab.ko loaded?"),
        (&["run", "--kernel", "k", "--device", "/dev/null"], 1, "is no hypervisor's device"),
        (&["info", "--device", "/dev/no-krab"], 1, "does not exist"),
        (&["info", "--device", "/proc"], 1, "/proc"),
    ];
    for (arguments, code, text) in table {
        let output = krab(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(text), "{arguments:?}: {stderr}");
        assert!(code != 1 || stderr.lines().count() == 1, "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn help_lists_the_exit_codes() {
    let output = krab(&["run", "--help"]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && stdout.contains("triple fault"), "{stdout}");
}
