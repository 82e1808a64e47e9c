# SPDX-License-Identifier: GPL-2.0
# The commands of the project. Each is a script in scripts/; everything built or downloaded is in ~/.cache/krab.
.PHONY: help run test check bench fuzz ready clean
.DEFAULT_GOAL := help

help:
	@echo "make run    boot a Linux guest on Krab in a nested VM, to a shell (the first time gets toolchain and kernel)"
	@echo "make test   all tests"
	@echo "make check  format, lints and the rules of the tree"
	@echo "make bench  instructions per operation, Krab beside KVM"
	@echo "make fuzz   random calls at /dev/krab; TIME=seconds (an hour), SEED=number"
	@echo "make clean  remove what was built for this checkout (toolchain and kernel stay)"

run:
	@scripts/run
test: ready
	@scripts/bochs >/dev/null
	@scripts/in-root scripts/run-tests
check: ready
	@scripts/in-root scripts/check
bench: ready
	@scripts/in-root scripts/bench
fuzz: ready
	@scripts/in-root scripts/fuzz --time $(or $(TIME),3600) $(if $(SEED),--seed $(SEED))
ready:
	@scripts/toolchain
	@scripts/kernel >/dev/null
clean:
	@scripts/build --clean
