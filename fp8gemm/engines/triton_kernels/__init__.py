"""Triton kernels, one file a kind of product; only ``engines.triton_mm`` imports them, and only when one is to run."""
