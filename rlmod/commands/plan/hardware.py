"""Memory and speed of one kind of machine."""

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Specifications of one accelerator: the data sheet's numbers, and the share of them that a run is assumed to reach."""

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    memory_gib: float
    """Memory of one accelerator, as the driver reports it."""
    reserve_gib: float
    """Memory that a run cannot use. Assumed: the driver's context, the buffers of collectives, fragmentation of the allocator."""
    bf16_tflops: float
    """Peak rate of dense products."""
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    """Rate in one direction, between accelerators of a node."""
    network_gb_per_s: float
    """Rate in one direction, per accelerator, between nodes."""
    devices_per_node: int = 8
    mfu: float
    """Assumed share of the peak rate in forward and backward passes."""
    bandwidth_share: float
    """Assumed share of the rates of memory and links."""
    layer_ms: float
    """Assumed minimum milliseconds per layer and token with sampler=hf, which launches its kernels one by one from Python."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("reserve_gib", "layer_ms") and value < 0:
                raise ValueError(f"hardware.{field.name} must be at least 0, got {value}")
            if field.name not in ("name", "kind", "reserve_gib", "layer_ms") and value <= 0:
                raise ValueError(f"hardware.{field.name} must be above 0, got {value}")
        for name in ("mfu", "bandwidth_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"hardware.{name} must be a share above 0 and at most 1, got {getattr(self, name)}")
        if self.reserve_gib >= self.memory_gib:
            raise ValueError(
                f"hardware.reserve_gib={self.reserve_gib} must be below hardware.memory_gib={self.memory_gib}"
            )

    def peak_flops(self, width: int) -> float:
        """Return the peak FLOPs per second for numbers of ``width`` bytes."""
        return 1e12 * (self.bf16_tflops if width == 2 else self.fp32_tflops)

    def link_bytes_per_second(self, ranks: int) -> float:
        """Return the bytes per second in one direction of the slowest link in a ring of ``ranks`` ranks."""
        rate = self.link_gb_per_s if ranks <= self.devices_per_node else self.network_gb_per_s
        return 1e9 * rate * self.bandwidth_share
