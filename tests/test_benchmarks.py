"""The benchmarks' own machinery: what is measured in which order, kept, resumed, compared, drawn and quoted."""

import copy
import functools
import importlib
import io
import itertools
import json
import math
import mmap
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dla import cli
from dla.benchmarks import (
    blocks,
    choice,
    depth,
    floors,
    launches,
    measure,
    models,
    networks,
    ops,
    readings,
    report,
    run,
)
from dla.benchmarks.measure import Prepared, Row, Wrong
from dla_kernels import native

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
#: What is asked of a GPU, on shapes for this machine.
SMALL_FLOORS = {
    "map": (2, 32, 4, 4),
    "layers": (12, 23),
    "batch": 2,
    "channels": {64: 4},
    "networks": {
        "resnet20_dla_l": (2, 16, "plain", 1.15, "x the time"),
        "resnet20_dla_b": (2, 16, "literal", 8, "x as fast"),
    },
}


def make_row(name, prepare, question="blocks"):
    return Row(question, {"stage": name, "interaction": "dla_l", "": "train step"}, "plain", prepare)


def sleepers(device):
    return Prepared({"fused": lambda: None, "plain": lambda: None}, {"bytes": 8})


@pytest.fixture(autouse=True)
def each_row_once(monkeypatch):
    """On a busy machine any row may be in doubt."""
    monkeypatch.setattr(run, "AGAIN", 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A small run of every question, on small shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SHAPES", {"cpu": ([(2, 32, 4, 4), (1, 32, 2, 3)], [])})
        patch.setattr(blocks, "SHAPES", {"cpu": ([(2, 32, 4)], [])})
        patch.setattr(depth, "SHAPES", {"cpu": (2, 32, 4)})
        patch.setattr(depth, "DEPTHS", (2, 4))
        patch.setattr(ops, "BEYOND_CACHE", 2 * 32 * 4 * 4 * 4)
        patch.setattr(measure, "BEYOND_CACHES", 2**16)
        patch.setattr(measure, "LARGE", {"cpu": (2**20, 64)})
        patch.setattr(models, "SHORT", ("resnet20_dla_l",))
        patch.setitem(models.MODELS["cpu"], "resnet20_dla_l", (2, 32))
        patch.setattr(floors, "SIZES", {"cpu": SMALL_FLOORS})
        patch.setattr(measure, "MIN_ROUNDS", 2)
        patch.setattr(measure, "SAMPLE_S", 1e-3)
        patch.setattr(torch, "compile", lambda f: f)
        session = run.Run(tmp_path_factory.mktemp("run") / "bench.json", CPU)
        session.measure(run.rows_of([], CPU), 0)
    return session.results


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Known beforehand, as to measure them takes seconds; ``results`` has this machine's."""
    found = {"copy_bytes_per_s": 1e10, "read_bytes_per_s": 1e10, "flops_per_s": 1e11}
    monkeypatch.setattr(measure, "limits", lambda device: found)


def test_rivals_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_S", 0)
    seen = []
    samples, failed = measure.interleaved({name: lambda n=name: seen.append(n) for name in "ab"}, CPU, 0)
    assert not failed
    warm = 2  # rounds before
    assert "".join(seen) == "ab" * (warm + measure.MIN_ROUNDS)
    assert [len(s) for s in samples.values()] == [measure.MIN_ROUNDS] * 2


def test_warm_up_lasts_until_the_memory_is_there(monkeypatch):
    taken = iter([0, 5, 5, 5, 5, 6, 6, 6, 6, 6])  # before and after a round: new memory in the first and in the third
    monkeypatch.setattr(measure, "new_memory", lambda: next(taken) * 2**20)
    monkeypatch.setattr(measure, "NEW_MEMORY", 0)
    seen = []
    measure.warm_up({name: lambda n=name: seen.append(n) for name in "ab"}, CPU)
    assert "".join(seen) == "ab" * 5
    always = iter(range(100))
    monkeypatch.setattr(measure, "new_memory", lambda: next(always))
    seen.clear()
    measure.warm_up({"a": lambda: seen.append("a")}, CPU)
    assert len(seen) == measure.MAX_WARM_UP


def test_new_memory_is_seen():
    before = measure.new_memory()
    mmap.mmap(-1, 2**24).write(b"1" * 2**24)
    assert 2**24 <= measure.new_memory() - before < 2**27


def fail():
    raise RuntimeError("no compiler\nat all")


def test_rival_that_fails_is_left_out_and_named(tmp_path):
    once = itertools.chain([lambda: None], itertools.repeat(fail))
    rivals = {"fused": lambda: None, "compiled": fail, "plain": lambda: None, "later": lambda: next(once)()}
    samples, failed = measure.interleaved(rivals, CPU, 0)
    assert list(samples) == ["fused", "plain"]
    assert failed == dict.fromkeys(["compiled", "later"], "RuntimeError: no compiler")
    session = run.Run(tmp_path / "bench.json", CPU)
    rows = [
        make_row("one", lambda device: Prepared({"fused": lambda: None, "plain": lambda: None, "literal": fail})),
        make_row("no base", lambda device: Prepared({"fused": lambda: None, "plain": fail})),
        make_row("not ours", lambda device: Prepared({"fused": fail, "plain": lambda: None})),
    ]
    session.measure(rows, 0)
    one, *others = session.results["rows"]
    assert one["failed"] == {"literal": "RuntimeError: no compiler"}
    assert report.cells([one], "blocks")[0][2][0][-1] == "failed"
    assert report.notes(session.results)[-1] == "literal failed: RuntimeError: no compiler"
    assert [row["error"] for row in others] == ["plain: RuntimeError: no compiler", "RuntimeError: no compiler"]


def test_ratio_is_that_of_a_round():
    """A machine that is twice as slow in every second round changes nothing."""
    samples = {"ours": [1, 2, 1, 2, 1], "rival": [3, 6, 3, 6, 3]}
    assert measure.over_ours(samples) == {"ours": 1, "rival": 3}


def test_arguments_come_from_memory():
    assert measure.sets_of(0) == 1
    assert measure.sets_of(measure.BEYOND_CACHES) == 1
    assert measure.sets_of(measure.BEYOND_CACHES // 4) == 4
    assert measure.sets_of(1) == measure.MAX_SETS
    turn = measure.rotating([lambda: 1, lambda: 2])
    assert [turn() for _ in range(3)] == [1, 2, 1]


def test_results_go_to_memory():
    """Each of three sets' results lies elsewhere than those of the two before it, which then are let go."""
    turn = measure.rotating([functools.partial(torch.empty, 2**20) for _ in range(3)])
    results = [weakref.ref(turn()) for _ in range(5)]
    assert [result() is None for result in results] == [True, True, True, False, False]
    alone = weakref.ref(measure.rotating([functools.partial(torch.empty, 1)])())
    assert alone() is None


def test_percentiles():
    assert measure.percentiles(range(1, 102)) == {"p20": 21, "p50": 51, "p80": 81, "rounds": 101}


def test_run_keeps_every_row_and_goes_on(tmp_path):
    path, prepared = tmp_path / "bench.json", []

    def prepare(name):
        def inner(device):
            prepared.append(name)
            if name == "stop" and prepared.count("stop") == 1:
                raise KeyboardInterrupt
            return sleepers(device)

        return inner

    rows = [make_row(name, prepare(name)) for name in ("first", "stop", "last")]
    with pytest.raises(KeyboardInterrupt):
        run.Run(path, CPU).measure(rows, 0)
    assert [r["labels"]["stage"] for r in json.loads(path.read_text())["rows"]] == ["first"]
    run.Run(path, CPU, resume=True).measure(rows, 0)
    assert prepared == ["first", "stop", "stop", "last"]
    assert [r["labels"]["stage"] for r in json.loads(path.read_text())["rows"]] == ["first", "stop", "last"]


def test_doubtful_rows_are_measured_again(tmp_path, monkeypatch):
    """Once, the worst first; of both results the less doubtful one stays, in its place."""
    # Seconds of a copy, and how far our time and the base's spread; None where measuring fails.
    usual = (10, 0, 0)
    takes = {
        "usual": [usual], "near": [(11, 0.05, 0.05)], "fast": [(6, 0, 0), usual], "slow": [(14, 0, 0), (15, 0, 0)],
        "gone": [(20, 0, 0), None], "restless": [(10, 0.15, 0), (10, 0.02, 0)], "base": [(10, 0, 0.18), (10, 0, 0.19)],
        "twin": [usual],
    }  # fmt: skip
    prepared, heard = [], []

    def prepare(name):
        def inner(device):
            prepared.append(name)
            return sleepers(device)

        return inner

    def sampled(row, device, budget_s):
        row.prepare(device)
        take = takes[row.labels["stage"]].pop(0)
        if take is None:
            raise run.Failed("no memory")
        return take

    def together(parts):
        [(copy_s, ours, base)] = parts
        times = {name: {"p20": 1 - s, "p50": 1, "p80": 1 + s} for name, s in {"fused": ours, "plain": base}.items()}
        times[measure.MACHINE] = measure.percentiles([copy_s])
        return {"seconds": times, "over_ours": {"fused": 1, "plain": 1}, "facts": {}}

    first_takes = {name: list(both) for name, both in takes.items()}
    monkeypatch.setattr(run, "sampled", sampled)
    monkeypatch.setattr(run, "together", together)
    monkeypatch.setattr(run, "AGAIN", 1e9)
    rows = [make_row(name, prepare(name)) for name in takes]
    run.Run(tmp_path / "bench.json", CPU).measure(rows, 0, lambda *row: heard.append(row))
    kept = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert prepared == [*takes, "gone", "fast", "slow", "base", "restless"]
    assert [row["labels"]["stage"] for row in kept] == list(takes)
    assert [row["seconds"][measure.MACHINE]["p50"] for row in kept] == [10, 11, 10, 14, 20, 10, 10, 10]
    assert [round(readings.unrest(row), 9) for row in kept] == [0, 0.05, 0, 0, 0, 0.02, 0.18, 0]
    assert [done for done, _ in heard] == [*range(8), *[8] * 5]
    assert heard[-1][1] == "again: " + rows[5].name
    monkeypatch.setattr(run, "AGAIN", 0)  # no time for it
    takes.update(first_takes)
    session = run.Run(tmp_path / "short.json", CPU)
    session.measure(rows, 0)
    notes = report.notes(session.results)
    assert "3 of 8 rows met a machine that copied over 15% faster or slower." in notes
    assert "2 of 8 rows spread by more than 10%: the machine was busy." in notes


class Ends:
    """What ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (7,)


THREADS = """import torch
from dla.benchmarks.measure import Prepared

def prepare(device):
    return Prepared({"fused": torch.get_num_threads, "plain": int}, {"threads": torch.get_num_threads()})
"""


def test_row_has_processes_of_its_own(tmp_path, monkeypatch):
    assert {row.processes for row in run.rows_of(["blocks"], CPU)} == {1}
    rows = run.rows_of(["models"], CPU)
    assert {row.name: row.processes for row in rows} == {
        row.name: 2 if row.labels["model"] in models.GOALS["cpu"] else 1 for row in rows
    }
    judged = [row for row in rows if row.processes == 2]
    small = functools.partial(models.prepare, "resnet20_dla_l", 2, 32, "inference", False, False)
    monkeypatch.setattr(models, "build", fail)  # here alone
    session = run.Run(tmp_path / "bench.json", CPU)
    unknown = functools.partial(models.prepare, "resnet20_none", 2, 32, "inference", False, False)
    (tmp_path / "threads.py").write_text(THREADS)
    monkeypatch.syspath_prepend(tmp_path)
    prepare = small, Ends(), unknown, importlib.import_module("threads").prepare
    session.measure([replace(row, prepare=what) for row, what in zip(judged, prepare, strict=False)], 0)
    measured, ended, unknown, counted = session.results["rows"]
    assert measured["seconds"]["fused"]["p50"] > 1e-4
    assert measured["seconds"]["fused"]["rounds"] == 2 * math.ceil(measure.MIN_ROUNDS / 2)
    assert ended["error"] == "its process ended with exit code 7"
    assert unknown["error"].startswith("ValueError: `name` must be one of")
    assert counted["facts"] == {"threads": torch.get_num_threads()} == {"threads": 1}


def test_processes_are_taken_together():
    """By their rounds; what failed in one of them has no time."""
    first = run.Sampled({"fused": [1.0, 1.0], "plain": [2.0, 2.0], "other": [5.0, 5.0]}, {}, {"goal": 3})
    second = run.Sampled({"fused": [2.0, 4.0, 8.0], "plain": [6.0, 12.0, 24.0]}, {"other": "no room"}, {"goal": 3})
    found = run.together([first, second])
    assert found["seconds"]["fused"]["p50"] == 2
    assert found["over_ours"] == {"fused": 1, "plain": 3}
    assert found["failed"] == {"other": "no room"}
    assert found["facts"] == {"goal": 3}
    assert run.together([first])["over_ours"] == {"fused": 1, "plain": 2, "other": 5}


def test_a_new_run_keeps_the_one_before(tmp_path):
    path = tmp_path / "bench.json"
    for name in ("first", "second"):
        session = run.Run(path, CPU)
        session.measure([make_row(name, sleepers)], 0)
    assert json.loads(session.previous.read_text())["rows"][0]["labels"]["stage"] == "first"
    assert json.loads(path.read_text())["rows"][0]["labels"]["stage"] == "second"


def test_resume_names_all_commands(tmp_path):
    path = tmp_path / "bench.json"
    for command in ("dla bench ops", "dla bench blocks", "dla bench ops"):
        session = run.Run(path, CPU, resume=True, command=command)
        session.measure([make_row(command, sleepers)], 0)
    assert run.load(path)["environment"]["command"] == "dla bench ops; dla bench blocks"


def test_resume_refuses_a_damaged_run(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"bench.json holds no results of `dla bench` \(JSONDecodeError"):
        run.Run(path, CPU, resume=True)


def test_commit_is_that_of_the_installed_package(monkeypatch):
    monkeypatch.setattr(run.native, "commit", lambda: "0123456789abcdef" * 2 + "01234567-dirty")
    assert run.environment(CPU)["commit"] == "0123456789ab-dirty"


def test_resume_refuses_another_commit(tmp_path):
    path = tmp_path / "bench.json"
    run.Run(path, CPU).measure([], 0)
    text = json.loads(path.read_text())
    text["environment"]["commit"] = "other"
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"`resume`: .*bench.json is of commit other, this is "):
        run.Run(path, CPU, resume=True)


def test_no_number_on_a_wrong_op(tmp_path, monkeypatch):
    right = ops.OPS["norm_residual"]

    def build(maps, vectors, b, c, backend, training):
        call, arguments = right.build(maps, vectors, b, c, backend, training)
        factor = 1.001 if backend == "native" else 1
        return lambda *a: [out * factor for out in call(*a)], arguments

    monkeypatch.setitem(ops.OPS, "norm_residual", right._replace(build=build))
    monkeypatch.setattr(ops, "SHAPES", {"cpu": ([(2, 32, 4, 4)], [])})
    monkeypatch.setattr(ops, "available", lambda device: ("native",))
    session = run.Run(tmp_path / "bench.json", CPU)
    session.measure(run.rows_of([], CPU, ops=["norm_residual"]), 0)
    for row in session.results["rows"]:
        assert "WRONG: native: result 0 is off by 1.0e-03" in row["error"]
        assert "seconds" not in row
    assert "WRONG: native" in report.markdown(session.results, [])
    assert all(len(table.rows) == 3 for table in report.tables(session.results))
    report.write(session.results, tmp_path)


def test_a_row_that_fails_does_not_end_the_run(tmp_path):
    def fail(device):
        raise torch.OutOfMemoryError("no room\nfor it")

    session = run.Run(tmp_path / "bench.json", CPU)
    session.measure([make_row("first", fail), make_row("second", sleepers)], 0)
    first, second = session.results["rows"]
    assert first["error"] == "OutOfMemoryError: no room"
    assert "seconds" in second


@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
def test_wrong_backward_is_seen(monkeypatch):
    module = importlib.import_module("dla_kernels.ops.norm_residual.function")
    right = module.BACKENDS["native"]

    def shifted(*args):
        grad_x, grad_o = right.backward(*args)
        return grad_x, grad_o + 1e-3 * grad_o.std()

    what = ops.OPS["norm_residual"], (3, 32, 4, 4), torch.float32, "NCHW", CPU, ("native",), True
    assert ops.wrong(*what) is None
    ops.wrong.cache_clear()
    monkeypatch.setitem(module.BACKENDS, "native", SimpleNamespace(**{**right.__dict__, "backward": shifted}))
    assert "native: result" in ops.wrong(*what)
    ops.wrong.cache_clear()


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("layout", ops.LAYOUTS)
def test_right_ops_pass_in_every_dtype_and_layout(dtype, layout):
    """A false alarm would take the numbers of a right op away."""
    for name, op in ops.OPS.items():
        for training in (True, False)[: 1 if op.inference is None else 2]:
            what = op, (2, 64, 8, 8), ops.DTYPES[dtype], layout, CPU, ops.available(CPU), training
            assert ops.wrong(*what) is None, name


@pytest.mark.parametrize("task", networks.TASKS)
def test_wrong_network_gets_no_number(monkeypatch, task):
    stage = blocks.build(32, "dla_l", 2)
    networks.check(stage, torch.randn(2, 32, 4, 4), task)
    monkeypatch.setattr(networks.literal, "light_stage", lambda stage, x: x)
    with pytest.raises(Wrong, match="its output differs from the literal form's by"):
        networks.check(stage, torch.randn(2, 32, 4, 4), task)


@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
@pytest.mark.parametrize(("dtype", "words"), [(torch.float64, "its gradient differs"), (torch.float32, "in float32")])
def test_network_on_a_wrong_kernel_gets_no_number(monkeypatch, dtype, words):
    """A backward that is wrong, and a forward that is wrong in the dtype that is measured alone."""
    module = importlib.import_module("dla_kernels.ops.norm_residual.function")
    right = module.BACKENDS["native"]
    name = "backward" if dtype == torch.float64 else "forward"

    def wrong(*arguments):
        results = getattr(right, name)(*arguments)
        return tuple(r * 1.001 if r.dim() == 4 and r.dtype == dtype else r for r in results)

    planted = SimpleNamespace(**{**right.__dict__, name: wrong})
    monkeypatch.setitem(module.BACKENDS, "native", planted)
    with pytest.raises(Wrong, match=words):
        networks.check(blocks.build(32, "dla_l", 2), torch.randn(2, 32, 4, 4), "train step")


def test_every_question_is_measured_and_drawn(results, tmp_path):
    assert {row["question"] for row in results["rows"]} == set(run.QUESTIONS)
    assert not [row["error"] for row in results["rows"] if "error" in row]
    assert all(value > 1e6 for value in results["limits"].values())
    assert set(results["limits"]) >= {"copy_bytes_per_s", "read_bytes_per_s", "fresh_copy_bytes_per_s", "flops_per_s"}
    assert {row["labels"]["op"] for row in results["rows"] if row["question"] == "ops"} == set(ops.OPS)
    paths = report.write(results, tmp_path)
    assert {p.name for p in paths} == {"bench.md", "roofline.png", "speedup.png", "depth.png"}
    only_ops = {**results, "rows": [row for row in results["rows"] if row["question"] == "ops"]}
    report.write(only_ops, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"bench.md", "roofline.png"}  # not an earlier run's pictures
    report.write(results, tmp_path)
    assert all(p.stat().st_size > 5000 for p in paths if p.suffix == ".png")
    text = (tmp_path / "bench.md").read_text()
    for title in report.TITLES.values():
        assert f"## {title}" in text
    # Of ops two shapes, of depth two interactions.
    assert len(report.tables(results)) == len(run.QUESTIONS) + 2


def test_tables_fit_into_a_terminal(results):
    results = copy.deepcopy(results)
    for row in results["rows"]:  # on a busy machine they may be of any length
        row["over_ours"] = dict.fromkeys(row["over_ours"], 0.12)
        row["seconds"] = {key: {"p20": 0.00912, "p50": 0.01, "p80": 0.01123} for key in row["seconds"]}
    console = Console(width=80, file=io.StringIO())
    console.print(*report.tables(results))
    assert "…" not in console.file.getvalue()


def test_the_facts(results):
    """Bytes, FLOPs, memory and dispatched ops are counted, not timed: they can be known beforehand."""
    rows = {row["name"]: row for row in results["rows"]}
    light = rows["ops light_update forward 2x32x4x4 float32 NCHW"]["facts"]
    assert light["map_bytes"] == 2 * 32 * 4 * 4 * 4
    assert readings.moved(rows["ops light_update forward 2x32x4x4 float32 NCHW"]) == 6 * light["map_bytes"]
    assert light["goal"] == 0.8
    assert "goal" not in rows["ops light_update forward 1x32x2x3 float32 NCHW"]["facts"]
    assert rows["models resnet20_dla_l 2 32 train step"]["facts"]["goal"] == 1.35
    directions = {row["labels"][""] for row in results["rows"] if row["labels"].get("op") == "light_update"}
    assert directions == {"forward", "backward", "inference"}
    for few, many in ((rows[f"depth dla_b {n}"]["facts"] for n in (2, 4)),):
        assert many["saved, literal"] > few["saved, literal"] > few["saved, plain"] > 0
        assert all(many[f"peak, {form}"] > few[f"peak, {form}"] > 0 for form in ("fused", "literal", "plain"))
    ours = rows["launches dla_l train step"]["facts"]
    assert ours["ops forward, fused"] - ours["ops forward, plain"] <= 4 < ours["ops forward, literal"]


def test_peak_is_that_of_the_allocator():
    def two_maps_at_once():
        a = torch.empty(2**20)
        b = a + 1
        del a
        return torch.empty(2**20), b

    # The profiler's own few bytes beside them.
    assert depth.peak_bytes(two_maps_at_once, CPU) == pytest.approx(2 * 4 * 2**20, rel=1e-4)


def test_every_floor_is_asked(results):
    """Each op's directions, the block and the networks, each in its unit, and the verdict of both kinds."""
    rows = [row for row in results["rows"] if row["question"] == "floors"]
    [(_, headers, lines)] = report.cells(rows, "floors")
    assert len(lines) == 8 + 4 + 2 + 2
    assert {row["facts"]["unit"] for row in rows} == {"of copy", "x two launches", "x as fast", "x the time"}
    for row, line in zip(rows, lines, strict=True):
        assert f"{row['facts']['asked']:g}" in line[headers.index("asked")]
        for factor, is_met in ((1e-9, True), (1e9, False)):  # of our time, whatever the unit
            other = copy.deepcopy(row)
            other["over_ours"] = {name: over / factor for name, over in row["over_ours"].items()}
            assert readings.met(other) == is_met, row["name"]
    on_gpu = [row.labels for row in floors.rows(torch.device("cuda"))]
    assert len(on_gpu) == 8 + 24 + 2 + 2
    assert {"what": "light_update", "": "forward", "at": "256x256x56x56"} in on_gpu


def test_shares_of_a_copy_and_of_the_limit():
    row = {
        "facts": {"reads": 4, "writes": 2, "map_bytes": 10},
        "seconds": {"native": {"p50": 12.0}},
        "over_ours": {"native": 1, "read": 1 / 12, "copy": 3 / 12},
    }
    assert readings.of_copy(row) == pytest.approx(6 / 2 * 3 / 12)
    assert readings.of_limit(row) == pytest.approx((4 * 1 + 2 * 2) / 12)
    assert readings.of_copy({**row, "facts": {"reads": 0, "writes": 0, "map_bytes": 10}}) is None


def changed(results, factor):
    other = copy.deepcopy(results)
    row = next(r for r in other["rows"] if r["question"] == "blocks")
    row["over_ours"]["plain"] /= factor
    return other


def test_compare(results, tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.json" for name in ("before", "same", "slower", "faster")]
    for path, factor in zip(paths, (1, 1.05, 2, 0.5), strict=True):
        path.write_text(json.dumps(changed(results, factor)))

    def compare(other, *options):
        return CliRunner().invoke(cli.app, ["bench", "--compare", str(paths[0]), str(other), *options])

    assert [compare(p).exit_code for p in paths[1:]] == [0, 1, 0]
    assert "+100%" in compare(paths[2]).output
    n = len(results["rows"])
    assert f"{n} of {n} rows within 10%" in compare(paths[1]).output
    assert compare(paths[1], "--threshold", "0.01").exit_code == 1
    other = copy.deepcopy(results)
    other["rows"][0] = {k: other["rows"][0][k] for k in ("question", "name", "labels", "base")} | {"error": "WRONG: x"}
    next(r for r in other["rows"] if r["question"] == "depth")["facts"]["saved, fused"] *= 2
    del other["rows"][-1]
    paths[1].write_text(json.dumps(other))
    done = compare(paths[1])
    assert done.exit_code == 1
    assert "WRONG: x" in done.output
    assert "saved, fused" in done.output
    assert f"{n - 3} of {n - 1} rows within 10%" in done.output
    assert "1 rows before only" in done.output
    other["rows"] = []
    paths[1].write_text(json.dumps(other))
    assert "have no row in common" in compare(paths[1]).output
    missing = compare(tmp_path / "none.json")
    assert missing.exit_code == 2
    assert "holds no results of `dla bench`" in missing.output


def test_compare_knows_another_machine(results):
    """Where a copy beside the row took longer too, a slower row is no reproach; bytes that are counted still are."""
    before = copy.deepcopy(results)
    for row in before["rows"]:
        row["seconds"][measure.MACHINE]["p50"] = 1.0
    for copy_s, copies in ((1.1, ""), (1.3, "+30%"), (0.8, "-20%")):
        after = changed(before, 2)
        depth_row = next(r for r in after["rows"] if r["question"] == "depth")
        depth_row["facts"]["saved, fused"] *= 2
        for row in after["rows"]:
            row["seconds"][measure.MACHINE]["p50"] = copy_s
        timed, counted = report.compare(before, after, 0.1)[0]
        assert (timed.what, timed.copies, timed.worse) == ("time over plain's", copies, not copies)
        assert (counted.what, counted.copies, counted.worse) == ("saved, fused", "", True)
        for row in after["rows"]:
            del row["seconds"][measure.MACHINE]  # of a run from before it was measured
        assert report.compare(before, after, 0.1)[0][0].worse


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "gap"], "`op` must be one of gap_dsu, refresh_gates, "),
        (["--model", "vgg"], "`model` must be one of resnet20_mrla_l, "),
        (["--model", "resnet50d+vgg"], "`model` resnet50d+vgg: behind + must be one of lii, "),
        (["--model", "resnet50d@big+dla_l"], "`model` resnet50d@big+dla_l: the size of the images, behind @, must be "),
        (["--model", "vgg99+dla_l"], "`model` vgg99: timm has no 'vgg99'; it has "),
        (["--model", "nowhere:net+fuse"], "`model` nowhere:net: No module named 'nowhere'"),
        (["--model", "torchvision.models:resnet7+dla_l"], "`model` torchvision.models:resnet7: module 'torchvision"),
        (["speed"], "`question` must be one of ops, blocks, models, depth, launches, floors, got 'speed'"),
        (["blocks", "--op", "gap_dsu"], "`op` belongs to the question ops, which is not among blocks"),
        (["ops", "--only", "1x1"], "`only` must stand in a row's name, such as 'ops gap_dsu forward 32x64x32x32"),
        (["--device", "tpu"], "`device` must be auto or one of cpu"),
        (["--out", "/dev/null/x"], "`out` must be a folder that can be written, got /dev/null/x"),
    ],
)
def test_bad_input_is_refused_before_the_work(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.Run, "measure", lambda *a: pytest.fail("work began"))
    done = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_only_rows_of_a_name():
    names = [row.name for row in run.rows_of(["ops", "blocks"], CPU, only="backward 24x256")]
    assert names == [row.name for row in run.rows_of(["ops"], CPU) if "backward 24x256x56x56" in row.name] != []


def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "rows_of", lambda *a: [make_row("one", sleepers)])
    done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / run.slug(CPU)
    assert {p.name for p in folder.iterdir()} == {"bench.json", "bench.md", "speedup.png"}
    environment = json.loads((folder / "bench.json").read_text())["environment"]
    assert {"device", "dla-kernels", "commit", "torch", "date", "command", "memory"} <= set(environment)


def test_stopped_command_keeps_what_it_has(monkeypatch, tmp_path):
    def stop(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "rows_of", lambda *a: [make_row("one", sleepers), make_row("two", stop)])
    done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path)])
    assert done.exit_code == 130
    assert "--resume goes on" in done.output
    (path,) = tmp_path.glob("*/bench.json")
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_documents_quote_the_results_on_record():
    for path in (ROOT / "README.md", ROOT / "docs" / "kernels.md"):
        text = path.read_text()
        assert "<!-- bench " in text
        assert report.quoted(text, ROOT / "benchmarks") == text


def test_make_tables_runs_the_installed_package(tmp_path):
    """From the root, where the source tree's `dla` has no benchmarks."""
    command = re.search(r"^tables:.*\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for name in ("benchmarks", "dla"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/kernels.md"):
        (tmp_path / name).write_text((ROOT / name).read_text().replace("of copy | at least |", "old | at least |"))
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True)
    for name in ("README.md", "docs/kernels.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def test_quoting_takes_the_results(results, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(results))
    text = report.quoted("a\n<!-- bench bench.json blocks -->\nold\n<!-- /bench -->\nb\n", tmp_path)
    assert text.startswith("a\n<!-- bench bench.json blocks -->\n\n**2x32x4x4**\n\n| interaction |")
    assert text.endswith("|\n\n<!-- /bench -->\nb\n")
    assert report.quoted(text, tmp_path) == text


def test_dispatched_ops_are_counted():
    def build(n):
        return torch.nn.Sequential(*(torch.nn.SiLU() for _ in range(n)))

    assert launches.of_one_block(build, launches.dispatched) == [1, 1]


def measured(capability, **times):
    """Results in which each op took the backends so long, forward and backward."""
    rows = [
        {
            "question": "ops",
            "labels": {"op": op.replace("_filtered", "+3x3")},
            "seconds": {backend: {"p50": s} for backend, s in zip(("native", "triton"), seconds, strict=False)},
            "name": op,
            "over_ours": {},
            "facts": {},
            "base": "reference",
        }
        for op, pairs in times.items()
        for seconds in pairs
    ]
    return {"environment": {"device": "a GPU"} | ({"capability": capability} if capability else {}), "rows": rows}


def test_the_faster_backend_is_chosen_by_figures_alone():
    runs = [
        measured(
            "9.0",
            gap_dsu=[(1.0, 0.9), (1.0, 1.05)],
            norm_residual=[(1.0, 0.5), (1.0, 2.1)],
            light_update=[(1.0, 0.9)],
            light_update_filtered=[(1.0, 1.2)],
            refresh_gates=[(1.0,)],
        ),
        measured("8.0", gap_dsu=[(1.0, 2.0)]),
        measured(None, gap_dsu=[(1.0, 0.1)]),  # on a CPU
    ]
    runs[1]["rows"] += [{"question": "ops", "labels": {"op": "gap_dsu"}, "error": "wrong"}]
    assert choice.fastest(runs) == {
        "8.0": {"gap_dsu": "native"},
        "9.0": {"gap_dsu": "triton", "light_update": "native", "norm_residual": "native"},
    }


def test_the_choice_in_the_package_is_that_of_the_results():
    runs = [run.load(path) for path in sorted((ROOT / choice.RESULTS).glob("*/bench.json"))]
    assert (ROOT / choice.TARGET).read_text() == choice.source(choice.fastest(runs))


def test_a_choice_is_written_as_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dla_kernels").mkdir()
    (tmp_path / choice.TARGET).touch()
    (tmp_path / choice.RESULTS / "gpu").mkdir(parents=True)
    results = measured("9.0", gap_dsu=[(1.0, 0.9)])
    (tmp_path / choice.RESULTS / "gpu" / "bench.json").write_text(json.dumps(results | {"limits": {}}))
    choice.main()
    found = {}
    exec((tmp_path / choice.TARGET).read_text(), found)
    assert found["FASTEST"] == {"9.0": {"gap_dsu": "triton"}}
    os.utime(tmp_path / choice.TARGET, (0, 0))
    choice.main()
    assert (tmp_path / choice.TARGET).stat().st_mtime == 0
