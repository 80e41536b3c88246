"""Benchmarks: `python -m bench.NAME` answers one question; the last line it prints is JSON."""
