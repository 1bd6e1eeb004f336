"""Triton kernels, one file a kind of product; only engines import them, and only when one is to run."""
