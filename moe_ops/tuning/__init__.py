"""The parts of `python -m moe_ops.tune`: layers, candidates, measurement."""
