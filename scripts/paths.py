# SPDX-License-Identifier: GPL-2.0
"""Where things are, for the scripts in Python; common.sh says the same to those in shell."""
import os
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
TREE = SCRIPTS.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "krab"


def results():
    """What this checkout's builds leave: krab.ko, krab, selftests/*, guest-*.cpio."""
    return Path(subprocess.run([SCRIPTS / "build", "--print"], check=True, capture_output=True, text=True).stdout.strip())


def logs():
    """The logs of this checkout's runs: two checkouts may run at once."""
    folder = results().parent / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
