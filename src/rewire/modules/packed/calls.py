"""How a kernel may be called on the tensors given: by address, through an operator, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_traced(tensor: Tensor) -> bool:
    """Whether operators are recorded or intercepted, so that nothing but operators may be called.

    >>> is_traced(torch.ones(1)), is_traced(torch.ones(1, device="meta"))
    (False, True)
    """
    return torch.compiler.is_compiling() or tensor.is_meta or torch._C._len_torch_dispatch_stack() > 0


def needs_torch(*tensors: Tensor | None) -> bool:
    """Whether derivatives are wanted of a tensor, or one is more than its memory: then only torch may work on it.

    >>> needs_torch(torch.ones(1)), needs_torch(torch.ones(1, requires_grad=True), None)
    (False, True)
    """
    # Plain loops and one question for all: this stands before every kernel, and a kernel can take microseconds.
    wants_gradients = torch.is_grad_enabled()
    is_compiling = torch.compiler.is_compiling()
    for tensor in tensors:
        if tensor is not None:
            if wants_gradients and tensor.requires_grad:
                return True
            if not is_compiling and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
                return True
    if is_compiling:
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
