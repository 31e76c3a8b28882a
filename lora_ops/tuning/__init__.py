"""The parts of `python -m lora_ops.tune`: layers, candidates, measurement, choice of what is kept."""
