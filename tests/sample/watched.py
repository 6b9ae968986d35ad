"""What an algorithm holds at once, as far as torch can tell: the largest tensor that any operation made."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Maps that wait on the host, and results, are allocated by these; all else is on the device.
HOST = {"aten.empty.memory_format", "aten.empty_like.default", "aten.copy_.default", "aten.zeros.default"}


class Largest(TorchDispatchMode):
    """`with Largest() as seen: …; seen.numbers` is how many numbers the largest new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and str(func) not in HOST:
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
        return result
