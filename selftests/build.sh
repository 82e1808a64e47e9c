#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Builds the static test programs: target/x86_64-unknown-linux-gnu/release/{krab-selftests,ioctl_fuzz,bench}.
# The flags are here and not in .cargo/config.toml, which would reach the neighbouring crates as well.
set -eu
cd "$(dirname "$0")"
export RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
[ $# -gt 0 ] || set -- build
command=$1
shift
exec cargo "$command" --release --locked --target x86_64-unknown-linux-gnu "$@"
