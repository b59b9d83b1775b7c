"""Matrix products, norms and paged attention, each with one reduction tree whatever the batch.

This package imports jax only. `dispatch.choose` is the seam through which the engine picks an implementation.
"""
