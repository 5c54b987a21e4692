"""Which fused backend was measured to be the faster one on a GPU. Written by ``make tables``."""

#: {compute capability: {op: backend}}, from ``benchmarks/results/``. What is not there has no figures.
FASTEST: dict[str, dict[str, str]] = {}
