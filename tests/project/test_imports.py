"""Who loads whom, seen from outside: each import runs in an interpreter of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("core", "torch_frontend", "jax_frontend", "compare")


def run_python(code, cwd):
    """Run `code` in a fresh interpreter with src/ as the only addition to its path."""
    env = {k: v for k, v in os.environ.items() if k != "COVERAGE_PROCESS_START"} | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def loaded_by(module, cwd):
    """The top-level packages in sys.modules after importing `module`."""
    done = run_python(f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})", cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("moebius", {"numpy", "torch", "jax", "flax"}),
        ("moebius.core", {"torch", "jax", "jaxlib", "flax", "triton", "transformers"}),
        ("moebius.compare", {"torch", "jax", "jaxlib", "flax", "triton", "transformers"}),
        pytest.param("moebius.torch_frontend", {"jax", "jaxlib", "flax"}, marks=pytest.mark.torch),
        pytest.param("moebius.jax_frontend", {"torch", "transformers"}, marks=pytest.mark.jax),
    ],
)
def test_import_one_package_loads_no_other_framework(module, forbidden, tmp_path):
    assert not loaded_by(module, tmp_path) & forbidden


@pytest.mark.torch
def test_import_torch_frontend_loads_torch(tmp_path):
    """The two tests above could pass by loading nothing; this one and the next see that they do load."""
    assert "torch" in loaded_by("moebius.torch_frontend", tmp_path)


@pytest.mark.jax
def test_import_jax_frontend_loads_jax_and_flax(tmp_path):
    assert {"jax", "flax"} <= loaded_by("moebius.jax_frontend", tmp_path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_folder_by_its_bare_name_says_the_right_one(folder):
    """In the repository's root `import core` would make a second copy of every class."""
    done = run_python(f"import {folder}", cwd=ROOT)
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    assert f"moebius.{folder}" in last_line


def test_src_holds_only_the_version_the_marker_and_the_links():
    found = {path.name for path in (ROOT / "src" / "moebius").iterdir()} - {"__pycache__"}
    assert found == {"__init__.py", "py.typed", *FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_src_links_lead_to_the_folders_at_the_root(folder):
    link = ROOT / "src" / "moebius" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{folder}"
    assert link.resolve() == ROOT / folder
