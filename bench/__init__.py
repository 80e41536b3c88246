"""Benchmarks: one question per module, `python -m bench.NAME`. The last line printed is one JSON object."""
