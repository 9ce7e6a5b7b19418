"""A GPU without hardware: tensors that say they are on 'cuda', and whose values are in memory.

Inside `FakeGPU`, an operation on tensors of two devices is an error, and so is an index on
the host. Copies between the devices are counted, and so are the values that the host reads."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")
aten = torch.ops.aten


class GPUTensor(torch.Tensor):
    "A tensor of the fake GPU; `held` has its values."

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> "GPUTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # the autograd engine then needs no driver
            requires_grad=requires_grad,
        )
        if held.dtype == torch.float64 and not has_float64:
            raise TypeError("this device has no float64")
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of the fake GPU to numpy: copy it to the host")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __repr__(self, **kwargs: Any) -> str:
        return f"GPUTensor({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


has_float64 = True  # of the fake GPU; see `fake_gpu`


class GPUGenerator(torch.Generator):
    "A generator of the fake GPU, with the numbers of the host's."

    @property
    def device(self) -> torch.device:
        return GPU


class AnyGenerator(torch.Generator):
    "Stands for torch.Generator inside `fake_gpu`."

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return GPUGenerator() if _is_gpu(device) else HostGenerator()


HostGenerator = torch.Generator  # PyTorch's own class
counts: Counter[str] = Counter()  # of copies and reads since `FakeGPU` was entered


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _wrap(out: Any, old: dict[int, GPUTensor]) -> Any:
    "Results as tensors of the GPU; an argument that was changed in place is itself."

    def one(tensor: torch.Tensor) -> torch.Tensor:
        return old[id(tensor)] if id(tensor) in old else GPUTensor(tensor)

    return tree_map_only(torch.Tensor, one, out)


def _check_devices(operation: Any, leaves: list[Any], where: Any) -> None:
    "RuntimeError if tensors of the host and of the GPU meet."
    hosts = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, GPUTensor)]
    is_index = "index" in operation.name() or "gather" in operation.name()
    mixed = [t for t in hosts if t.ndim or is_index]
    if where and mixed:
        shapes = [tuple(t.shape) for t in mixed]
        raise RuntimeError(f"{operation}: tensors {shapes} are on the host, others on the GPU")


_RESHAPES = ("squeeze_", "unsqueeze_", "t_", "transpose_")  # change sizes in place
_READS = (aten._local_scalar_dense.default, aten.equal.default)
_SIZES = ("nonzero", "unique", "masked_select", "bincount")  # the host waits for the result's size


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = operation.name().removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    own = [t for t in leaves if isinstance(t, GPUTensor)]
    inner = {id(t.held): t for t in own}
    plain_args, plain = tree_map_only(GPUTensor, lambda t: t.held, (args, kwargs))
    if name.startswith(("_to_copy", "copy_")):
        return _copy(operation, name, args, plain_args, plain, inner)
    asked = kwargs.get("device")
    on_gpu = bool(own) if asked is None else _is_gpu(asked)
    _check_devices(operation, leaves, on_gpu or own)
    if asked is not None:
        plain["device"] = HOST
    if operation in _READS and own:
        counts["reads"] += 1
    if own and name.split(".")[0].lstrip("_").startswith(_SIZES):
        counts["sizes"] += 1
    is_mask = [t for t in own if t.dtype == torch.bool and name.startswith("index")]
    if any(t is not args[0] for t in is_mask) and name.startswith("index.Tensor"):
        counts["sizes"] += 1
    out = operation(*plain_args, **plain)
    if name.split(".")[0] in _RESHAPES and own:
        with torch._C._DisableTorchDispatch():  # the sizes that PyTorch's core knows
            operation(*args, **kwargs)
    return _wrap(out, inner) if on_gpu else out


def _copy(
    operation: Any, name: str, args: Any, plain_args: Any, plain: Any, inner: dict[int, GPUTensor]
) -> Any:
    "A copy, perhaps to the other device."
    if name.startswith("copy_"):
        to, source = (isinstance(t, GPUTensor) for t in args[:2])
        if to != source and (args[1].ndim or source):
            counts["to_gpu" if to else "to_host"] += 1
        plain_args[0].copy_(plain_args[1])
        return args[0]
    source, asked = isinstance(args[0], GPUTensor), plain.pop("device", None)
    to = source if asked is None else _is_gpu(asked)
    if to != source:
        counts["to_gpu" if to else "to_host"] += 1
    out = operation(*plain_args, **plain)
    return GPUTensor(out) if to else out


class _Names(TorchFunctionMode):
    "Names the device 'meta' to PyTorch's core, which has no 'cuda' without a driver."

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.to and len(args) > 1 and args[1] == "cuda":
            args = (args[0], "meta", *args[2:])
        _check_generator(function, args, kwargs or {})
        args, kwargs = tree_map_only(torch.device, _as_meta, (args, kwargs or {}))
        if _is_gpu(kwargs.get("device")):
            kwargs = kwargs | dict(device="meta")
        if function in _MAKERS:
            return _made(function, args, kwargs)
        return function(*args, **kwargs)


def _check_generator(function: Any, args: Any, kwargs: dict[str, Any]) -> None:
    "RuntimeError if a generator of the host draws on the GPU, or the other way round."
    draws = kwargs.get("generator")
    on_gpu = _is_gpu(kwargs.get("device")) or isinstance(next(iter(args), None), GPUTensor)
    if draws is not None and on_gpu != isinstance(draws, GPUGenerator):
        place, other = ("host", "GPU") if on_gpu else ("GPU", "host")
        raise RuntimeError(f"{function}: a generator of the {place} draws on the {other}")


_MAKERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


def _made(function: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    "A tensor of Python numbers; PyTorch's core would leave it empty on 'meta'."
    to = function is torch.Tensor.new_tensor or _is_gpu(kwargs.get("device"))
    if isinstance(args[0], GPUTensor) and function is torch.as_tensor:
        return args[0]
    if function is torch.Tensor.new_tensor:
        to, kwargs = isinstance(args[0], GPUTensor), dict(dtype=args[0].dtype) | kwargs
        args = args[1:]
    made = torch.tensor(*args, **{k: v for k, v in kwargs.items() if k != "device"})
    if not to:
        return made
    counts["to_gpu"] += 1
    return GPUTensor(made)


def _as_meta(device: torch.device) -> torch.device:
    return torch.device("meta") if device.type == "cuda" else device


class _Mode(TorchDispatchMode):
    "Sees what makes a tensor on the GPU out of none."

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with self:  # inference mode leaves it to us to take operations apart
            parts = operation.decompose(*args, **(kwargs or {}))
        return _run(operation, args, kwargs or {}) if parts is NotImplemented else parts


@contextmanager
def fake_gpu(float64: bool = True) -> Iterator[Counter[str]]:
    """Inside, 'cuda' is the fake GPU. Gives the counts: to_gpu, to_host, reads, sizes.

    Without `float64` a tensor of that type on it is a TypeError, as on Apple's GPU."""
    global has_float64
    counts.clear()
    has_float64 = float64
    try:
        with patch.object(torch, "Generator", AnyGenerator), _Mode(), _Names():
            yield counts
    finally:
        has_float64 = True
