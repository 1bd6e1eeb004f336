"""Triton kernels, one file per kind of product; only engines import them, and only to run one."""
