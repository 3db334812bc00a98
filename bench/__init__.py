"""Benchmarks: `make bench`. Every figure stands beside a yardstick taken in the same run, and only ratios are compared."""
