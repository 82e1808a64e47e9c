# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Sourced by the other scripts: where things are, and how progress is shown.
set -eu
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/krab
root=$cache/root-trixie
# One build folder for each checkout, so that two checkouts never share half-built files.
out=$cache/build/$(basename "$checkout")-$(printf %s "$checkout" | sha256sum | cut -c1-8)
mkdir -p "$cache" "$out"

say() { printf '[krab] %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# Starts the script again inside the Debian 13 root folder: `reenter "$0" "$@"`.
reenter() { [ -n "${KRAB_IN_ROOT:-}" ] || exec "$checkout/scripts/in-root" "$@"; }

# Takes a lock for the rest of the script: `lock NAME`. Waits, and says so, when another run holds it.
lock() {
	exec 9>"$cache/$1.lock"
	flock -n 9 || { say "waiting for another run ($1)"; flock 9; }
}

# Runs a long quiet command with a line of progress: `step TEXT COMMAND...`. Its output is shown only when it fails.
step() {
	local text=$1 log status=0 began=$SECONDS pid last=0
	shift
	log=$(mktemp "${TMPDIR:-/tmp}/krab-step.XXXXXX")
	say "$text ..."
	"$@" >"$log" 2>&1 </dev/null &
	pid=$!
	while kill -0 "$pid" 2>/dev/null; do
		sleep 1
		if [ $((SECONDS - began - last)) -ge 20 ]; then
			last=$((SECONDS - began))
			say "  $text: ${last} s: $(tail -n 1 "$log" | cut -c1-100)"
		fi
	done
	wait "$pid" || status=$?
	if [ "$status" != 0 ]; then
		tail -n 200 "$log" >&2
		say "failed ($status): $text"
	else
		say "  $text: done in $((SECONDS - began)) s"
	fi
	rm -f "$log"
	return "$status"
}

kernel_version() { cat "$cache/kernel/version"; }

# Of the running system: Debian's name for it, and the mirror, out of apt's own view of its sources.
codename() { (. /etc/os-release && echo "$VERSION_CODENAME"); }
mirror() {
	# shellcheck disable=SC2016  # apt expands these, not the shell
	apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(CREATED_BY) $(REPO_URI)' |
		awk -v r="$(codename)" '$1 == r && $2 == "main" && $3 == "Packages" { print $4; exit }'
}
