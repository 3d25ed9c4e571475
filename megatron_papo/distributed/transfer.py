"""Copies from the host to the device that the launching thread does not wait for."""

from torch import Tensor, device


def to_device(tensor: Tensor, where: "device | str") -> Tensor:
    """Return a tensor of the host on the device, itself where that is the host.

    To a GPU through pinned memory, asynchronously: a copy from pageable memory waits until the GPU has done all that
    was launched before it.
    """
    if tensor.device.type == "cpu" and str(where).startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(where, non_blocking=True)
