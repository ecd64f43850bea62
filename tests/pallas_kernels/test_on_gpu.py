"""What only a GPU can show: compiled kernels are right. `make gpu-check` tries more shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_check
from lowbit_jax.models.attention import attention
from pallas_kernels.audit.cases import OPS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(1, 3072, 9216), (130, 1152, 257), (1024, 3072, 3072)])
@pytest.mark.parametrize("op", OPS)
def test_a_compiled_kernel_equals_numpy(op, shape):
    """One row, tails in m and n, whole tiles."""
    assert gpu_check.check(op, *shape, implementation="triton").fault is None


@pytest.mark.parametrize(("t", "dim"), [(1023, 72), (256, 128)])
def test_fused_attention_equals_float32(t, dim):
    """bfloat16 against the plain form in float32: 2^-7 of numbers near 1."""
    rng = np.random.default_rng(0)
    qkv = [rng.standard_normal((2, t, 4, dim), np.float32) for _ in range(3)]
    fused = jax.jit(attention)(*(jnp.asarray(x, jnp.bfloat16) for x in qkv))
    np.testing.assert_allclose(fused.astype(jnp.float32), attention(*qkv), atol=2e-2)
