# SPDX-License-Identifier: GPL-2.0
# shell library for the nested VM: QEMU as a client of /dev/krab (or, with qemu_device=kvm, of KVM). Results are KTAP lines.
# The console of guest NAME is in /tmp/NAME, QEMU's messages and its monitor's answers in /tmp/NAME.out.
tests=0
qemu_device=${qemu_device:-krab}
# Kernel lines of Linux guests.
LINUX="console=ttyS0 panic=-1 no_timer_check tsc=reliable quiet"
KERNEL="-kernel /guest/vmlinuz"

seconds() { cut -d. -f1 /proc/uptime; }
# A result: `result NAME STATUS [TEXT]`.
result() {
	tests=$((tests + 1))
	if [ "$2" = 0 ]; then echo "ok $tests $1"; else echo "not ok $tests $1 $3"; fi
}
plan() { echo "1..$tests"; }

# Starts a guest in the background: `start NAME ARGUMENT...`. Commands for its monitor go to /tmp/NAME.monitor.
start() {
	name=$1
	shift
	rm -f "/tmp/$name" "/tmp/$name.monitor"
	mkfifo "/tmp/$name.monitor"
	# Open for reading and writing, so that neither side sees an end of it.
	qemu-system-x86_64 -accel "kvm,device=/dev/$qemu_device" -nodefaults -no-user-config -display none -no-reboot \
		-serial "file:/tmp/$name" -monitor stdio "$@" <>"/tmp/$name.monitor" >"/tmp/$name.out" 2>&1 &
	eval "pid_$name=$!"
}
pid() { eval "echo \$pid_$1"; }
# Also when the guest has ended: opened for reading, too, because nobody else may have it open.
monitor() { echo "$2" 1<>"/tmp/$1.monitor"; }
stop() {
	kill "$(pid "$1")" 2>/dev/null
	wait "$(pid "$1")"
}
# Waits until a file has a line: `wait_for SECONDS FILE PATTERN [NAME]`. Gives up when the guest NAME has ended.
wait_for() {
	end=$(($(seconds) + $1))
	while ! grep -qaE "$3" "$2" 2>/dev/null; do
		if [ -n "$4" ] && ! kill -0 "$(pid "$4")" 2>/dev/null; then
			grep -qaE "$3" "$2"
			return
		fi
		[ "$(seconds)" -lt "$end" ] || return 1
		sleep 0.3
	done
}
# What there is to see of a guest that failed.
show() {
	echo "# $1: QEMU says:"
	tr -d '\033\r' <"/tmp/$1.out" | tail -n 12 | cut -c1-300
	echo "# $1: its console ends:"
	tr -d '\033\r' <"/tmp/$1" | tail -c 2000
	echo
}
# A guest that is to say something: `guest NAME SECONDS PATTERN ARGUMENT...`.
guest() {
	name=$1 limit=$2 pattern=$3 began=$(seconds)
	shift 3
	start "$name" "$@"
	wait_for "$limit" "/tmp/$name" "$pattern" "$name"
	status=$?
	stop "$name" >/dev/null 2>&1
	if grep -qa GUEST-FAIL "/tmp/$name"; then status=1; fi
	result "$name" "$status" "no '$pattern' after $(($(seconds) - began)) s"
	[ "$status" = 0 ] || show "$name"
	echo "# $name: $(($(seconds) - began)) s"
}
# Stops of a guest in QEMU's gdbstub: `debugger [--no-int3]`.
debugger() {
	/selftests/gdb_client --image /tmp/boot
	rm -f /tmp/gdb
	start debugged -machine q35,graphics=off -cpu host -m 64 -drive format=raw,file=/tmp/boot \
		-gdb unix:/tmp/gdb,server=on,wait=off -S
	/selftests/gdb_client /tmp/gdb "$@" >/tmp/stops
	failed=$?
	while read -r name status text; do result "gdb_$name" "$status" "$text"; done </tmp/stops
	wait_for 30 /tmp/debugged DEBUGGED debugged
	status=$?
	stop debugged >/dev/null 2>&1
	result gdb_let_go $status "the guest did not go on"
	[ $failed = 0 ] && [ $status = 0 ] || show debugged
}
