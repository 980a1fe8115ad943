"""The random source: equal to published splitmix64, to plain integers, and as independent as it claims."""

import numpy as np
import pytest

from personmae_kernels.sample_random import GOLDEN, Stream, draws, integers_below, mix, permutation, sample_seeds, uniforms

WORD = 1 << 64

# First outputs of splitmix64: for seed 1234567 as on Rosetta Code ("Pseudo-random numbers/Splitmix64"), for seed 0 as the tests of many
# implementations quote them from Vigna's splitmix64.c.
PUBLISHED = {
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
}


def plain_mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def plain_seed(seed: int, epoch: int, stream: int, sample: int) -> int:
    key = plain_mix(seed % WORD)
    for part in (epoch, stream, sample):
        key = plain_mix((key + part) % WORD)
    return key


@pytest.mark.parametrize("seed", PUBLISHED)
def test_draws_are_published_splitmix64(seed):
    words = draws(np.array([seed], dtype=np.uint64), 5)
    assert words.dtype == np.uint64
    assert words[0].tolist() == PUBLISHED[seed]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (-1, 2), (2**64 + 5, 1), (2**63, 2**40)])
def test_seeds_and_draws_equal_plain_integers(seed, epoch):
    samples = np.array([0, 1, 2, 12345, 4_180_000], dtype=np.int64)
    seeds = sample_seeds(seed, epoch, samples, Stream.FLIPS)
    words = draws(seeds, 4, first=3)
    for position, sample in enumerate(samples.tolist()):
        expected = plain_seed(seed, epoch % WORD, int(Stream.FLIPS), sample)
        assert int(seeds[position]) == expected
        assert words[position].tolist() == [plain_mix((expected + (k + 1) * GOLDEN) % WORD) for k in range(3, 7)]


def test_a_later_first_draw_gives_the_tail_of_the_same_draws():
    seeds = sample_seeds(1, 2, np.arange(5), Stream.MASK)
    assert np.array_equal(draws(seeds, 9)[:, 4:], draws(seeds, 5, first=4))


def test_mix_keeps_its_input_and_collides_nowhere():
    values = np.arange(100_000, dtype=np.uint64)
    kept = values.copy()
    assert len(np.unique(mix(values))) == len(values)
    assert np.array_equal(values, kept)


def test_each_input_bit_changes_half_of_the_output_bits():
    values = sample_seeds(3, 0, np.arange(2000), Stream.ORDER)
    for bit in range(64):
        changed = mix(values) ^ mix(values ^ np.uint64(1 << bit))
        share = np.unpackbits(changed.view(np.uint8)).mean()
        assert 0.48 < share < 0.52, f"input bit {bit} changes {share:.3f} of the output bits"


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 128, 1000, 2**31 + 7, 2**32 - 1])
def test_integers_below_equal_plain_integers(bound):
    words = draws(np.arange(50, dtype=np.uint64), 20)
    expected = [[((word >> 32) * bound) >> 32 for word in row] for row in words.tolist()]
    numbers = integers_below(words, bound)
    assert numbers.dtype == np.int64
    assert numbers.tolist() == expected
    assert numbers.max() < bound


def test_integers_below_reach_both_ends_and_take_a_bound_for_each_word():
    words = np.array([0, WORD - 1, WORD - 1], dtype=np.uint64)
    assert integers_below(words, np.array([7, 7, 1])).tolist() == [0, 6, 0]


def test_integers_are_uniform():
    numbers = integers_below(draws(sample_seeds(0, 0, np.arange(20_000), Stream.MASK), 5), 10)
    counts = np.bincount(numbers.reshape(-1), minlength=10)
    expected = numbers.size / 10
    # Chi-squared with 9 degrees of freedom: 27.9 has probability 0.001; the draws are fixed, so this passes or fails for good.
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_uniforms_fill_the_half_open_unit_interval():
    assert uniforms(np.array([0, WORD - 1], dtype=np.uint64)).tolist() == [0.0, 1.0 - 2.0**-53]
    values = uniforms(draws(sample_seeds(0, 0, np.arange(50_000), Stream.COLOUR), 2))
    assert values.dtype == np.float64
    assert abs(values.mean() - 0.5) < 0.004
    assert abs(values.var() - 1 / 12) < 0.002


def test_samples_epochs_streams_seeds_and_draw_numbers_are_independent():
    samples = np.arange(20_000)

    def first(seed: int, epoch: int, stream: Stream, shift: int = 0, draw: int = 0) -> np.ndarray:
        return uniforms(draws(sample_seeds(seed, epoch, samples + shift, stream), 1, first=draw)[:, 0])

    reference = first(0, 0, Stream.REGIONS)
    others = {
        "the next sample": first(0, 0, Stream.REGIONS, shift=1),
        "the next epoch": first(0, 1, Stream.REGIONS),
        "another stream": first(0, 0, Stream.FLIPS),
        "the next seed": first(1, 0, Stream.REGIONS),
        "the next draw": first(0, 0, Stream.REGIONS, draw=1),
    }
    for name, values in others.items():
        # The standard error of a correlation of independent values is 1 / sqrt(20,000) = 0.007.
        assert abs(np.corrcoef(reference, values)[0, 1]) < 0.028, name


def test_seed_epoch_and_stream_do_not_stand_in_for_one_another():
    cases = [(seed, epoch, stream) for seed in range(4) for epoch in range(4) for stream in Stream]
    seeds = {int(sample_seeds(seed, epoch, [5], stream)[0]) for seed, epoch, stream in cases}
    assert len(seeds) == len(cases)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 1000])
def test_permutation_holds_each_sample_once(num_samples):
    order = permutation(3, 1, num_samples)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_permutation_depends_on_seed_and_epoch_alone_and_mixes():
    order = permutation(3, 1, 1000)
    assert np.array_equal(order, permutation(3, 1, 1000))
    for other in (permutation(4, 1, 1000), permutation(3, 2, 1000)):
        assert (order == other).sum() < 10
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.13
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.13


def test_permutation_equals_a_sort_of_plain_integers():
    expected = sorted(range(200), key=lambda sample: plain_seed(9, 4, int(Stream.ORDER), sample))
    assert permutation(9, 4, 200).tolist() == expected
