"""Launch parameters of the kernels (import name: ops_configs)."""
