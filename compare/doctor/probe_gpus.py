"""Asks the NVIDIA driver for its GPUs: a framework that sees none is then told from a machine that has none."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from moebius.compare.doctor.reply import reply

_FIELDS = ("name", "driver_version", "compute_cap", "memory.total")


def main() -> None:
    """Reply with the stage "gpus": a list, empty where there is no driver or no GPU."""
    reply({"gpus": _gpus})


def _gpus() -> list[dict[str, Any]]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # "No devices were found" is an answer; a driver that does not load is a fault.
        if "No devices" in done.stdout + done.stderr:
            return []
        raise OSError(f"nvidia-smi: {(done.stderr or done.stdout).strip()}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(_FIELDS, row, strict=True)) for row in rows]
