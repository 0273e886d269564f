"""Noise against golden values, and against what makes it noise."""

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator import noise
from orchestrator.noise import NoiseKind, TensorRegion

NAME = "model.layers.0.mlp.down_proj.weight"
SAMPLES = 200_000
DIGEST_GOLDEN = 16874582684468401407


def test_philox_gives_the_published_words() -> None:
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    zero_words = noise.philox((0, 0, 0, 0), (0, 0))
    one_words = noise.philox((ones, ones, ones, ones), (ones, ones))
    pi_words = noise.philox(pi, (0xA4093822, 0x299F31D0))
    assert [int(word) for word in zero_words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word) for word in one_words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert [int(word) for word in pi_words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_philox_of_arrays_is_philox_of_each_element() -> None:
    low = np.array([0, 7, 0xFFFFFFFF], np.uint32)
    together = np.stack(noise.philox((low, 5, 6, 7), (8, 9)), axis=-1)
    alone = [noise.philox((int(word), 5, 6, 7), (8, 9)) for word in low]
    assert together.tolist() == [[int(word) for word in words] for words in alone]


def test_gaussian_is_what_it_was() -> None:
    z = noise.draw("gaussian", 0x0123456789ABCDEF, NAME, 2**36 + 5, 6)
    assert [float(value).hex() for value in z] == [
        "-0x1.a0cc3e0000000p-2",
        "-0x1.70b9e20000000p+0",
        "0x1.8d7fe80000000p+0",
        "0x1.ece92e0000000p-2",
        "-0x1.4fa8e80000000p+0",
        "0x1.d532a40000000p-3",
    ]


def test_rademacher_is_what_it_was() -> None:
    z = noise.draw("rademacher", 0x0123456789ABCDEF, NAME, 2**40 + 120, 16)
    assert z.astype(int).tolist() == [-1, 1, 1, 1, 1, -1, -1, -1, 1, -1, -1, 1, 1, -1, 1, -1]


def test_rounding_bits_are_what_they_were() -> None:
    assert noise.rounding_bits(2**32 + 3, NAME, 2**36 + 5, 6).tolist() == [
        3193,
        29472,
        21577,
        1881,
        24508,
        49248,
    ]


def test_low_rank_is_what_it_was() -> None:
    left, right = factors(7, NAME, (2, 3, 2))
    assert [float(value).hex() for value in noise.low_rank(left, right).ravel()] == [
        "0x1.5300000000000p-1",
        "0x1.65e0000000000p+1",
        "0x1.a200000000000p-2",
        "-0x1.bf00000000000p-1",
    ]


def factors(
    seed: int, name: str, shape: tuple[int, int, int]
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    rows, rank, columns = shape
    left = noise.factor("gaussian", seed, f"{name}.u", 0, rows * rank)
    right = noise.factor("gaussian", seed, f"{name}.v", 0, rank * columns)
    return left.reshape(rows, rank), right.reshape(rank, columns)


def test_low_rank_products_are_exact() -> None:
    extreme = np.full((1, 256), 112, np.int8)
    z = noise.low_rank(extreme, extreme.T)
    assert z.tolist() == [[256 * (112 / 32) ** 2]]


def test_coarse_noise_is_the_nearest_of_8_bits() -> None:
    fine = noise.draw("gaussian", 5, NAME, 77, SAMPLES)
    coarse = noise.draw("coarse_gaussian", 5, NAME, 77, SAMPLES)
    assert np.array_equal(coarse * 32, np.rint(fine * 32)) and np.abs(coarse).max() * 32 == 112
    assert abs(np.mean(noise.magnitudes("coarse_gaussian").astype(float) ** 2) - 1) < 3e-4


def test_low_rank_has_unit_variance() -> None:
    left, right = factors(7, "a", (300, 16, 300))
    mean, variance, _, _ = _moments(
        noise.low_rank(left, right) * noise.low_rank_coefficient(1.0, 16)
    )
    assert abs(mean) < 0.01
    assert abs(variance - 1) < 0.1


def test_seeds_are_what_they_were() -> None:
    seeds = [noise.derive_seed(run, step, 1) for run, step in [(0, 0), (2**63 + 1, 2**33)]]
    assert seeds == [9353530010257878950, 4588694232511165019]


def test_numbers_for_tokens_are_those_of_their_own_stream() -> None:
    seed, position = 0x0123456789ABCDEF, 2**32 + 7
    low, high, _, _ = noise.philox((7, 1, 0, 5), (0x89ABCDEF, 0x01234567))
    bits = int(low) | (int(high) >> 16) << 32
    assert noise.token_uniforms([3, seed], [0, position])[1] == (2 * bits + 1) / 2**49
    numbers = noise.token_uniforms([seed] * SAMPLES, range(SAMPLES))
    assert numbers.min() > 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 / np.sqrt(12 * SAMPLES)
    assert abs(numbers.var() - 1 / 12) < 0.001


def test_permutation_is_what_it_was() -> None:
    assert noise.permutation(2**40 + 1, 3, 12).tolist() == [2, 9, 1, 8, 3, 5, 6, 10, 11, 4, 7, 0]


def test_gaussian_reads_halfwords_in_the_specified_order() -> None:
    words = noise.philox((3, 0, noise.tensor_word("a"), 0), (11, 0))
    halfwords = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16)]
    table = noise.gaussian_magnitudes()
    wanted = [table[half >> 6] * (-1 if half & 1 else 1) for half in halfwords]
    assert noise.draw("gaussian", 11, "a", 24, 8).tolist() == wanted


def test_rademacher_reads_bits_in_the_specified_order() -> None:
    words = noise.philox((3, 0, noise.tensor_word("a"), 0), (11, 0))
    wanted = [-1 if int(word) >> bit & 1 else 1 for word in words for bit in range(32)]
    assert noise.draw("rademacher", 11, "a", 3 * 128, 128).tolist() == wanted


def test_magnitudes_are_scaled_normal_quantiles() -> None:
    quantiles = [NormalDist().inv_cdf(0.5 + (k + 0.5) / 2048) for k in range(1024)]
    scaled = np.array(quantiles) / np.sqrt(np.mean(np.square(quantiles)))
    table = noise.gaussian_magnitudes()
    np.testing.assert_allclose(table, scaled, rtol=1e-6)
    assert abs(np.mean(table.astype(np.float64) ** 2) - 1) < 1e-7
    assert not table.flags.writeable


def test_altered_magnitudes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = Path(noise.__file__).with_name("gaussian_magnitudes.txt").read_text()
    altered = tmp_path / "gaussian_magnitudes.txt"
    altered.write_text(original[:-2] + ("0" if original[-2] != "0" else "1") + "\n")
    monkeypatch.setattr(noise, "_MAGNITUDES_FILE", altered)
    with pytest.raises(RuntimeError, match="altered"):
        noise.gaussian_magnitudes.__wrapped__()


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_a_part_of_a_tensor_draws_what_the_whole_draws(kind: NoiseKind) -> None:
    whole = noise.draw(kind, 9, NAME, 0, 700)
    assert noise.draw(kind, 9, NAME, 333, 200).tolist() == whole[333:533].tolist()


def _moments(z: NDArray[np.float32]) -> list[float]:
    return [float(np.mean(z.astype(np.float64) ** power)) for power in (1, 2, 3, 4)]


def test_gaussian_has_the_moments_of_a_normal() -> None:
    mean, variance, third, fourth = _moments(noise.draw("gaussian", 1, NAME, 3, SAMPLES))
    assert abs(mean) < 0.01
    assert abs(variance - 1) < 0.015
    assert abs(third) < 0.05
    assert abs(fourth - 3) < 0.1


def test_rademacher_is_a_fair_sign() -> None:
    z = noise.draw("rademacher", 1, NAME, 3, SAMPLES)
    assert set(z.tolist()) == {-1.0, 1.0}
    assert abs(np.mean(z)) < 0.01


def test_every_rounding_bit_is_fair() -> None:
    bits = noise.rounding_bits(1, NAME, 3, SAMPLES)
    shares = [float(np.mean(bits >> bit & 1)) for bit in range(16)]
    assert max(abs(share - 0.5) for share in shares) < 0.01


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_other_seeds_tensors_and_places_are_uncorrelated(kind: NoiseKind) -> None:
    z = noise.draw(kind, 5, "a", 0, SAMPLES)
    others = {
        "seed's low word": noise.draw(kind, 6, "a", 0, SAMPLES),
        "seed's high word": noise.draw(kind, 5 + 2**32, "a", 0, SAMPLES),
        "tensor": noise.draw(kind, 5, "b", 0, SAMPLES),
        "neighbour": noise.draw(kind, 5, "a", 1, SAMPLES),
        "next block": noise.draw(kind, 5, "a", 128, SAMPLES),
        "index's high word": noise.draw(kind, 5, "a", 2**40, SAMPLES),
    }
    correlations = {what: abs(float(np.mean(z * other))) for what, other in others.items()}
    assert max(correlations.values()) < 5 / SAMPLES**0.5, correlations


def test_streams_keep_uses_of_one_key_apart() -> None:
    halfwords = noise.rounding_bits(5, "a", 0, SAMPLES)
    signs = np.where(halfwords & 1, -1.0, 1.0)
    z = noise.draw("gaussian", 5, "a", 0, SAMPLES)
    assert abs(float(np.mean(z * signs))) < 5 / SAMPLES**0.5


def test_seeds_differ_by_run_step_and_index() -> None:
    places = [(run, step, index) for run in range(5) for step in range(20) for index in range(5)]
    assert len({noise.derive_seed(*place) for place in places}) == len(places)


def test_seeds_of_samples_are_of_run_step_example_and_sample_alone() -> None:
    found = [noise.sample_seeds(run, step, range(5), 3) for run in (0, 1) for step in (0, 1)]
    every = [seed for seeds in found for seed in seeds]
    assert len(set(every)) == len(every) == 60
    assert noise.sample_seeds(0, 1, [4, 2, 4], 2) == [
        found[1][3 * example + sample] for example in (4, 2, 4) for sample in (0, 1)
    ]
    word_0, word_1, _, _ = noise.philox((1, 4, 2, noise.Stream.SAMPLES), (0, 0))
    assert found[1][14] == int(word_0) | int(word_1) << 32
    assert not set(every) & {noise.derive_seed(run, 0, i) for run in (0, 1) for i in range(9)}


def test_permutation_is_one_and_differs_by_epoch() -> None:
    first, second = (noise.permutation(1, epoch, 1000) for epoch in (0, 1))
    assert first.dtype == np.int64
    assert sorted(first.tolist()) == list(range(1000))
    assert first.tolist() != second.tolist()


def test_digest_is_what_it_was_and_sees_places_and_bits() -> None:
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    region = TensorRegion("a", 2**40, 10)
    swapped = bits[:, ::-1]
    assert noise.digest(bits, region) == DIGEST_GOLDEN
    assert noise.digest(swapped, region) != DIGEST_GOLDEN
    assert noise.digest(bits, TensorRegion("a", 2**40 + 1, 10)) != DIGEST_GOLDEN
    assert noise.digest(bits ^ np.uint16(1), region) != DIGEST_GOLDEN


def test_an_empty_tensor_has_a_digest() -> None:
    region = TensorRegion("a", 2**40, 10)
    for shape in ((0, 5), (3, 0)):
        assert noise.digest(np.zeros(shape, np.uint16), region) == 0


def test_digests_of_shards_add_up() -> None:
    bits = np.arange(60, dtype=np.uint32).reshape(6, 10)
    halves = [
        noise.digest(bits[:, first : first + 5], TensorRegion("a", 100 + first, 10))
        for first in (0, 5)
    ]
    assert sum(halves) % 2**64 == noise.digest(bits, TensorRegion("a", 100, 10))
