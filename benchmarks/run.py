"""Runs rows one after the other and keeps what was measured in a file, so that a run can stop and go on."""

import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import dla_kernels
from dla.benchmarks import blocks, depth, floors, launches, measure, models, ops
from dla.benchmarks.measure import MACHINE, Row
from dla.benchmarks.readings import doubt
from dla.memory import keep_memory
from dla_kernels import native

#: The questions, in the order in which they are asked.
QUESTIONS = {
    "ops": ops.rows,
    "blocks": blocks.rows,
    "models": models.rows,
    "depth": depth.rows,
    "launches": launches.rows,
    "floors": floors.rows,
}
#: Seconds for the rounds of a row, in a short run and in a full one.
BUDGET_S, FULL_BUDGET_S = 0.8, 5.0
#: The share of a run's time in which doubtful rows may be measured again.
AGAIN = 0.05


def rows_of(
    questions: Sequence[str],
    device: torch.device,
    full: bool = False,
    ops: Sequence[str] = (),
    models: Sequence[str] = (),
    only: str = "",
) -> list[Row]:
    """The rows of some questions, by default of all, or of those that the ops and models given belong to; of these the
    ones in whose name ``only`` stands.

    Raises:
        ValueError: an unknown question, op or model, or an op or model beside questions that it does not belong to; no
            row of such a name.
    """
    for question in questions:
        if question not in QUESTIONS:
            raise ValueError(f"`question` must be one of {', '.join(QUESTIONS)}, got {question!r}")
    given = {name: {name: names} for name, names in (("ops", ops), ("models", models)) if names}
    asked = list(questions) or list(given or QUESTIONS)
    for question in given:
        if question not in asked:
            raise ValueError(
                f"`{question.removesuffix('s')}` belongs to the question {question}, which is not among "
                f"{', '.join(asked)}"
            )
    rows = [row for question in asked for row in QUESTIONS[question](device, full, **given.get(question, {}))]
    found = [row for row in rows if only in row.name]
    if rows and not found:
        raise ValueError(f"`only` must stand in a row's name, such as {rows[0].name!r}, got {only!r}")
    return found


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


def environment(device: torch.device, command: str = "dla bench", kept_memory: bool = False) -> dict[str, str]:
    """What a result depends on beside the rows themselves."""
    found = {
        "device": device_name(device),
        "dla-kernels": dla_kernels.__version__,
        "commit": native.commit()[:12] + "-dirty" * native.commit().endswith("-dirty"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "memory": "kept between calls" if kept_memory or device.type == "cuda" else "as the C library hands it out",
    }
    if device.type == "cuda":
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    try:
        info = dla_kernels.build_info()
    except RuntimeError as error:
        info = {"compiler": f"none: {error}"}
    return found | {k: v for k, v in info.items() if k in ("compiler", "instruction_set", "cuda")}


def load(path: Path) -> dict:
    """A run's results.

    Raises:
        ValueError: the file is not there or not of a run.
    """
    try:
        results = json.loads(path.read_text())
        results["environment"]["device"], results["limits"]
        for row in results["rows"]:
            row["name"], row.get("error") or (row["seconds"], row["over_ours"], row["facts"], row["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of `dla bench` ({type(error).__name__}: {error})") from error
    return results


class Failed(Exception):
    """Why a row could not be measured."""


@dataclass
class Sampled:
    """Seconds a call of a row's rivals, see :func:`measure.interleaved`, why some failed, and the row's facts."""

    samples: dict[str, list[float]]
    failed: dict[str, str]
    facts: dict[str, float]


class Run:
    """A run's results, written after every row.

    Attributes:
        results: ``environment``, ``limits`` and ``rows``, as they stand in the file.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        resume: bool = False,
        command: str = "dla bench",
        kept_memory: bool = False,
    ):
        """Raises ValueError where a run that is to go on is damaged, or of another device, version or setting."""
        self.path, self.device, self.kept_memory = path, device, kept_memory
        self.results = {"environment": environment(device, command, kept_memory), "limits": None, "rows": []}
        if resume and path.exists():
            before = load(path)
            now = self.results["environment"]
            for name in ("device", "dla-kernels", "commit", "torch", "memory"):
                was = before["environment"].get(name)
                if was != now[name]:
                    raise ValueError(f"`resume`: {path} is of {name} {was}, this is {now[name]}")
            commands = before["environment"]["command"].split("; ")
            before["environment"]["command"] = "; ".join(dict.fromkeys([*commands, command]))
            self.results = before

    @property
    def previous(self) -> Path:
        """Where the run goes that stood in the file before this one."""
        return self.path.with_suffix(".previous.json")

    def measure(
        self, rows: Sequence[Row], budget_s: float, on_row: Callable[[int, str], None] = lambda *_: None
    ) -> None:
        """Measures the rows that are not there yet; ``on_row`` hears how many are done, and which comes now.

        Then once more those that met another machine than most, or one that did other work, as far as time allows: a
        machine that is shared copies memory at one time twice as fast as at another, and what is bound by it in one
        rival is in another not.
        """
        begin = time.monotonic()
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            if self.results["limits"] is None:
                self.results["limits"] = measure.limits(self.device)
                if self.path.exists():
                    os.replace(self.path, self.previous)
                self.save()
            done = {row["name"] for row in self.results["rows"] if "error" not in row}
            for i, row in enumerate(rows):
                on_row(i, row.name)
                if row.name not in done:
                    self.keep(self.one(row, budget_s))
            until = time.monotonic() + AGAIN * (time.monotonic() - begin)
            for row in self.doubtful(rows):
                if time.monotonic() < until:
                    on_row(len(rows), f"again: {row.name}")
                    self.keep(self.one(row, budget_s))

    def doubtful(self, rows: Sequence[Row]) -> list[Row]:
        """Those to be measured again, the worst first."""
        found = self.results["rows"]
        doubts = {row["name"]: doubt(row, found) for row in found}
        return sorted((row for row in rows if doubts[row.name] > 1), key=lambda row: -doubts[row.name])

    def keep(self, found: dict) -> None:
        """Keeps what was measured; of a row that is there already, what is less in doubt."""
        rows = self.results["rows"]
        was = next((row for row in rows if row["name"] == found["name"]), None)
        if was is None:
            rows.append(found)
        elif "error" in was or ("error" not in found and doubt(found, rows) < doubt(was, rows)):
            rows[rows.index(was)] = found
        self.save()

    def one(self, row: Row, budget_s: float) -> dict:
        """What was measured, or the error that kept a row from being measured: the others do not suffer from it."""
        found = {"question": row.question, "name": row.name, "labels": row.labels, "base": row.base}
        try:
            if row.processes and self.device.type == "cpu":
                parts = [self.in_process(row, budget_s) for _ in range(row.processes)]
            else:
                parts = [sampled(row, self.device, budget_s)]
        except Failed as error:
            return found | {"error": str(error)}
        return found | together(parts)

    def in_process(self, row: Row, budget_s: float) -> Sampled:
        """What :func:`sampled` gives in a new process, one of the row's."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])  # no more: there, this folder comes before the installed packages
        here, there = context.Pipe(duplex=False)
        arguments = there, torch.get_num_threads(), self.kept_memory, row, self.device, budget_s, row.processes
        process = context.Process(target=_send_sampled, args=arguments)
        process.start()
        there.close()
        try:
            got = here.recv()
        except EOFError:
            process.join()
            got = Failed(f"its process ended with exit code {process.exitcode}")
        finally:
            process.kill()
            process.join()
        if isinstance(got, Failed):
            raise got
        return got

    def save(self) -> None:
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(whole, self.path)


def sampled(row: Row, device: torch.device, budget_s: float, processes: int = 1) -> Sampled:
    """The rounds that fall to one of so many processes.

    Raises:
        Failed: ours or the base could not be measured.
    """
    try:
        prepared = row.prepare(device)
        rivals = prepared.rivals | {MACHINE: measure.large_copy(device)}
        samples, failed = measure.interleaved(rivals, device, budget_s, processes)
    except measure.Wrong as error:
        raise Failed(f"WRONG: {error}") from error
    except Exception as error:
        raise Failed(measure.reason(error)) from error
    if row.base in failed:
        raise Failed(f"{row.base}: {failed[row.base]}")
    return Sampled(samples, failed, prepared.facts)


def together(parts: Sequence[Sampled]) -> dict:
    """The results of a row by the rounds of all its processes; a rival that failed in one of them has none."""
    failed = {name: why for part in parts for name, why in part.failed.items()}
    names = [name for name in parts[0].samples if name not in failed]
    samples = {name: [s for part in parts for s in part.samples[name]] for name in names}
    times = {name: measure.percentiles(s) for name, s in samples.items()}
    found = {"seconds": times, "over_ours": measure.over_ours(samples), "facts": parts[0].facts}
    return found | ({"failed": failed} if failed else {})


def _send_sampled(to: Connection, threads: int, kept_memory: bool, *of_sampled) -> None:
    """Sends what :func:`sampled` gives, or raises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's own process hears it and ends this one
    torch.set_num_threads(threads)
    if kept_memory:
        keep_memory()
    try:
        to.send(sampled(*of_sampled))
    except Failed as error:
        to.send(error)
