"""How much memory the KV cache gets, and what that holds."""
import jax

from jaxllm.config import ModelConfig
from jaxllm.errors import CapacityError

GIB = 1 << 30
CPU_DEFAULT_BYTES = GIB  # on a CPU the cache shares memory with everything else, so it does not take what is free


def page_bytes(cfg: ModelConfig, page_size: int, itemsize: int) -> int:
    """Bytes of one page: keys and values of every layer."""
    return 2 * len(cfg.layers) * page_size * cfg.num_kv_heads * cfg.head_dim * itemsize


def cache_bytes(device: jax.Device, gpu_memory_utilization: float) -> int:
    """What the cache may take on a device that already holds the weights."""
    if device.platform == "cpu":
        return CPU_DEFAULT_BYTES
    stats = device.memory_stats() or {}
    limit, used = stats.get("bytes_limit", 0), stats.get("bytes_in_use", 0)
    return int(limit * gpu_memory_utilization) - used


def plan_cache(cfg: ModelConfig, itemsize: int, budget: int, *, max_model_len: int | None, max_num_seqs: int,
               page_size: int) -> tuple[int, int]:
    """(num_pages, max_model_len): no more pages than the sequences could fill, no longer context than the pages hold.

    Raises CapacityError when a context length that was asked for does not fit.
    """
    one = page_bytes(cfg, page_size, itemsize)
    wanted = max_model_len or cfg.max_position
    pages = min(budget // one, max_num_seqs * -(-wanted // page_size))
    if pages * page_size < wanted:
        if max_model_len is not None or pages < 1:
            raise CapacityError(
                f"the KV cache has {max(budget, 0) / GIB:.2f} GiB, which holds {max(pages, 0) * page_size} tokens, and max_model_len is "
                f"{wanted}, which needs {-(-wanted // page_size) * one / GIB:.2f} GiB; lower max_model_len or raise kv_cache_memory_bytes")
        wanted = pages * page_size
    return pages, wanted


