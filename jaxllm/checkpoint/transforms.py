"""Transforms of a weight rule as small frozen values: what a tensor goes through on its way to its target.

Each says the shape it makes (so that shapes are checked before any data is read) and makes it, as a view where numpy
can. Weights keep the checkpoint's [out, in] orientation, so most rules need none.
"""

from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Identity:
    """The tensor as it is."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return array


@dataclass(frozen=True)
class Transpose:
    """The tensor with its axes in the order `axes`, reversed by default."""

    axes: tuple[int, ...] | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axes = tuple(reversed(range(len(shape)))) if self.axes is None else self.axes
        if sorted(axes) != list(range(len(shape))):
            raise ValueError(f"{self} does not fit {len(shape)} dimensions")
        return tuple(shape[axis] for axis in axes)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.axes)


@dataclass(frozen=True)
class Slice:
    """The part [start, stop) along `axis`."""

    axis: int
    start: int
    stop: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not (0 <= self.axis < len(shape) and 0 <= self.start <= self.stop <= shape[self.axis]):
            raise ValueError(f"{self} does not fit the shape {list(shape)}")
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :])

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return array[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


@dataclass(frozen=True)
class Reshape:
    """The same values in row-major order under another shape, one size of which may be -1."""

    to: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        known, total = prod(size for size in self.to if size != -1), prod(shape)
        sizes = tuple(total // known if size == -1 and known else size for size in self.to)
        if self.to.count(-1) > 1 or prod(sizes) != total or any(size < 0 for size in sizes):
            raise ValueError(f"{self} does not fit the shape {list(shape)}")
        return sizes

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.to)


@dataclass(frozen=True)
class Concat:
    """The tensors of several source patterns, one after another along `axis`, in the rule's order."""

    axis: int = 0

    def join(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        first = shapes[0]
        if any(_without(shape, self.axis) != _without(first, self.axis) for shape in shapes):
            raise ValueError(f"{self} does not fit the shapes {[list(shape) for shape in shapes[:4]]}")
        return (*first[: self.axis], sum(shape[self.axis] for shape in shapes), *first[self.axis + 1 :])

    def windows(self, out: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """The part of `out` that each source fills."""
        edges = np.cumsum([0] + [shape[self.axis] for shape in shapes])
        before = (slice(None),) * self.axis
        return [out[(*before, slice(start, stop))] for start, stop in zip(edges[:-1], edges[1:], strict=True)]


@dataclass(frozen=True)
class Stack:
    """The tensors of one pattern, stacked on a new `axis` in the order of the placeholder that the target lacks."""

    axis: int = 0

    def join(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        first = shapes[0]
        if any(shape != first for shape in shapes) or not 0 <= self.axis <= len(first):
            raise ValueError(f"{self} does not fit the shapes {[list(shape) for shape in shapes[:4]]}")
        return (*first[: self.axis], len(shapes), *first[self.axis :])

    def windows(self, out: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """The part of `out` that each source fills."""
        before = (slice(None),) * self.axis
        return [out[(*before, index)] for index in range(len(shapes))]


type Transform = Identity | Transpose | Slice | Reshape | Concat | Stack


def chain_of(transform: Transform | tuple[Transform, ...]) -> tuple[Transform, ...]:
    """The transforms as a tuple, identities left out."""
    steps = transform if isinstance(transform, tuple) else (transform,)
    return tuple(step for step in steps if not isinstance(step, Identity))


def chain_shape(chain: tuple[Transform, ...], shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that the chain makes of sources with these shapes; ValueError names the step that does not fit."""
    for step in chain:
        shapes = [step.join(shapes)] if isinstance(step, Concat | Stack) else [step.shape(shape) for shape in shapes]
    return shapes[0]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    if not 0 <= axis < len(shape):
        raise ValueError(f"axis {axis} does not fit the shape {list(shape)}")
    return shape[:axis] + shape[axis + 1 :]
