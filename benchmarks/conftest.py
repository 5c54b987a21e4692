"""``pytest benchmarks``: every row under pytest-benchmark, for its storage and its comparison of runs."""

from dla.benchmarks import run


def pytest_addoption(parser):
    parser.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.addoption("--full", action="store_true", help="every size, dtype, layout and model")


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        device = run.find_device(metafunc.config.getoption("device"))
        rows = run.rows_of([], device, metafunc.config.getoption("full"))
        metafunc.parametrize(("row", "device"), [(row, device) for row in rows], ids=[row.name for row in rows])
