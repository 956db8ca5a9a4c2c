"""Benchmarks: programs that print a table and write one JSON document, `mtp-spec bench NAME`."""
