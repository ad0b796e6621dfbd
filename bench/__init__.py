"""Benchmarks of mnv2_fast against the machine's limits and other engines. Run from the repository's root."""
