"""Which memory a tensor spans."""

import torch


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one lies in the other, or between its rows."""
    starts = a.data_ptr(), b.data_ptr()
    return max(starts) < min(starts[0] + extent(a), starts[1] + extent(b))
