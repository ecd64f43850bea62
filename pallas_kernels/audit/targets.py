"""The GPUs kernels are compiled for: what XLA asks about them, and what the model needs."""

from __future__ import annotations

import dataclasses

SUB_PARTITIONS = 4  # of an SM; each issues one warp instruction a cycle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One GPU. Sizes in bytes, bandwidth in bytes a second; rates per SM sub-partition and cycle.

    Attributes:
        int8_macs, bf16_macs: multiply-accumulates of the tensor pipe, from the published dense
            peaks divided by SMs and clock.
        fp32_lanes: lanes of the FMA pipe; 32 where a second datapath takes float32.
        half_on_tensor: fp16x2 and bf16x2 arithmetic shares the tensor pipe's port (sm_80), instead
            of running on the FMA pipe.
        l2_bytes_per_cycle: what all SMs together can read; the A100's is from its white paper, the
            others' are estimates.
    """

    name: str
    description: str
    capability: tuple[int, int]
    sms: int
    clock_ghz: float
    dram_bandwidth: int
    dram_size: int
    l2_size: int
    l2_bytes_per_cycle: int
    shared_per_sm: int
    shared_per_block: int
    warps_per_sm: int
    blocks_per_sm: int
    int8_macs: int
    bf16_macs: int
    fp32_lanes: int
    half_on_tensor: bool = False
    registers_per_sm: int = 65536

    @property
    def sm(self) -> str:
        """The architecture's name, "sm_80"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def dram_bytes_per_cycle(self) -> float:
        """DRAM bytes one SM can have per cycle when all SMs read."""
        return self.dram_bandwidth / (self.clock_ghz * 1e9) / self.sms

    def config(self) -> str:
        """The text-format GpuTargetConfigProto XLA compiles for."""
        major, minor = self.capability
        # wgmma exists only under the architecture-specific feature set, sm_90a
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_per_sm}
  shared_memory_per_block_optin: {self.shared_per_block}
  threads_per_core_limit: {32 * self.warps_per_sm}
  core_count: {self.sms}
  fpus_per_core: {SUB_PARTITIONS * self.fp32_lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {self.dram_bandwidth}
  l2_cache_size: {self.l2_size}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.dram_size}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: {self.registers_per_sm}
  registers_per_block_limit: 65536
  dnn_version: "9.10.0" driver_version: "13.0.0"
  runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.description}"
"""


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="a100",
            description="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            sms=108,
            clock_ghz=1.41,
            dram_bandwidth=2_039_040_000_000,
            dram_size=85_100_068_864,
            l2_size=40 << 20,
            l2_bytes_per_cycle=5120,
            shared_per_sm=164 << 10,
            shared_per_block=163 << 10,
            warps_per_sm=64,
            blocks_per_sm=32,
            int8_macs=512,  # 624 TOPS
            bf16_macs=256,  # 312 TFLOPS
            fp32_lanes=16,
            half_on_tensor=True,
        ),
        Target(
            name="a10",
            description="NVIDIA A10",
            capability=(8, 6),
            sms=72,
            clock_ghz=1.695,
            dram_bandwidth=600_096_000_000,
            dram_size=24_233_181_184,
            l2_size=6 << 20,
            l2_bytes_per_cycle=1536,
            shared_per_sm=100 << 10,
            shared_per_block=99 << 10,
            warps_per_sm=48,
            blocks_per_sm=16,
            int8_macs=256,  # 250 TOPS
            bf16_macs=128,  # 125 TFLOPS
            fp32_lanes=32,
        ),
        Target(
            name="l20",
            description="NVIDIA L20",
            capability=(8, 9),
            sms=92,
            clock_ghz=2.52,
            dram_bandwidth=864_000_000_000,
            dram_size=47_810_936_832,
            l2_size=96 << 20,
            l2_bytes_per_cycle=1920,
            shared_per_sm=100 << 10,
            shared_per_block=99 << 10,
            warps_per_sm=48,
            blocks_per_sm=24,
            int8_macs=128,  # 239 TOPS: half of what an L40S has per SM
            bf16_macs=64,  # 119.5 TFLOPS
            fp32_lanes=32,
        ),
        Target(
            name="h100",
            description="NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            sms=132,
            clock_ghz=1.83,  # the clock its published peaks are for
            dram_bandwidth=3_352_320_000_000,
            dram_size=84_942_979_072,
            l2_size=50 << 20,
            l2_bytes_per_cycle=5120,
            shared_per_sm=228 << 10,
            shared_per_block=227 << 10,
            warps_per_sm=64,
            blocks_per_sm=32,
            int8_macs=1024,  # 1979 TOPS
            bf16_macs=512,  # 989 TFLOPS
            fp32_lanes=32,
        ),
    )
}


def target(name: str) -> Target:
    """The target of this name.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in TARGETS:
        raise ValueError(f"no GPU named {name!r} is described; there are {', '.join(TARGETS)}")
    return TARGETS[name]
