"""What `pip install` brings: the source distribution, the wheel, and the wheel where no framework is."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import numpy
import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("core", "torch_frontend", "jax_frontend", "compare")
SINGLE_FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile")


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tree():
    """The files that a commit would hold, as paths below the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: the list of files is git's")
    listing = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return sorted(name for name in set(listing.split("\0")) - {""} if os.path.lexists(ROOT / name))


@pytest.fixture(scope="session")
def built(tree, tmp_path_factory):
    """(sdist, wheel), the wheel built from the sdist, both from a copy that has nothing but the files in git."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tree:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def metadata(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel and NumPy, and nothing else: the path of its `bin`."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", built[1])
    (site,) = home.glob("lib/python3*/site-packages")
    numpy_home = pathlib.Path(numpy.__file__).parent
    for package in numpy_home.parent.glob("numpy*"):
        (site / package.name).symlink_to(package)
    return home / "bin"


def test_sdist_holds_every_file_that_it_should(built, tree):
    with tarfile.open(built[0]) as sdist:
        found = {member.name.split("/", 1)[1] for member in sdist.getmembers() if member.isfile()}
    kept = ("core/", "torch_frontend/", "jax_frontend/", "compare/", "tests/", "notebooks/", "benchmarks/", "docs/")
    wanted = {name for name in tree if name.startswith((*kept, ".ci/", "constraints/")) or name in SINGLE_FILES}
    wanted |= {"src/moebius/__init__.py", "src/moebius/py.typed", "PKG-INFO"}
    assert found - {".gitignore"} == wanted


def test_wheel_holds_the_four_folders_and_nothing_else(built, tree):
    with zipfile.ZipFile(built[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {f"moebius/{name}" for name in tree if name.split("/")[0] in FOLDERS}
    assert found == wanted | {"moebius/__init__.py", "moebius/py.typed"}


def test_wheel_needs_numpy_alone(metadata):
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert always == ["numpy>=2.0"]


def test_wheel_carries_the_version_of_the_source(metadata):
    source = (ROOT / "src" / "moebius" / "__init__.py").read_text()
    assert metadata["Version"] == re.search(r'__version__ = "(.+)"', source)[1]


def test_wheel_carries_the_licence(built, metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
        assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def packages_of_extra(extra, extras):
    """Every package that an extra brings, the extras it names included."""
    packages = set()
    for requirement in extras[extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        if name == "moebius":
            packages |= {p for child in inner.split(",") for p in packages_of_extra(child, extras)}
        else:
            packages.add(name if inner is None else f"{name}[{inner}]")
    return packages


def test_extras_are_all_there_and_all_needs_no_compiler(metadata):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    assert set(extras) == {"torch", "jax", "compare", "notebooks", "all", "gpu", "tokamax", "te-torch", "te-jax", "dev"}
    everything = packages_of_extra("all", extras)
    assert {"torch", "jax", "flax", "safetensors", "transformers", "typer", "rich", "matplotlib"} <= everything
    assert not {p for p in everything if re.search("transformer-engine|cuda|triton|tokamax|deep", p)}


@pytest.mark.parametrize("pins", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_constraints_pin_what_the_extras_ask_for(pins):
    """Every package of `all` and `dev` has exactly one version in every constraints file."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for line in pins.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.]*", line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert len(names) == len(set(names))
    assert packages_of_extra("all", extras) | packages_of_extra("dev", extras) | {"numpy"} <= set(names)


def test_installed_wheel_imports_core_without_any_framework(installed, tmp_path):
    code = "import moebius.core, sys; print(moebius.__version__, moebius.__file__, 'torch' in sys.modules)"
    version, file, torch_loaded = run(installed / "python", "-I", "-c", code, cwd=tmp_path).split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert pathlib.Path(file).is_relative_to(installed.parent)
    assert torch_loaded == "False"


def test_installed_command_answers_without_any_framework(installed, tmp_path):
    assert "moebius" in run(installed / "moebius", "--help", cwd=tmp_path, env={"PATH": os.environ["PATH"]})
