"""What the page in a browser takes from npm, where npm has it."""

from __future__ import annotations

import functools
import shutil
import subprocess

from sam3x.web.packages import PACKAGES


@functools.cache
def lacking_npm() -> str | None:
    """Why npm brings nothing here, in words; None where it does."""
    if shutil.which("npm") is None:
        return "no npm here: apt-get install nodejs npm"
    command = ["npm", "view", str(PACKAGES[0]), "version", "--fetch-retries=0", "--fetch-timeout=20000"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else f"npm's registry does not answer: {done.stderr.strip()[:200]}"
