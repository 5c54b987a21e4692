"""The benchmarks' own machinery: what is measured in which order, kept, resumed, compared, drawn and quoted."""

import copy
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dla import cli
from dla.benchmarks import blocks, choice, depth, launches, measure, models, networks, ops, report, run
from dla.benchmarks.measure import Prepared, Row, Wrong

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def make_row(name, prepare, question="blocks"):
    return Row(question, {"stage": name, "interaction": "dla_l", "": "train step"}, "plain", prepare)


def sleepers(device):
    return Prepared({"fused": lambda: None, "plain": lambda: None}, {"bytes": 8})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A small run of every question, on small shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SHAPES", {"cpu": ([(2, 32, 4, 4), (1, 32, 2, 3)], [])})
        patch.setattr(blocks, "SHAPES", {"cpu": ([(2, 32, 4)], [])})
        patch.setattr(depth, "SHAPES", {"cpu": (2, 32, 4)})
        patch.setattr(depth, "DEPTHS", (2, 4))
        patch.setattr(models, "SHORT", ("resnet20_dla_l",))
        patch.setitem(models.MODELS["cpu"], "resnet20_dla_l", (2, 32))
        patch.setattr(measure, "MIN_ROUNDS", 2)
        patch.setattr(torch, "compile", lambda f: f)
        session = run.Run(tmp_path_factory.mktemp("run") / "bench.json", CPU)
        session.measure(run.rows_of([], CPU), 0)
    return session.results


def test_rivals_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_S", 0)
    seen = []
    samples = measure.interleaved({name: lambda n=name: seen.append(n) for name in "ab"}, CPU, 0)
    warm = 3  # calls of each before
    assert "".join(seen) == "a" * warm + "b" * warm + "ab" * measure.MIN_ROUNDS
    assert [len(s) for s in samples.values()] == [measure.MIN_ROUNDS] * 2


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

    def build(maps, vectors, b, c, backend):
        call, arguments = right.build(maps, vectors, b, c, backend)
        factor = 1.001 if backend == "native" else 1
        return lambda *a: [out * factor for out in call(*a)], arguments

    monkeypatch.setitem(ops.OPS, "norm_residual", right._replace(build=build))
    monkeypatch.setattr(ops, "SHAPES", {"cpu": ([(2, 32, 4, 4)], [])})
    monkeypatch.setattr(ops, "available", lambda device: ["native"])
    session = run.Run(tmp_path / "bench.json", CPU)
    session.measure(run.rows_of([], CPU, ops=["norm_residual"]), 0)
    for row in session.results["rows"]:
        assert "native: result 0 is off by 1.0e-03" in row["error"]
        assert "seconds" not in row
    assert "WRONG: native" in report.markdown(session.results, [])
    report.write(session.results, tmp_path)


def test_wrong_network_gets_no_number(monkeypatch):
    stage = blocks.build(32, "dla_l", 2)
    networks.check(stage, torch.randn(2, 32, 4, 4))
    monkeypatch.setattr(networks.literal, "light_stage", lambda stage, x: x)
    with pytest.raises(Wrong, match="its output differs from the literal form's by"):
        networks.check(stage, torch.randn(2, 32, 4, 4))


def test_every_question_is_measured_and_drawn(results, tmp_path):
    assert {row["question"] for row in results["rows"]} == set(run.QUESTIONS)
    assert not [row["error"] for row in results["rows"] if "error" in row]
    assert {row["labels"]["op"] for row in results["rows"] if row["question"] == "ops"} == set(ops.OPS)
    paths = report.write(results, tmp_path)
    assert {p.name for p in paths} == {"bench.md", "roofline.png", "speedup.png", "depth.png"}
    assert all(p.stat().st_size > 5000 for p in paths if p.suffix == ".png")
    text = (tmp_path / "bench.md").read_text()
    for title in report.TITLES.values():
        assert f"## {title}" in text
    assert len(report.tables(results)) == len(run.QUESTIONS)


def test_the_facts(results):
    """Bytes, FLOPs, memory and dispatched ops are counted, not timed: they can be known beforehand."""
    rows = {row["name"]: row for row in results["rows"]}
    light = rows["ops light_update forward 2x32x4x4 float32 NCHW"]["facts"]
    assert light["map_bytes"] == 2 * 32 * 4 * 4 * 4
    assert light["bytes"] == 6 * light["map_bytes"]
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


def changed(results, factor):
    other = copy.deepcopy(results)
    row = next(r for r in other["rows"] if r["question"] == "blocks")
    row["seconds"]["fused"]["p50"] *= factor
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
    missing = compare(tmp_path / "none.json")
    assert missing.exit_code == 2
    assert "holds no results of `dla bench`" in missing.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "gap"], "`op` must be one of gap_dsu; refresh_gates; "),
        (["--model", "vgg"], "`model` must be one of resnet20_mrla_l, "),
        (["--model", "resnet50d+vgg"], "`model` resnet50d+vgg: the interaction must be one of lii, "),
        (["--model", "vgg99+dla_l"], "`model` vgg99+dla_l: timm has no 'vgg99'; it has "),
        (["speed"], "`question` must be one of ops, blocks, models, depth, launches, got 'speed'"),
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


def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "rows_of", lambda *a: [make_row("one", sleepers)])
    done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / run.slug(CPU)
    assert {p.name for p in folder.iterdir()} == {"bench.json", "bench.md", "speedup.png"}
    environment = json.loads((folder / "bench.json").read_text())["environment"]
    assert {"device", "dla-kernels", "commit", "torch", "date", "command"} <= set(environment)


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


def test_quoting_takes_the_results(results, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(results))
    text = report.quoted("a\n<!-- bench bench.json blocks -->\nold\n<!-- /bench -->\nb\n", tmp_path)
    assert text.startswith("a\n<!-- bench bench.json blocks -->\n\n| stage |")
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
            "labels": {"op": op.replace("_filtered", ", filtered carry")},
            "seconds": {backend: {"p50": s} for backend, s in zip(("native", "triton"), seconds, strict=False)},
        }
        for op, pairs in times.items()
        for seconds in pairs
    ]
    return {"environment": {"capability": capability} if capability else {}, "rows": rows}


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
    runs = [report.load(path) for path in sorted((ROOT / choice.RESULTS).glob("*/bench.json"))]
    assert (ROOT / choice.TARGET).read_text() == choice.source(choice.fastest(runs))


def test_a_choice_is_written_as_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dla_kernels").mkdir()
    (tmp_path / choice.RESULTS / "gpu").mkdir(parents=True)
    results = measured("9.0", gap_dsu=[(1.0, 0.9)])
    (tmp_path / choice.RESULTS / "gpu" / "bench.json").write_text(json.dumps(results | {"limits": {}}))
    choice.main()
    found = {}
    exec((tmp_path / choice.TARGET).read_text(), found)
    assert found["FASTEST"] == {"9.0": {"gap_dsu": "triton"}}
