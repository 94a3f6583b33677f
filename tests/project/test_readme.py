"""The README's first screen is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_examples_of_both_frontends_print_what_the_readme_shows() -> None:
    torch, jax = re.findall(r"```python\n(.*?)```", README, re.S)[:2]
    (shown,) = re.findall(r"Both print:\n\n```\n(.*?)```", README, re.S)
    for code in (torch, jax):
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout == shown, done.stderr
    assert len(torch.strip().splitlines()) == len(jax.strip().splitlines()) <= 11


def test_the_example_of_a_flax_model_prints_what_its_last_comment_says() -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "linen" in block)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == code.strip().rsplit("# ", 1)[1], done.stderr
