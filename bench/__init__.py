"""Benchmarks of mnv2_fast against the machine's limits and against other engines. Run from the repository's root."""
