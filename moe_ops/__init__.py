"""Routed experts (MoE): the routing plan of a call, and the fp32 reference of the layer.

    plan = moe_ops.routing_plan(topk_ids, num_experts, tile_rows=64)
    y = moe_ops.reference.fused_experts(hidden, w13, w2, topk_weights, topk_ids)

Both are pure torch and run on any device. There are no kernels here yet, and nothing that patches a serving engine.
The names below are imported on first use, so that `import moe_ops` stays light.
"""

from importlib import import_module

_HOME = dict.fromkeys(("RoutingPlan", "routing_plan"), "moe_ops.routing")
_SUBMODULES = ("reference", "routing")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return import_module(f"moe_ops.{name}")
    raise AttributeError(f"module 'moe_ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
