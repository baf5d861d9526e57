"""CUDA's driver API, by ctypes: memory that another process can open. What torch allocates itself, others may not open by parts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sun.handoff.device import DriverError

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = "libcuda.so.1"
HANDLE_BYTES = 64
PEER = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag there is, which opening demands."""
PAGE = 2 << 20
"""Smaller allocations share a page, all of which an exported handle would show."""


class Handle(ctypes.Structure):
    """CUipcMemHandle, which calls take by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


Address = ctypes.c_uint64
_SIGNATURES: dict[str, list] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDeviceGetUuid_v2": [ctypes.POINTER(ctypes.c_ubyte * 16), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
    "cuCtxPushCurrent_v2": [ctypes.c_void_p],
    "cuCtxPopCurrent_v2": [ctypes.POINTER(ctypes.c_void_p)],
    "cuCtxSynchronize": [],
    "cuMemAlloc_v2": [ctypes.POINTER(Address), ctypes.c_size_t],
    "cuIpcGetMemHandle": [ctypes.POINTER(Handle), Address],
    "cuIpcOpenMemHandle_v2": [ctypes.POINTER(Address), Handle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [Address],
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}
"""Functions of the driver that are called, with their arguments (cuda.h of CUDA 12; _v2 are what its macros name)."""


def missing() -> str | None:
    """Why there is no driver here; None if there is one."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return str(error)
    lacks = [name for name in _SIGNATURES if not hasattr(library, name)]
    return f"{LIBRARY} has no {', '.join(lacks)}" if lacks else None


class CudaDriver:
    """A `sun.handoff.device.Driver` of a GPU, in the context that torch uses. index: torch's number of it in this process."""

    def __init__(self, index: int):
        if reason := missing():
            raise DriverError(reason)
        self.index, self._library = index, ctypes.CDLL(LIBRARY)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        device, uuid, self._context = ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
        # Kept until the process ends, as torch keeps it.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.uuid = bytes(uuid).hex()

    def _call(self, name: str, *arguments) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            said = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(said))
            raise DriverError(f"{name}: {said.value.decode() if said.value else f'error {code}'}")

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context as this thread's, which may have none or another GPU's."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, nbytes: int) -> int:
        """See `Driver.allocate`; whole pages."""
        address = Address()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), -(-nbytes // PAGE) * PAGE)
        return address.value

    def export(self, address: int) -> bytes:
        """See `Driver.export`; `HANDLE_BYTES`."""
        handle = Handle()
        with self._current():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """See `Driver.open`."""
        if len(handle) != HANDLE_BYTES:
            raise DriverError(f"a handle has {HANDLE_BYTES} bytes, got {len(handle)}")
        address = Address()
        with self._current():
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), Handle.from_buffer_copy(handle), PEER)
        return address.value

    def close(self, address: int) -> None:
        """See `Driver.close`."""
        with self._current():
            self._call("cuIpcCloseMemHandle", address)

    def wait(self) -> None:
        """See `Driver.wait`."""
        with self._current():
            self._call("cuCtxSynchronize")

    def tensor(self, address: int, nbytes: int) -> Tensor:
        """See `Driver.tensor`."""
        import torch

        return torch.as_tensor(_Memory(address, nbytes), device=torch.device("cuda", self.index))


class _Memory:
    """Bytes of a device for torch, by the CUDA array interface."""

    def __init__(self, address: int, nbytes: int):
        self.address, self.nbytes = address, nbytes

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}
