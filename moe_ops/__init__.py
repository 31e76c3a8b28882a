"""Routed-expert (MoE) kernels."""
