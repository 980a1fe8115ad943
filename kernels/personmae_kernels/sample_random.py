"""The one random source of the project: draws that are a pure function of (seed, epoch, sample number, stream, index).

Every choice made for a sample (crop boxes, flips, colour, mask, replacement, order in the epoch) comes from here, so the same run
comes out of any number of processes, workers or resumes, and from either loader.

The generator is splitmix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a counter-based hash:

    sample_seed = mix(mix(mix(mix(seed) + epoch) + stream) + sample)          64 bits, one per sample and stream
    draw k      = mix(sample_seed + (k + 1) * GOLDEN)                         64 bits, k = 0, 1, 2, ...

with all sums modulo 2**64. Where a sample is shown several times in a step (repeated sampling), its copy c draws as sample number
sample + c * 2**40 would: copy 0 is the sample itself.

Integers below n come from the upper 32 bits of a draw: (upper32 * n) >> 32; no floating point, so a C++ or Triton implementation can be equal to the
bit. Uniform floats use the upper 53 bits.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
UInt64Array = npt.NDArray[np.uint64]
# Sample numbers lie below 2**40; what lies above says which copy of the sample. Part of a run's identity, like the streams.
_COPY_BITS = 40


class Stream(enum.IntEnum):
    """What a draw is for: streams of one sample are independent of one another. Values are part of a run's identity: never renumber."""

    ORDER = 1
    REGIONS = 2
    FLIPS = 3
    MASK = 4
    COLOUR = 5
    ERASING = 6
    REPLACEMENT = 7
    MANNEQUIN = 8
    SHARDS = 12
    SHIFTS = 16
    OCCLUSIONS = 17
    IDENTITIES = 18
    HOLD_OUT = 19
    DROP_PATH = 32  # of the model, not of the data


def mix(values: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64: a bijection of 64-bit words in which each input bit changes half of the output bits.

    values: uint64 array of any shape. Returns uint64 of the same shape.
    """
    z = np.asarray(values, dtype=np.uint64) + np.uint64(0)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_seeds(seed: int, epoch: int, samples: npt.ArrayLike, stream: Stream, copies: npt.ArrayLike | None = None) -> UInt64Array:
    """One 64-bit seed for each sample.

    seed, epoch: integers (taken modulo 2**64). samples: integer array [N], sample numbers below 2**40. copies: integer array [N], which copy of the
    sample, from 0; None = 0 throughout. Returns uint64 [N].
    """
    word = 1 << 64
    if copies is not None:
        samples = np.asarray(samples, dtype=np.int64) + (np.asarray(copies, dtype=np.int64) << _COPY_BITS)
    with np.errstate(over="ignore"):
        key = mix(np.array([seed % word], dtype=np.uint64))
        key = mix(key + np.uint64(epoch % word))
        key = mix(key + np.uint64(int(stream)))
        return mix(key + np.asarray(samples).astype(np.uint64))


def draws(seeds: UInt64Array, num: int, first: int = 0) -> UInt64Array:
    """Draws number `first` to `first + num - 1` of each seed. seeds: uint64 [N]. Returns uint64 [N, num]."""
    with np.errstate(over="ignore"):
        counters = np.arange(first + 1, first + num + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        return mix(np.asarray(seeds, dtype=np.uint64)[:, None] + counters[None, :])


def integers_below(words: UInt64Array, bounds: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Integers in [0, bound), from the upper 32 bits of each word by multiplication and shift.

    words: uint64 of any shape. bounds: integers in [1, 2**32), broadcastable to it. Returns int64 of the broadcast shape.
    """
    upper = np.asarray(words, dtype=np.uint64) >> np.uint64(32)
    return ((upper * np.asarray(bounds).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def uniforms(words: UInt64Array) -> npt.NDArray[np.float64]:
    """Floats in [0, 1) from the upper 53 bits of each word. words: uint64 of any shape. Returns float64 of the same shape."""
    return (np.asarray(words, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: a permutation of range(num_samples), int64 [num_samples], by sorting one hash per sample.

    Sorting our own hash, not numpy's generator, keeps the order of a run across numpy versions. 4 million samples take well under a second.
    """
    keys = sample_seeds(seed, epoch, np.arange(num_samples), Stream.ORDER)
    return np.argsort(keys, kind="stable").astype(np.int64)
