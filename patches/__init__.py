"""Patches that put our kernels into serving hosts."""
