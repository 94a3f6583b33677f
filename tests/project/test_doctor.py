"""`moebius doctor`: the command, its text and JSON, and the support table of the README."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from patients import SETTINGS, TE, failed, healthy, with_backend, without

from moebius.compare import entry
from moebius.compare.doctor import command, probe_jax, probe_torch, registries, support, text
from moebius.compare.doctor.machine import FRONTENDS
from moebius.compare.doctor.packages import PACKAGES
from moebius.compare.doctor.probe import Answer
from moebius.compare.doctor.record import Report, Status
from moebius.core.registry import Registry

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "jax", "jaxlib", "flax")


# ----------------------------------------------------------------------------------------------------------- registries
@pytest.fixture(scope="module")
def asked_registries():
    """Each frontend's registries, as its probe asks them."""
    return {"torch": probe_torch._registries(), "jax": probe_jax._registries()}


def test_registries_of_the_frontends_are_all_asked(asked_registries):
    for frontend, module in FRONTENDS.items():
        home = importlib.import_module(module)
        modules = [importlib.import_module(f"{module}.{info.name}") for info in pkgutil.iter_modules(home.__path__)]
        declared = {id(value) for m in modules for value in vars(m).values() if isinstance(value, Registry)}
        assert declared == {id(registry) for registry in asked_registries[frontend]}


def test_states_are_those_of_explain_for_every_backend(asked_registries):
    for frontend, of_frontend in asked_registries.items():
        rows = registries.states(of_frontend, capability=(9, 0))
        for registry in of_frontend:
            mine = [row for row in rows if row["operation"] == registry.operation]
            assert [row["name"] for row in mine if not row["unbuilt"]] == list(registry.names), frontend
            for key in (f"{device} {dtype}" for device in ("cpu", "cuda") for dtype in registries.DTYPES):
                assert [row["states"][key] for row in mine].count("chosen") == 1


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_extra_of_transformer_engine_brings_all_that_its_backends_need(asked_registries, frontend):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = [row for row in registries.states(asked_registries[frontend], capability=(9, 0)) if row["name"] == "te"]
    needed = {package for row in rows for package in row["needs"]}
    assert "transformer_engine" in needed
    for package in needed:
        assert any(line.startswith(package.replace("_", "-")) for line in extras[f"te-{frontend}"]), package


def test_load_of_a_backend_runs_its_loader_and_raises_what_it_raises():
    registry = Registry("moebius.test_frontend", "grouped_matmul")
    registry.add(name="good", load=object)
    registry.add(name="talks", load=object, says=lambda: "takes the long way here")
    registry.add(name="bad", load=lambda: 1 / 0)
    assert registries.load([registry], "grouped_matmul", "good") == {"says": ""}
    assert registries.load([registry], "grouped_matmul", "talks") == {"says": "takes the long way here"}
    with pytest.raises(ZeroDivisionError):
        registries.load([registry], "grouped_matmul", "bad")


# ---------------------------------------------------------------------------------------------------- the support table
@pytest.fixture
def grid():
    """The records of a registry with one backend of each kind."""
    registry = Registry("moebius.test_frontend", "grouped_matmul")
    registry.add(
        name="fast",
        load=object,
        needs=("moebius_no_such_package",),
        supports=lambda p: "needs | Hopper" if p.capability != (9, 0) or p.dtype == "float64" else None,
        note="quick",
    )
    registry.add(name="plain", load=object)
    registry.add_unbuilt("later", "much_later")
    return registries.support([registry])


def test_support_does_not_depend_on_what_is_installed(grid):
    fast, plain, *_ = grid
    assert fast["devices"]["cuda"]["default"] == ["float32", "bfloat16", "float16"]
    assert fast["devices"]["cpu"] == {"dtypes": [], "default": [], "limits": ["needs | Hopper"]}
    assert plain["devices"]["cpu"]["default"] == list(registries.DTYPES)


def test_markdown_of_support_is_a_table_with_every_backend(grid):
    lines = support.markdown({"torch": grid}).splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    fast, plain, later = lines[2:]
    assert "| `fast` | no | **float32**, **bfloat16**, **float16** | quick; needs moebius_no_such_package" in fast
    assert "| `plain` | **any dtype** | **any dtype** |" in plain
    assert "| `later`, `much_later` | not in this version | not in this version |" in later


@pytest.mark.parametrize(
    ("dtypes", "default", "cell"),
    [
        ([], [], "no"),
        (["float32"], [], "float32"),
        (list(registries.DTYPES), [], "any dtype"),
        (list(registries.DTYPES), ["float64"], "**float64**, float32, bfloat16, float16"),
    ],
)
def test_markdown_of_a_device_names_dtypes_and_the_default_in_bold(grid, dtypes, default, cell):
    grid[1]["devices"]["cpu"] = {"dtypes": dtypes, "default": default, "limits": []}
    assert f"| `plain` | {cell} |" in support.markdown({"jax": grid}).splitlines()[3]


def test_readme_support_table_is_what_the_command_prints(asked_registries):
    printed = support.markdown({name: registries.support(asked) for name, asked in asked_registries.items()})
    mark = "moebius doctor --markdown -->\n"
    (shown,) = re.findall(rf"<!-- begin: {mark}\n(.*?)\n\n<!-- end: {mark}", (ROOT / "README.md").read_text(), re.S)
    difference = difflib.unified_diff(shown.splitlines(), printed.splitlines(), "README.md", "printed", lineterm="")
    assert shown == printed, "\n".join(["put what `moebius doctor --markdown` prints into README.md", *difference])


# ---------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def doctor(monkeypatch, capsys):
    """Runs the command on a machine: (exit code, standard output, standard error)."""

    def run(machine, *arguments):
        monkeypatch.setattr(command, "examine", lambda timeout: machine)
        code = command.main(arguments)
        return code, *capsys.readouterr()

    return run


BAD = {
    "healthy": healthy(),
    "bare": without(healthy(answers={}), *(package.name for package in PACKAGES if package.extra)),
    "aborts": failed(failed(healthy(), "torch", "ended by SIGABRT " + "very " * 60), "jax", "x" * 300, "import"),
    "tf32": SETTINGS["torch, float32 products"],
    "later": with_backend(unbuilt=True),
}


@pytest.mark.parametrize("writer", [text.plain, text.tables, lambda report: text.tables(report, color=True)])
@pytest.mark.parametrize("name", BAD)
def test_text_fits_100_columns_and_leaves_no_word_out(name, writer):
    report = Report(moebius="0.1.0", rows=command.rows(BAD[name]))
    written = re.sub("\x1b\\[[0-9;]*m", "", writer(report))
    assert max(map(len, written.splitlines())) <= 100
    together = re.sub(r"\s", "", written)
    for row in report.rows:
        for words in (row.version, row.detail, row.remedy, row.status):
            assert re.sub(r"\s", "", words) in together


def test_text_without_rich_is_plain(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report = Report(moebius="0.1.0", rows=command.rows(healthy()))
    assert text.written(report) == text.plain(report)


def test_command_exits_0_where_nothing_is_broken(doctor):
    code, out, err = doctor(SETTINGS["multiprocessing"])
    assert (code, err) == (0, "") and out.splitlines()[-1] == "verdict: nothing is broken; 1 warning"


def test_command_exits_1_where_something_is_broken(doctor):
    code, out, _ = doctor(failed(healthy(), "both", "ended by SIGABRT at 'jax'", "torch"))
    assert code == 1 and "device jax after torch: broken" in out.splitlines()[-1]


def test_command_json_is_all_there_is_and_has_every_field(doctor):
    code, out, _ = doctor(with_backend(missing="not installed: transformer_engine"), "--json", "--strict", "te")
    body = json.loads(out)
    assert code == 1
    assert set(body) == {"moebius", "rows", "strict", "seconds", "passed", "faults"}
    assert (body["passed"], body["strict"], body["faults"]) == (False, ["te"], [f"strict {TE}: missing"])
    assert {row["section"] for row in body["rows"]} == {"package", "device", "backend", "setting"}
    for row in body["rows"]:
        assert set(row) == {"section", "name", "status", "version", "detail", "remedy", "facts"}
        assert row["status"] in list(Status)


@pytest.mark.parametrize("names", [["torch"], ["loop", "flax"], ["torch.grouped_matmul.loop"], ["grouped_matmul.loop"]])
def test_command_strict_names_that_are_ok_exit_0(doctor, names):
    code, out, _ = doctor(healthy(), "--strict", *names)
    assert code == 0 and f"ok as asked: {', '.join(names)}" in out


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (without(healthy(), "torch"), "torch"),
        (healthy(versions=healthy().versions | {"torch": "2.9"}), "torch"),
        (with_backend(unbuilt=True), "te"),
        (with_backend(states={"cpu float32": "needs a GPU"}), "te"),
        (without(healthy(), "torch"), "grouped_mm"),  # nobody is left who knows the name
    ],
    ids=["missing", "old", "unbuilt", "unsupported", "unasked"],
)
def test_command_strict_name_that_is_not_ok_exits_1(doctor, machine, name):
    code, out, _ = doctor(machine, "--strict", name)
    assert code == 1 and name in out.splitlines()[-1] + out.splitlines()[-2]


def test_command_strict_unknown_name_exits_2_and_lists_the_names(doctor):
    code, out, err = doctor(healthy(), "--strict", "loop", "oop")
    assert code == 2 and out == ""
    asked, known, do = err.splitlines()
    assert asked == "asked: moebius doctor --strict oop"
    assert known.startswith("found: ") and "torch.grouped_matmul.loop" in known and "numpy" in known
    assert do.startswith("do: ")


@pytest.mark.parametrize(
    "arguments", [["--timeout", "0"], ["--timeout", "nan"], ["--json", "--markdown"], ["--nothing"]]
)
def test_command_arguments_that_do_not_parse_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2 and capsys.readouterr().out == ""


def test_command_markdown_without_a_framework_says_what_brings_it(doctor, monkeypatch):
    answers = {"torch": Answer(facts={"support": []}), "jax": Answer(errors={"support": "jax is not installed"})}
    monkeypatch.setattr(command, "ask_support", lambda timeout: answers)
    code, out, err = doctor(healthy(), "--markdown")
    assert code == 2 and out == "" and "jax is not installed" in err and "'.[jax]'" in err


# ------------------------------------------------------------------------------------------------------- the whole road
def run(*arguments, **environment):
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-m", "moebius.compare", "doctor", *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_command_line_finds_both_frontends_here():
    done = run("--json", "--strict", "torch", "jax", "flax", "loop", "local")
    body = json.loads(done.stdout)
    assert (done.returncode, done.stderr, body["faults"]) == (0, "", [])
    rows = {(row["section"], row["name"]): row for row in body["rows"]}
    for name in ("torch.grouped_matmul.grouped_mm", "jax.grouped_matmul.loop"):
        assert rows["backend", name]["facts"]["states"]["cpu float32"] == "chosen"
    for name in ("torch, float32 products", "jax, float32 products", "jax, x64"):
        assert rows["setting", name]["detail"]
    assert rows["device", "jax after torch"]["status"] == "ok"


@pytest.fixture(scope="module")
def core_alone(tmp_path_factory):
    """A path on which no framework and nothing of `moebius compare` can be imported."""
    home = tmp_path_factory.mktemp("blocked")
    blocked = (*FRAMEWORKS, *(package.name for package in PACKAGES if package.extra), "jax_plugins")
    (home / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(home), *(entry for entry in sys.path if entry)])}


def test_command_line_answers_with_core_alone(core_alone):
    done = run(**core_alone)
    assert (done.returncode, done.stderr) == (0, "")
    states = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 1}
    assert states["moebius"] == states["numpy"] == "ok"
    assert {states[package.name] for package in PACKAGES if package.extra} == {"missing"}
    assert states["torch_frontend"] == states["jax_frontend"] == "missing"
    assert "pip install '.[jax]'" in done.stdout and done.stdout.splitlines()[-1].startswith("verdict: nothing is")


def test_command_line_with_core_alone_is_strict_too(core_alone):
    done = run("--json", "--strict", "numpy", "grouped_mm", **core_alone)
    (fault,) = json.loads(done.stdout)["faults"]
    assert done.returncode == 1 and "grouped_mm" in fault and "torch_frontend" in fault


def test_entry_sends_doctor_on_before_it_asks_for_packages(monkeypatch, capsys):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "examine", lambda timeout: SETTINGS["multiprocessing"])
    monkeypatch.setattr(sys, "argv", ["moebius", "doctor"])
    assert entry.main() == 0
    assert "verdict: nothing is broken" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["moebius", "--help"])
    assert entry.main() == 0 and "moebius doctor" in capsys.readouterr().out
