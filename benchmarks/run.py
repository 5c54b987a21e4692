"""Runs rows one after the other and keeps what was measured in a file, so that a run can stop and go on."""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

import dla_kernels
from dla.benchmarks import blocks, depth, launches, measure, models, ops
from dla.benchmarks.measure import Row

#: The questions, in the order in which they are asked.
QUESTIONS = {
    "ops": ops.rows,
    "blocks": blocks.rows,
    "models": models.rows,
    "depth": depth.rows,
    "launches": launches.rows,
}
#: Seconds for the rounds of a row, in a short run and in a full one.
BUDGET_S, FULL_BUDGET_S = 1.5, 5.0


def rows_of(
    questions: Sequence[str],
    device: torch.device,
    full: bool = False,
    ops: Sequence[str] = (),
    models: Sequence[str] = (),
) -> list[Row]:
    """The rows of some questions, by default of all, or of those that the ops and models given belong to.

    Raises:
        ValueError: an unknown question, op or model.
    """
    for question in questions:
        if question not in QUESTIONS:
            raise ValueError(f"`question` must be one of {', '.join(QUESTIONS)}, got {question!r}")
    given = {name: {name: names} for name, names in (("ops", ops), ("models", models)) if names}
    asked = list(questions) or list(given or QUESTIONS)
    return [row for question in asked for row in QUESTIONS[question](device, full, **given.get(question, {}))]


def find_device(name: str) -> torch.device:
    """ "auto" takes a GPU where there is one.

    Raises:
        ValueError: there is no such device; says which there are.
    """
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda:0" if len(present) > 1 else "cpu")
    if name not in (*present, "cuda") or (name == "cuda" and len(present) == 1):
        raise ValueError(f"`device` must be auto or one of {', '.join(present)}, got {name!r}")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def slug(device: torch.device) -> str:
    """The device's name as a folder's."""
    return re.sub(r"\W+", "-", device_name(device).lower()).strip("-")


def environment(device: torch.device, command: str = "dla bench") -> dict[str, str]:
    """What a result depends on beside the rows themselves."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    found = {
        "device": device_name(device),
        "dla-kernels": dla_kernels.__version__,
        "commit": commit or _build_info().get("commit", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }
    if device.type == "cuda":
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return found | {k: v for k, v in _build_info().items() if k in ("compiler", "instruction_set", "cuda")}


def _build_info() -> dict[str, str]:
    try:
        return dla_kernels.build_info()
    except RuntimeError as error:
        return {"compiler": f"none: {error}"}


class Run:
    """A run's results, written after every row.

    Attributes:
        results: ``environment``, ``limits`` and ``rows``, as they stand in the file.
    """

    def __init__(self, path: Path, device: torch.device, resume: bool = False, command: str = "dla bench"):
        """Raises ValueError where a run that is to go on was another device's or version's."""
        self.path, self.device = path, device
        self.results = {"environment": environment(device, command), "limits": None, "rows": []}
        if resume and path.exists():
            before = json.loads(path.read_text())
            for name in ("device", "dla-kernels", "commit", "torch"):
                was, now = before["environment"][name], self.results["environment"][name]
                if was != now:
                    raise ValueError(f"`resume`: {path} is of {name} {was}, this is {now}")
            self.results = before

    def measure(self, rows: Iterable[Row], budget_s: float, on_row: Callable[[Row], None] = lambda row: None) -> None:
        """Measures the rows that are not there yet; ``on_row`` hears of each before it."""
        if self.results["limits"] is None:
            self.results["limits"] = measure.limits(self.device)
            self.save()
        done = {row["name"] for row in self.results["rows"] if "error" not in row}
        for row in rows:
            on_row(row)
            if row.name in done:
                continue
            self.results["rows"] = [r for r in self.results["rows"] if r["name"] != row.name]
            self.results["rows"].append(self.one(row, budget_s))
            self.save()

    def one(self, row: Row, budget_s: float) -> dict:
        found = {"question": row.question, "name": row.name, "labels": row.labels, "base": row.base}
        try:
            prepared = row.prepare(self.device)
        except measure.Wrong as error:
            return found | {"error": str(error)}
        samples = measure.interleaved(prepared.rivals, self.device, budget_s)
        times = {name: measure.percentiles(s) for name, s in samples.items()}
        return found | {"seconds": times, "facts": prepared.facts}

    def save(self) -> None:
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(whole, self.path)
