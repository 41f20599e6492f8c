"""The rates of one kind of machine."""

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Specifications of one accelerator: its maker's numbers, and the share of them a run is assumed to reach."""

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    memory_gib: float
    """Memory of one accelerator, as the driver reports it."""
    reserve_gib: float
    """Assumed: the driver's context, the buffers of collectives, and what an allocator cannot use."""
    bf16_tflops: float
    """Dense."""
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    """In one direction, between accelerators of a node."""
    network_gb_per_s: float
    """In one direction, for each accelerator, between nodes."""
    devices_per_node: int = 8
    mfu: float
    """Assumed share of the peak rate in forward and backward passes."""
    bandwidth_share: float
    """Assumed share of the memory's and the links' rates."""
    layer_ms: float
    """Assumed: what a layer takes at least for a token of sampler=hf, which launches its kernels one by one from Python."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("reserve_gib", "layer_ms") and value < 0:
                raise ValueError(f"hardware.{field.name} must be at least 0, got {value}")
            if field.name not in ("name", "kind", "reserve_gib", "layer_ms") and value <= 0:
                raise ValueError(f"hardware.{field.name} must be above 0, got {value}")
        for name in ("mfu", "bandwidth_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"hardware.{name} is a share, at most 1, got {getattr(self, name)}")
        if self.reserve_gib >= self.memory_gib:
            raise ValueError(f"hardware.reserve_gib={self.reserve_gib} leaves nothing of memory_gib={self.memory_gib}")

    def flops(self, width: int) -> float:
        """A second, at its peak, of numbers of so many bytes."""
        return 1e12 * (self.bf16_tflops if width == 2 else self.fp32_tflops)

    def link(self, ranks: int) -> float:
        """Bytes a second and direction between so many ranks: the slowest of the links that a ring crosses."""
        rate = self.link_gb_per_s if ranks <= self.devices_per_node else self.network_gb_per_s
        return 1e9 * rate * self.bandwidth_share
