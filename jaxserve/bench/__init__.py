"""Benchmarks: they measure, they never assert."""
