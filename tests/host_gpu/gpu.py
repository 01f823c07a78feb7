"""Plug in two GPUs of host memory: as a pytest plugin (``-p tests.host_gpu.gpu``), or by importing this before torch.

They show what is computed where: tensors of two devices that meet, an array made of a GPU's tensor, a generator of the wrong device,
memory taken for zeros. They count kernels and waits. They say nothing of speed, of the numerics of CUDA's kernels, or of nccl.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

assert "torch" not in sys.modules, "torch looks for its GPUs once: import this first"
SOURCE = Path(__file__).with_name("gpu.cpp")
_spec = importlib.util.find_spec("torch")
assert _spec is not None and _spec.origin is not None
TORCH = Path(_spec.origin).parent


class Counts(NamedTuple):
    """What was asked of the GPU: kernels by operator, and moments at which the CPU waits for it."""

    launched: Counter[str]
    waited: Counter[str]


def built() -> Path:
    """The library, compiled once for each source and torch."""
    version = (TORCH / "version.py").read_bytes()
    name = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"tribunal-host-gpu-{os.getuid()}" / f"{name}.so"
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        assert path.parent.stat().st_uid == os.getuid(), f"{path.parent} is somebody else's"
        partial = path.with_name(f"{name}.{os.getpid()}")
        include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", "-O1", *include, str(SOURCE), "-o", str(partial), *libraries], check=True)
        partial.rename(path)
    return path


def counted() -> Counts:
    """What was counted since the last call."""
    counts = Counts(Counter(), Counter())
    for line in _library.counted().decode().splitlines():
        kind, name, times = line.split("\t")
        getattr(counts, kind)[name] = int(times)
    return counts


def _plug_in() -> ctypes.CDLL:
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(str(TORCH / "lib" / name), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(built()))  # before torch is imported: what it registers is looked for once
    library.counted.restype = ctypes.c_char_p
    import torch

    library.plug_in()
    _tell_python(torch)
    return library


def _tell_python(torch: Any) -> None:
    """What ``torch.cuda`` says; in a wheel without CUDA it answers for none of it."""
    state = torch.zeros(16, dtype=torch.uint8)
    nothing = "_lazy_init synchronize empty_cache reset_peak_memory_stats manual_seed manual_seed_all ipc_collect"
    answers: dict[str, Any] = {
        **dict.fromkeys([*nothing.split(), "set_rng_state", "set_rng_state_all"]),
        **dict.fromkeys(["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"], 0),
        "is_available": True,
        "is_initialized": True,
        "device_count": 2,
        "get_device_name": "host memory",
        "get_device_properties": types.SimpleNamespace(total_memory=80 << 30, name="host memory", major=9, minor=0),
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "mem_get_info": (70 << 30, 80 << 30),
        "get_rng_state": state,
        "get_rng_state_all": [state],
        "current_stream": types.SimpleNamespace(synchronize=lambda: None, wait_stream=lambda _: None),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.cuda.current_device = torch.accelerator.current_device_index
    torch.cuda.set_device = torch.accelerator.set_device_index
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = torch._C._accelerator_exchangeDevice
    to = torch.Tensor.to
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.to = lambda self, *given, non_blocking=False, **named: to(self, *given, **named)  # which would want pinned memory


_library = _plug_in()
