"""Benchmarks: `python -m simulations.benchmark NAME --json FILE`. What is compared runs interleaved in one run."""
