"""Benchmarks: `make bench`. Every figure stands beside a yardstick of the same run, and only ratios are compared."""
