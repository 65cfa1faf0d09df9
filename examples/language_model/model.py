"""A decoder as large models are: pre-norm, RMSNorm, rotary positions, causal attention, SwiGLU.

The layers are one `nn.scan`, so that 2 and 32 of them compile alike, and each is rematerialised:
what is kept between the forward and the backward pass is one activation a layer.

References:
    A. Vaswani et al. Attention is all you need. NeurIPS 2017.
    B. Zhang, R. Sennrich. Root mean square layer normalization. NeurIPS 2019.
    J. Su et al. RoFormer: enhanced transformer with rotary position embedding. 2021.
    N. Shazeer. GLU variants improve transformer. 2020.
    H. Touvron et al. LLaMA: open and efficient foundation language models. 2023 (the 7B's sizes).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from bilevel_flax.train.config import ConfigError, check_choice


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a decoder.

    Attributes:
        layers: how many.
        width: of the residual stream.
        heads: of the attention, each `width // heads` (an even number) wide.
        hidden: of the SwiGLU layers.
        vocabulary: tokens; bytes are 0 .. 255 of it.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int


SIZES = {
    "micro": Size(layers=1, width=64, heads=4, hidden=128, vocabulary=256),
    "tiny": Size(layers=2, width=64, heads=4, hidden=192, vocabulary=256),
    "small": Size(layers=12, width=256, heads=8, hidden=704, vocabulary=256),
    "1b": Size(layers=18, width=2048, heads=16, hidden=5632, vocabulary=32_768),
    "7b": Size(layers=32, width=4096, heads=32, hidden=11_008, vocabulary=32_768),
}

# Which axis of a leaf lies along which axis of the mesh; the leading one of a layer's leaf is that
# of the scan. Columns first, rows second: two reductions a layer over `tensor`, as in Megatron-LM.
RULES = (
    ("attention/(query|key|value)/kernel$", "-,fsdp,tensor,-"),
    ("attention/out/kernel$", "-,tensor,-,fsdp"),
    ("mlp/(gate|up)/kernel$", "-,fsdp,tensor"),
    ("mlp/down/kernel$", "-,tensor,fsdp"),
    ("embedding$", "tensor,fsdp"),
    ("head/kernel$", "fsdp,tensor"),
)

_BATCH_AXES = ("data", "fsdp")


def by_example(activations: jax.Array) -> jax.Array:
    """Keeps an activation [batch, ...] cut by examples, in a program for a mesh with auto axes.

    Without it the partitioner may follow the weights instead, and move activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) & set(_BATCH_AXES):
        return activations
    if not isinstance(activations, Tracer):
        return activations
    axes = tuple(axis for axis in _BATCH_AXES if axis in mesh.axis_names)
    cut = math.prod(mesh.shape[axis] for axis in axes)
    if not axes or activations.shape[0] % cut:
        return activations
    spec = jax.sharding.PartitionSpec(axes)
    return jax.lax.with_sharding_constraint(activations, spec)


class RMSNorm(nn.Module):
    """x / rms(x), scaled; the mean square in float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Of the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        root = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
        return (wide * root).astype(self.dtype) * scale.astype(self.dtype)[None, None]


def rotated(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions: pairs of features of x [batch, length, heads, size] turn with them."""
    half = x.shape[-1] // 2
    rates = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates[None, :]
    turn = tuple(f(angles)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * turn[0] - second * turn[1], first * turn[1] + second * turn[0]], axis=-1
    )


def _causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """[batch, length, heads, size] each."""
    size, length = query.shape[-1], query.shape[1]
    logits = jnp.einsum(
        "bqhs,bkhs->bhqk", query * size**-0.5, key, preferred_element_type=jnp.float32
    )
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = nn.softmax(jnp.where(causal, logits, -1e30), axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhs->bqhs", weights, value)


class Attention(nn.Module):
    """Causal self-attention; logits and softmax in float32, or a `kernel(query, key, value)`."""

    size: Size
    dtype: Any
    kernel: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, width] -> the same."""
        size = self.size.width // self.size.heads
        project = lambda name: nn.DenseGeneral(
            (self.size.heads, size), use_bias=False, dtype=self.dtype, name=name
        )(x)
        query, key, value = rotated(project("query")), rotated(project("key")), project("value")
        attend = _causal_attention if self.kernel is None else self.kernel
        mixed = attend(query, key, value)
        return nn.DenseGeneral(
            self.size.width,
            axis=(-2, -1),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_residual_init(self.size),
            name="out",
        )(mixed)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    size: Size
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, width] -> the same."""
        wide = lambda name: nn.Dense(self.size.hidden, use_bias=False, dtype=self.dtype, name=name)(
            x
        )
        return nn.Dense(
            self.size.width,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_residual_init(self.size),
            name="down",
        )(nn.silu(wide("gate")) * wide("up"))


class Layer(nn.Module):
    """One layer, in the form that `nn.scan` wants."""

    size: Size
    dtype: Any
    attention: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """[batch, length, width] -> the same."""
        norm = lambda name: RMSNorm(self.dtype, name=name)
        x = x + Attention(self.size, self.dtype, self.attention, name="attention")(
            norm("attention_norm")(x)
        )
        x = x + SwiGLU(self.size, self.dtype, name="mlp")(norm("mlp_norm")(x))
        return by_example(x), None


class Decoder(nn.Module):
    """Tokens [batch, length] -> the hidden states, or the next tokens' losses.

    Attributes:
        size: its shape.
        dtype: of the computation; the parameters are float32.
        remat: recompute each layer's forward pass in the backward one.
        attention: a causal kernel, `attention(query, key, value)` on [batch, length, heads, size],
            e.g. `functools.partial(bf.oracles.dot_product_attention, is_causal=True)`.
    """

    size: Size
    dtype: Any = jnp.bfloat16
    remat: bool = True
    attention: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Losses of the next tokens.

        Args:
            tokens: integers [batch, length + 1].

        Returns:
            Float32 [batch, length], nats.
        """
        tokens = tokens.astype(jnp.int32)
        embed = nn.Embed(
            self.size.vocabulary,
            self.size.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="embed",
        )
        x = by_example(embed(tokens[:, :-1]))
        # The loop's body is compiled by itself: nothing there to eliminate by mistake.
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.size.layers,
        )
        x, _ = layers(self.size, self.dtype, self.attention, name="layers")(x, None)
        head = nn.remat(Head, prevent_cse=False) if self.remat else Head
        return head(self.size, self.dtype, name="head")(x, tokens[:, 1:])


class Head(nn.Module):
    """Hidden states and targets -> losses; the logits are never kept."""

    size: Size
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array) -> jax.Array:
        """[batch, length, width], [batch, length] -> float32 [batch, length]."""
        x = RMSNorm(self.dtype, name="norm")(x)
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (self.size.width, self.size.vocabulary)
        )
        logits = jnp.einsum(
            "blw,wv->blv", x, kernel.astype(self.dtype), preferred_element_type=jnp.float32
        )
        # A comparison instead of a gather: the vocabulary may be cut over devices.
        chosen = jnp.arange(self.size.vocabulary)[None, None, :] == targets[..., None]
        return nn.logsumexp(logits, axis=-1) - jnp.where(chosen, logits, 0.0).sum(-1)


def _residual_init(size: Size) -> Any:
    """Smaller the more layers add up, as in GPT-2."""
    return nn.initializers.variance_scaling(1 / (2 * size.layers), "fan_in", "truncated_normal")


def make_model(name: str, dtype: str, remat: bool) -> Decoder:
    """The decoder of a named size.

    Raises:
        ConfigError: an unknown size or dtype.
    """
    check_choice(f"--config.size={name}", name, SIZES)
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"--config.dtype={dtype}: choose bfloat16 or float32")
    return Decoder(SIZES[name], jnp.dtype(dtype), remat)
