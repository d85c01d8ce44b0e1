"""What `torch.cuda`, `torch.xpu` and `torch.npu` answer: the functions of their builds, over the simulated device."""

import dataclasses
import types
import warnings
from typing import Any

import torch

from simulated_device.build import load
from simulated_device.profiles import Machine, read

device = load()
machine_here = read()
assert machine_here is not None
device_type = machine_here.profile.type
TYPES = {"cuda": 1, "xpu": 12, "mps": 13, "npu": 20}
"""torch's numbers of the device types."""


@dataclasses.dataclass
class State:
    """The machine, and the devices of it that this process sees."""

    machine: Machine
    visible: list[int]


state = State(machine_here, [])


def use(machine: Machine, visible: str | None = None) -> None:
    """Put this process on `machine`."""
    state.machine, state.visible = machine, machine.visible(visible)
    device.set_devices(len(state.visible), machine.memory_of_each)
    if device_type != "mps":
        torch.get_device_module(device_type).default_generators = tuple(_generators())
    if device_type == "cuda":
        device.set_has_flash(machine.profile.capability >= (8, 0))
        torch.version.cuda, torch.version.hip = (None, "7.0") if machine.profile.is_amd else ("13.0", None)


def index_of(which: Any = None) -> int:
    """The number of a device given as these functions take it."""
    if which is None:
        return device.current_device()
    index = which if isinstance(which, int) else torch.device(which).index
    return device.current_device() if index is None or index < 0 else index


class Event(torch.Event):
    """`Event`."""

    def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
        return super().__new__(cls, device=device_type, enable_timing=enable_timing, blocking=blocking)

    def record(self, stream=None):
        super().record(current_stream() if stream is None else stream)

    def wait(self, stream=None):
        super().wait(current_stream() if stream is None else stream)

    def elapsed_time(self, end_event):
        return device.elapsed_time(self.event_id, end_event.event_id)


class Stream(torch.Stream):
    """`Stream`."""

    def __new__(cls, device=None, priority=0, **number):
        if number:
            return super().__new__(cls, **number)
        return super().__new__(cls, device=torch.device(device_type, index_of(device)), priority=priority)

    @property
    def cuda_stream(self):
        return self.stream_id

    def record_event(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        event.wait(self)

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())


def _stream(which: Any, number: int) -> Stream:
    return Stream(stream_id=number, device_index=index_of(which), device_type=TYPES[device_type])


def current_stream(which: Any = None) -> Stream:
    """`current_stream`."""
    return _stream(which, device.current_stream(index_of(which)))


def set_stream(stream: Stream) -> None:
    """`set_stream`."""
    device.set_device(stream.device_index)
    device.set_stream(stream.device_index, stream.stream_id)


class StreamContext:
    """`stream`."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        if self.stream is not None:
            self.before = device.current_device(), current_stream(self.stream.device_index)
            set_stream(self.stream)

    def __exit__(self, *_):
        if self.stream is not None:
            set_stream(self.before[1])
            device.set_device(self.before[0])


class DeviceContext:
    """`device`."""

    def __init__(self, which):
        self.index = -1 if which is None else index_of(which)

    def __enter__(self):
        self.before = device.current_device()
        if self.index >= 0:
            device.set_device(self.index)

    def __exit__(self, *_):
        device.set_device(self.before)


class DeviceOf(DeviceContext):
    """`device_of`."""

    def __init__(self, tensor):
        super().__init__(tensor.device if tensor.is_cuda else None)


def exchange_device(index: int) -> int:
    """`_exchange_device`."""
    before = device.current_device()
    if index >= 0:
        device.set_device(index)
    return before


def get_device_properties(which: Any = None) -> types.SimpleNamespace:
    """`get_device_properties`."""
    index, profile = index_of(which), state.machine.profile
    if not 0 <= index < len(state.visible):
        raise AssertionError("Invalid device id")
    identifier = state.machine.identifiers()[state.visible[index]]
    return types.SimpleNamespace(
        name=profile.name, major=profile.capability[0], minor=profile.capability[1],
        total_memory=state.machine.memory_of_each, has_fp64=True, multi_processor_count=profile.processors,
        gcnArchName=profile.arch if profile.is_amd else "", uuid=identifier.partition("-")[2],
        is_integrated=0, is_multi_gpu_board=0, max_threads_per_multi_processor=2048, warp_size=32,
        regs_per_multiprocessor=65536, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, L2_cache_size=52428800,
    )  # fmt: skip


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """`is_bf16_supported`: by emulation every GPU of CUDA does."""
    return including_emulation or device_type != "cuda" or state.machine.profile.capability >= (8, 0)


def allocated(which: Any = None) -> int:
    return device.allocated(index_of(which))[0]


def most_allocated(which: Any = None) -> int:
    return device.allocated(index_of(which))[1]


def memory_stats(which: Any = None) -> dict[str, int]:
    """`memory_stats`."""
    figures = {"current": allocated(which), "peak": most_allocated(which)}
    stats = {f"{kind}_bytes.all.{name}": n for kind in ("allocated", "reserved") for name, n in figures.items()}
    return {**stats, "num_alloc_retries": 0, "num_ooms": 0}


def mem_get_info(which: Any = None) -> tuple[int, int]:
    """`mem_get_info`: what is free, and all."""
    return device.capacity() - allocated(which), state.machine.memory_of_each


def set_per_process_memory_fraction(fraction: float, which: Any = None) -> None:
    device.set_capacity(int(state.machine.memory_of_each * fraction))


def _generators() -> list[torch.Generator]:
    return list(map(device.default_generator, range(len(state.visible))))


def manual_seed(seed: int) -> None:
    device.default_generator(device.current_device()).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in _generators():
        generator.manual_seed(seed)


def set_sync_debug_mode(mode: int | str) -> None:
    """`set_sync_debug_mode`: a warning wherever an operator makes the host wait."""

    def warn(kind: str) -> None:
        if not kind.endswith("synchronize"):  # what is asked for by name
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    device.on_wait(warn if mode in (1, "warn") else None)


FUNCTIONS: dict[str, Any] = {
    "is_available": lambda: bool(state.visible),
    "_is_compiled": lambda: True,
    "_is_in_bad_fork": lambda: False,
    "is_initialized": lambda: bool(state.visible),
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_lazy_call": lambda call, **_: call(),
    "device_count": lambda: len(state.visible),
    "_device_count_nvml": lambda: len(state.visible),
    "current_device": device.current_device,
    "set_device": lambda which: exchange_device(index_of(which)),
    "device": DeviceContext,
    "device_of": DeviceOf,
    "_exchange_device": exchange_device,
    "_maybe_exchange_device": exchange_device,
    "get_device_name": lambda which=None: get_device_properties(which).name,
    "get_device_capability": lambda which=None: state.machine.profile.capability,
    "get_device_properties": get_device_properties,
    "get_arch_list": lambda: [state.machine.profile.arch],
    "can_device_access_peer": lambda *_: True,
    "synchronize": lambda which=None: device.synchronize(index_of(which)),
    "Stream": Stream,
    "ExternalStream": Stream,
    "Event": Event,
    "current_stream": current_stream,
    "default_stream": lambda which=None: _stream(which, 0),
    "stream": StreamContext,
    "StreamContext": StreamContext,
    "set_stream": set_stream,
    "is_bf16_supported": is_bf16_supported,
    "is_tf32_supported": lambda: state.machine.profile.capability >= (8, 0),
    "is_current_stream_capturing": lambda: False,
    "memory_allocated": allocated,
    "memory_reserved": allocated,
    "memory_cached": allocated,
    "max_memory_allocated": most_allocated,
    "max_memory_reserved": most_allocated,
    "max_memory_cached": most_allocated,
    "reset_peak_memory_stats": lambda which=None: device.reset_peak(index_of(which)),
    "reset_max_memory_allocated": lambda which=None: device.reset_peak(index_of(which)),
    "reset_max_memory_cached": lambda which=None: None,
    "reset_accumulated_memory_stats": lambda which=None: None,
    "memory_stats": memory_stats,
    "mem_get_info": mem_get_info,
    "set_per_process_memory_fraction": set_per_process_memory_fraction,
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "memory_snapshot": lambda *_, **__: [],
    "memory_summary": lambda *_, **__: "",
    "manual_seed": manual_seed,
    "manual_seed_all": manual_seed_all,
    "seed": lambda: None,
    "initial_seed": lambda: device.default_generator(device.current_device()).initial_seed(),
    "get_rng_state": lambda which=None: device.default_generator(index_of(which)).get_state(),
    "set_rng_state": lambda state, which=None: device.default_generator(index_of(which)).set_state(state),
    "get_rng_state_all": lambda: [generator.get_state() for generator in _generators()],
    "set_rng_state_all": lambda states: [g.set_state(s) for g, s in zip(_generators(), states, strict=True)],
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": set_sync_debug_mode,
    "utilization": lambda which=None: 0,
}
