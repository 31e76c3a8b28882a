"""Multi-LoRA shrink and expand kernels."""
