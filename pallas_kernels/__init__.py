"""Kernels for LLM inference in Pallas, usable without jaxserve. Imports jax and numpy only.

Each op is a folder: ``api.py`` holds its signature and the order of its implementations,
``reference.py`` the jnp implementation (the oracle, and the CPU path), ``triton.py`` the one for
NVIDIA GPUs, ``cases.py`` the shapes that tests and benchmarks share.
"""
