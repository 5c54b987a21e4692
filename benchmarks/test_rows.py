"""One test a row: ours under pytest-benchmark, its rivals once before every round."""

from statistics import median

from dla.benchmarks.measure import seconds_of


def test_row(benchmark, row, device):
    prepared = row.prepare(device)
    (name, ours), *rivals = prepared.rivals.items()
    seconds = {rival: [] for rival, _ in rivals}

    def rivals_in_turn():
        for rival, function in rivals:
            seconds[rival].append(seconds_of(function, 1, device))

    # Timed by our clock, as a GPU's is none of the host's.
    benchmark.pedantic(seconds_of, args=(ours, 1, device), setup=rivals_in_turn, rounds=7, warmup_rounds=2)
    benchmark.extra_info |= prepared.facts | {"backend": name}
    # Those of the last seven rounds, without the warm-up's; under --benchmark-disable there is but one.
    benchmark.extra_info |= {f"{rival}, median": median(values[-7:]) for rival, values in seconds.items()}
