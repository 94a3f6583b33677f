"""What the doctor finds: rows, and the report that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """What a row says."""

    OK = "ok"
    MISSING = "missing"  # not installed
    UNBUILT = "unbuilt"  # a name that this version of moebius does not have yet
    UNSUPPORTED = "unsupported"  # there, but it can serve nothing on this machine
    WARNING = "warning"  # works, and may surprise
    BROKEN = "broken"  # installed, and does not work


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One finding.

    Attributes:
        section: "package", "device", "backend" or "setting".
        name: a backend's is "frontend.operation.name".
        status: what is said.
        version: of a package. detail: what was found, in words. remedy: what to do, "" where nothing has to be done.
        facts: what the words were made from, for a program.
    """

    section: str
    name: str
    status: Status
    version: str = ""
    detail: str = ""
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Every finding.

    Attributes:
        moebius: its version. rows: in the order of the sections. seconds: what it took.
        strict: names of packages and backends that have to be ok.
    """

    moebius: str
    rows: tuple[Row, ...]
    strict: tuple[str, ...] = ()
    seconds: float = 0.0

    def named(self, name: str) -> list[Row]:
        """The packages and backends of that name; a backend's may be shortened from the left to whole words."""
        asked = [row for row in self.rows if row.section in ("package", "backend")]
        return [row for row in asked if row.name == name or row.name.endswith(f".{name}")]

    def known(self, name: str) -> bool:
        """Whether there is such a name, or there might be in a frontend that could not be asked."""
        return bool(self.named(name)) or bool(self.unasked)

    @property
    def unasked(self) -> list[Row]:
        """The frontends whose backends are not known, because they could not be imported."""
        return [row for row in self.rows if row.section == "backend" and "." not in row.name]

    @property
    def faults(self) -> list[str]:
        """What makes `passed` false, in words."""
        found = [f"{row.section} {row.name}: broken" for row in self.rows if row.status == Status.BROKEN]
        for name in self.strict:
            rows = self.named(name)
            if not rows:
                found.append(f"strict {name}: not among the packages, and {self._unasked_names()} could not be asked")
            found += [f"strict {row.name}: {row.status}" for row in rows if row.status != Status.OK]
        return found

    @property
    def passed(self) -> bool:
        """Nothing is broken, and everything named in `strict` is ok."""
        return not self.faults

    def to_json(self) -> str:
        """The report as JSON, `passed` and `faults` included."""
        return json.dumps({**asdict(self), "passed": self.passed, "faults": self.faults}, indent=2)

    def _unasked_names(self) -> str:
        return " and ".join(row.name for row in self.unasked)
