"""The package's benchmarks, one file for each question: ops, blocks, models, depth, launches, floors.

``dla bench`` runs them and draws what they show; ``pytest benchmarks`` runs them under pytest-benchmark.
"""
