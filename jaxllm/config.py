"""What a model is and how an engine runs, as frozen data: both are static arguments of jit."""
import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
DTYPES = ("float32", "bfloat16", "float16")
SCRATCH_PAGES = 4  # of each cache behind those of the pool: what the start-up proof reads and writes (engine/proof.py)


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) as its frequencies, one for each pair of rotated widths.

    `frequencies` already hold the scaling (linear, dynamic, llama3, yarn, longrope); `magnitude` multiplies cos and sin (yarn, longrope).
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ from one decoder layer to the next."""

    rope: RopeSpec
    window: int | None = None  # tokens a query sees, itself included; None: all


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer as data; families differ here and in their weight rules, not in the forward."""

    architecture: str
    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    layers: tuple[LayerSpec, ...]
    activation: Activation = "silu"
    tied: bool = False          # the output matrix is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False       # RMS norm over each head of q and k, before the rotation
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def attention_scale(self) -> float:
        return self.head_dim ** -0.5


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How one engine batches, and how much it may hold."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    page_size: int = 16
    enable_prefix_caching: bool = True
    seed: int = 0
    max_logprobs: int = 20

    @property
    def cache_pages(self) -> int:
        """Pages of the cache: the pool's, and the scratch pages behind them."""
        return self.num_pages + SCRATCH_PAGES

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)
