"""A device in Python: memory on the CPU, rules of a GPU. It shows placement, waits and races in CI, and no speed.

`install()` makes it the accelerator that torch finds, once a process and for all of it: use it in a process of its own.
Its kernels are the CPU's, so that results can be compared with those of the CPU. Its rules are CUDA's, or stricter:

- An operation on tensors of the device and of the host raises, but for host numbers without dimensions and for copies.
  Indices on the host raise too, which CUDA copies, waiting for the device.
- The host reads nothing without a copy: no `numpy()`, no pointer.
- A copy with `non_blocking` between the device and pinned memory happens later: when its stream is waited for, or, to
  the device, when that stream uses the tensor. A destination on the host holds NaN until then; a source is read then.
  A tensor that another stream uses before it waited for the copy raises.
- Memory is counted by storage; more than `limit_bytes` raises torch.OutOfMemoryError.
- What makes the host wait for the device is counted by the name of the operation, see `counted`.

torch has experimental support for such a backend (`torch.utils.backend_registration`), without streams, events, pinned
memory, generators and memory statistics: these are replaced here.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fake"
MAY_CROSS = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
GIVES_A_NUMBER = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::_fused_sdp_choice"}
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
"""Operations whose result, or its shape, the host needs."""
LOWER_PRECISION = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution", "scaled_dot_product_attention")
"""Operations that autocast computes in 16 bits (pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to
float16")."""


BYTES = 2**34
"""Memory of the device, but for `limited`."""
AHEAD = ("loading", "features")
"""Names of the threads that work beside the steps (batch_loader.py, features.py)."""


class _Counts:
    """What the device counts."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.bytes_now = self.bytes_peak = 0
        self.limit_bytes: int | None = None
        self.holders: Counter[int] = Counter()
        """Tensors by the storage that they share."""

    def free_and_all(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all."""
        size = BYTES if self.limit_bytes is None else self.limit_bytes
        return size - self.bytes_now, size

    def wait(self, name: str) -> None:
        """Count an operation for which the host waits, unless a thread waits that works ahead, beside the steps."""
        if not threading.current_thread().name.startswith(AHEAD):
            self.waits[name] += 1


counted = _Counts()


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """A device whose memory has this size."""
    counted.limit_bytes = num_bytes
    try:
        yield
    finally:
        counted.limit_bytes = None


class Stream:
    """Copies that were not made yet, in order; everything else happens at once."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.copies: list[Callable[[], None]] = []
        self.lock = threading.RLock()
        self._outer: list[Stream] = []

    def catch_up(self) -> None:
        """Make all copies."""
        with self.lock:
            copies, self.copies[:] = list(self.copies), []
            for copy in copies:
                copy()

    def synchronize(self) -> None:
        """Let the host wait for all copies."""
        self.catch_up()

    def wait_event(self, event: "Event") -> None:
        """What follows in this stream sees what the event follows."""
        event.synchronize()

    def wait_stream(self, other: "Stream") -> None:
        """What follows in this stream sees all of the other."""
        other.catch_up()

    def record_event(self, event: "Event | None" = None) -> "Event":
        """An event after all that is in this stream now."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all copies are made."""
        return not self.copies

    def __enter__(self) -> Self:
        self._outer.append(current_stream())
        _local.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        _local.stream = self._outer.pop()


class Event:
    """A point in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream: Stream | None = None
        self.copies: list[Callable[[], None]] = []

    def record(self, stream: Stream | None = None) -> None:
        """Set the point to the end of a stream."""
        self.stream = stream or current_stream()
        self.copies = list(self.stream.copies)

    def synchronize(self) -> None:
        """Make the copies before this point."""
        if self.stream is None:
            return
        with self.stream.lock:
            for copy in self.copies:
                if copy in self.stream.copies:
                    self.stream.copies.remove(copy)
                    copy()

    def wait(self, stream: Stream | None = None) -> None:
        """What follows in a stream sees what this event follows."""
        self.synchronize()

    def query(self) -> bool:
        """Whether the copies before this point are made."""
        return self.stream is None or not any(copy in self.stream.copies for copy in self.copies)


_local = threading.local()
_default = Stream()


def current_stream(_: Any = None) -> Stream:
    """The stream of this thread."""
    return getattr(_local, "stream", _default)


class Tensor(torch.Tensor):
    """A tensor of the device."""

    memory: torch.Tensor
    """The same numbers on the host, which only this module reads."""
    arriving: "tuple[Stream, Callable[[], None]] | None"
    """The copy that fills it, and its stream, until that was made."""
    hold: "_Hold"

    @staticmethod
    def __new__(cls, memory: torch.Tensor, requires_grad: bool = False) -> "Tensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            device=torch.device(NAME, 0), requires_grad=requires_grad,
        )  # fmt: skip
        made.memory, made.arriving, made.hold = memory, None, _Hold(memory)
        return made

    def arrived(self) -> torch.Tensor:
        """The numbers, for an operation of the current stream. Raises RuntimeError for a race."""
        if self.arriving is not None:
            stream, copy = self.arriving
            if copy in stream.copies:
                if stream is not current_stream():
                    raise RuntimeError("a stream uses a tensor before it waited for the copy that another stream makes")
                stream.catch_up()
            self.arriving = None
        return self.memory

    def tolist(self) -> Any:
        """As torch's, which copies first."""
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As CUDA's."""
        raise TypeError(
            f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() to copy to host memory first"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def record_stream(self, stream: Stream) -> None:
        """Nothing: memory is Python's, and is not reused while it is needed."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors = list(_tensors((args, kwargs)))
        ours = [one for one in tensors if isinstance(one, Tensor)]
        _check_one_device(name, tensors, ours)
        if name in ("aten::copy_", "aten::_copy_from"):
            source, target = (args[1], args[0]) if name == "aten::copy_" else args[:2]
            return _copy(source, target, later=bool((*args, False)[2] if len(args) > 2 else kwargs.get("non_blocking")))
        to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        if name in WAITS or (name == "aten::index" and any(_is_mask(one) for one in tensors[1:])):
            counted.wait(name)
        if to_host and name == "aten::_to_copy":
            return _to_host(func, args, kwargs)
        plain = {**kwargs, **({"device": torch.device("cpu")} if kwargs.get("device") is not None else {})}
        plain.pop("pin_memory", None)
        out = func(*_each(_memory, args), **_each(_memory, plain))
        if to_host or name in GIVES_A_NUMBER:
            return out
        return _each(lambda one: _wrapped(one, ours), out)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """A value with everything in its tuples, lists and dicts changed: a seventh of the time of torch's `tree_map`."""
    if type(value) in (tuple, list):
        return type(value)(_each(change, one) for one in value)
    if type(value) is dict:
        return {key: _each(change, one) for key, one in value.items()}
    return change(value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in tuples, lists and dicts."""
    if type(value) in (tuple, list, dict):
        for one in value.values() if type(value) is dict else value:
            yield from _tensors(one)
    elif isinstance(value, torch.Tensor):
        yield value


def _check_one_device(name: str, tensors: list[torch.Tensor], ours: list[Tensor]) -> None:
    foreign = [tuple(one.shape) for one in tensors if not isinstance(one, Tensor) and one.dim() > 0]
    if ours and foreign and name not in MAY_CROSS:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! "
            f"Shapes on the cpu: {foreign}"
        )


def _is_mask(one: torch.Tensor) -> bool:
    return one.dtype in (torch.bool, torch.uint8)


def _memory(leaf: Any) -> Any:
    return leaf.arrived() if isinstance(leaf, Tensor) else leaf


def _wrapped(out: Any, ours: list[Tensor]) -> Any:
    if not isinstance(out, torch.Tensor) or isinstance(out, Tensor):
        return out
    same = next((one for one in ours if one.memory is out), None)  # in place
    return Tensor(out) if same is None else same


def _to_host(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """A new tensor of the host; with `non_blocking` it is pinned and filled later, as CUDA does."""
    later = kwargs.pop("non_blocking", False)
    source = args[0]
    made = func(source.arrived(), *args[1:], **kwargs)
    if made is source.memory or made.untyped_storage()._cdata == source.memory.untyped_storage()._cdata:
        made = made.clone()
    if not later:
        counted.wait("device to host")
        return made
    _lock_pages(made)
    right = made.clone()
    _poison(made)
    current_stream().copies.append(lambda: made.copy_(right))
    return made


def _copy(source: torch.Tensor, target: torch.Tensor, *, later: bool) -> torch.Tensor:
    """Copy between or within devices. A pinned tensor of the host makes a copy wait for its stream alone."""
    host = next((one for one in (source, target) if not isinstance(one, Tensor)), None)
    if host is None:
        target.arrived().copy_(source.arrived())
        return target
    pinned = host.untyped_storage()._cdata in _PINNED
    if not (later and pinned):
        if isinstance(source, Tensor):
            counted.wait("device to host")
        elif source.dim():
            counted.wait("host to device")
        _memory(target).copy_(_memory(source))
        return target
    stream = current_stream()
    if isinstance(target, Tensor):
        memory = target.arrived()
        copy = lambda: memory.copy_(source)  # noqa: E731
        target.arriving = (stream, copy)
        stream.copies.append(copy)
    else:
        right = source.arrived().clone()
        _poison(target)
        stream.copies.append(lambda: target.copy_(right))
    return target


def _poison(target: torch.Tensor) -> None:
    target.fill_(float("nan") if target.is_floating_point() else -77)


class _Hold:
    """Counts the memory of a storage for as long as a tensor has it.

    It is not a weak reference to the tensor, with which torch would not swap the tensor into a parameter.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.storage = memory.untyped_storage()
        self.key, self.size = self.storage._cdata, self.storage.nbytes()
        if not counted.holders[self.key]:
            if counted.limit_bytes is not None and counted.bytes_now + self.size > counted.limit_bytes:
                self.key = -1
                raise torch.OutOfMemoryError(
                    f"Tried to allocate {self.size} bytes; the device has {counted.limit_bytes}"
                )
            counted.bytes_now += self.size
            counted.bytes_peak = max(counted.bytes_peak, counted.bytes_now)
        counted.holders[self.key] += 1

    def __del__(self) -> None:
        if self.key in counted.holders:
            counted.holders[self.key] -= 1
            if not counted.holders[self.key]:
                del counted.holders[self.key]
                counted.bytes_now -= self.size


_PINNED: set[int] = set()
"""Storages of the host whose pages are locked; they are never given back, so that no key is used twice."""
_KEPT: list[torch.Tensor] = []


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    made = tensor.clone()
    _lock_pages(made)
    return made


def _lock_pages(tensor: torch.Tensor) -> None:
    _KEPT.append(tensor)
    _PINNED.add(tensor.untyped_storage()._cdata)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Generator(torch.Generator):
    """A generator of the device is one of the host."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)


def _enter_no_grad(self: Any) -> None:
    """Instead of inference mode, in which torch 2.13 makes no views of tensors of such a class."""
    self.instead = torch.no_grad()
    self.instead.__enter__()


def _exit_no_grad(self: Any, *error: Any) -> None:
    self.instead.__exit__(*error)


def _synchronize(_: Any = None) -> None:
    counted.wait("synchronize")
    current_stream().synchronize()
    _default.synchronize()


def _empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    made: torch.Tensor = _torch_empty(*args, **kwargs)
    return _pinned(made) if pin_memory else made


_torch_empty = torch.empty


def install() -> torch.device:
    """Make the device the accelerator of this process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    _KEPT_LIBRARIES.append(library)
    library.impl("empty.memory_format", _new_empty, "PrivateUse1")
    library.impl("empty_strided", _new_strided, "PrivateUse1")
    library.impl("_copy_from", lambda source, target, later=False: _copy(source, target, later=later), "PrivateUse1")
    library.impl("_local_scalar_dense", lambda tensor: tensor.memory.item(), "PrivateUse1")
    torch.Stream, torch.Event, torch.Generator = Stream, Event, _Generator  # type: ignore[assignment,misc]
    torch.empty = _empty
    torch.Tensor.pin_memory = _pinned  # type: ignore[method-assign,assignment]
    torch.Tensor.is_pinned = lambda self, *_: self.untyped_storage()._cdata in _PINNED  # type: ignore[method-assign,assignment]
    torch.accelerator.current_stream = current_stream  # type: ignore[assignment]
    torch.accelerator.synchronize = _synchronize
    torch.accelerator.max_memory_allocated = lambda *_: counted.bytes_peak
    torch.accelerator.memory_allocated = lambda *_: counted.bytes_now
    torch.accelerator.reset_peak_memory_stats = lambda *_: setattr(counted, "bytes_peak", counted.bytes_now)
    torch.accelerator.get_memory_info = lambda *_: counted.free_and_all()
    torch.inference_mode.__enter__ = _enter_no_grad  # type: ignore[method-assign]
    torch.inference_mode.__exit__ = _exit_no_grad  # type: ignore[method-assign,assignment]
    torch.__future__.set_swap_module_params_on_conversion(True)  # a new tensor of another class would untie weights
    return torch.device(NAME, 0)


_KEPT_LIBRARIES: list[torch.library.Library] = []
"""A library that is collected takes its implementations with it."""


def _new_empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Tensor(_torch_empty(size, dtype=dtype))


def _new_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Tensor(torch.empty_strided(size, stride, dtype=dtype))
