"""Benchmarks: each script runs by itself; see README.md here."""
