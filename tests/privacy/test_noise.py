"""Noise: its distribution, its independence, and that no two draws are ever the same."""

from __future__ import annotations

import copy
import math
import os
import pickle
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedsb.privacy.noise import PAIRS, Noise, NoiseStream, SecretNoise, SeededNoise
from fedsb.utils.errors import UserError

# A right generator fails a test with p below this once in a million runs.
RARE = 1e-6
SOURCES = [SecretNoise, lambda: SeededNoise(3)]


class Constant(NoiseStream):
    """The same bits again and again: `words`, in turn."""

    def __init__(self, *words: int) -> None:
        self.words = words

    def _bits(self, count: int) -> NDArray[np.uint64]:
        return np.resize(np.array(self.words, dtype=np.uint64), count)


@pytest.mark.parametrize("source", SOURCES)
def test_normals_are_normal(source: type[SecretNoise]) -> None:
    x = source().normal(400_000)
    assert stats.kstest(x, "norm").pvalue > RARE
    assert abs(x.mean()) < 5 / math.sqrt(x.size)
    assert abs((x**2).mean() - 1) < 5 * math.sqrt(2 / x.size)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / x.size)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / x.size)
    for beyond in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(beyond)
        for share in ((x > beyond).mean(), (x < -beyond).mean()):
            assert abs(share - expected / 2) < 6 * math.sqrt(expected / 2 / x.size), beyond


@pytest.mark.parametrize("source", SOURCES)
def test_normals_are_independent(source: type[SecretNoise]) -> None:
    """Neither neighbours correlate, nor the two of a Box-Muller pair, nor one draw with the next, nor their squares."""
    noise = source()
    x = noise.normal(2 * PAIRS)
    bound = 5 / math.sqrt(PAIRS)
    for a, b in ((x[:-1], x[1:]), (x[:PAIRS], x[PAIRS:]), (x, noise.normal(2 * PAIRS))):
        assert abs(np.corrcoef(a, b)[0, 1]) < bound
        assert abs(np.corrcoef(a**2, b**2)[0, 1]) < bound
        assert abs(np.corrcoef(np.abs(a), b)[0, 1]) < bound


@pytest.mark.parametrize("shape", [0, 1, 7, (), (0, 3), (3, 5), (2, 3, 4), 2 * PAIRS - 1, 2 * PAIRS + 3])
def test_shapes(shape: int | tuple[int, ...]) -> None:
    x = SecretNoise().normal(shape)
    assert x.shape == (shape if isinstance(shape, tuple) else (shape,))
    assert x.dtype == np.float64
    assert np.isfinite(x).all()
    assert np.unique(x).size == x.size


def test_box_muller_by_hand() -> None:
    """u = 1 - e^-2 gives the radius 2; the angles are 0 and a quarter turn."""
    word = round((1 - math.exp(-2)) * 2**53) << 11
    quarter = 1 << 62
    # Two pairs: the first half of the words gives radii, the second half angles; cosines come first, then sines.
    x = Constant(word, word, 0, quarter).normal(4)
    np.testing.assert_allclose(x, [2, 0, 0, 2], atol=1e-15)


@pytest.mark.parametrize("word", [0, 1, 2**11 - 1, 2**63, 2**64 - 1])
def test_no_bits_give_an_infinite_normal(word: int) -> None:
    with np.errstate(all="raise"):
        x = Constant(word).normal(6)
    assert np.isfinite(x).all()
    assert np.abs(x).max() <= math.sqrt(106 * math.log(2)) + 1e-12  # 8.57


def test_all_bits_matter() -> None:
    """Uniforms have 53 bits: the lowest of them moves the normal, what is below it does not."""
    angle = 1 << 61
    assert Constant(1 << 63, angle).normal(2)[0] != Constant((1 << 63) + (1 << 11), angle).normal(2)[0]
    assert Constant(1 << 63, angle).normal(2)[0] == Constant((1 << 63) + (1 << 10), angle).normal(2)[0]


def test_nothing_is_drawn_twice() -> None:
    one, two = SecretNoise(), SecretNoise()
    drawn = np.concatenate([one.normal(5000), two.normal(5000), one.normal((50, 100)).ravel(), two.normal(5000)])
    assert np.unique(drawn).size == drawn.size


def test_the_stream_is_aes_in_counter_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    asked: list[int] = []
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(size) or bytes(range(size)))
    noise = SecretNoise()
    assert asked == [32]
    blocks = Cipher(algorithms.AES(bytes(range(32))), modes.ECB()).encryptor()
    expected = b"".join(blocks.update(counter.to_bytes(16, "big")) for counter in range(5))
    assert noise._bits(3).tobytes() + noise._bits(7).tobytes() == expected


def test_it_can_be_neither_copied_nor_written_down() -> None:
    noise = SecretNoise()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps, lambda noise: copy.deepcopy({"noise": noise})):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            attempt(noise)


def test_a_forked_process_draws_for_itself() -> None:
    noise = SecretNoise()
    noise.normal(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, noise.normal(8).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 64))
    os.close(read)
    os.close(write)
    ours = noise.normal(8)
    assert theirs.size == 8
    assert np.intersect1d(ours, theirs).size == 0


def test_seeded_noise_is_repeatable_and_says_so() -> None:
    def drawn(*key: int | str) -> list[float]:
        return SeededNoise(0, *key).normal(4).tolist()  # type: ignore[no-any-return]

    assert drawn("site-a", 3) == drawn("site-a", 3)
    assert not {*drawn("site-a", 3)} & {*drawn("site-a", 4)}
    assert not {*drawn("site-a")} & {*SeededNoise(1, "site-a").normal(4).tolist()}
    sources: list[Noise] = [SeededNoise(0), SecretNoise()]
    assert [source.secret for source in sources] == [False, True]


def test_no_global_generator_is_touched() -> None:
    before = np.random.get_state()[1].tolist()
    SecretNoise().normal(10), SeededNoise(0).poisson_sample(10, 0.5)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("rows", "q"), [(200, 0.05), (50, 0.6)])
def test_poisson_samples(source: type[SecretNoise], rows: int, q: float) -> None:
    """Each row for itself with probability q: sizes are binomial, rows are equally likely, pairs independent."""
    noise, draws = source(), 4000
    member = np.zeros((draws, rows))
    for row in member:
        row[noise.poisson_sample(rows, q)] = 1
    sizes = member.sum(axis=1)
    assert abs(sizes.mean() - q * rows) < 5 * math.sqrt(q * (1 - q) * rows / draws)
    assert abs(sizes.var() / (q * (1 - q) * rows) - 1) < 6 * math.sqrt(2 / draws)
    spread = ((member.mean(axis=0) - q) ** 2).sum() * draws / (q * (1 - q))
    assert RARE < stats.chi2.sf(spread, rows) < 1 - RARE
    for lag in (1, 7):
        pairs = (member[:, :-lag] * member[:, lag:]).mean()
        assert abs(pairs - q * q) < 6 * q * math.sqrt(4 / (draws * (rows - lag)))
    again = (member[:-1] * member[1:]).mean()
    assert abs(again - q * q) < 6 * q * math.sqrt(4 / (draws * rows))


def test_poisson_samples_at_the_edges() -> None:
    noise = SecretNoise()
    assert noise.poisson_sample(100, 1.0) == list(range(100))
    assert noise.poisson_sample(0, 0.5) == []
    assert noise.poisson_sample(100, 1e-15) == []  # once in ten million million runs
    drawn = noise.poisson_sample(1000, 0.5)
    assert drawn == sorted(set(drawn))
    assert all(type(row) is int for row in drawn)
    assert drawn != noise.poisson_sample(1000, 0.5)
    assert Constant(1 << 63).poisson_sample(2, 0.5) == []  # u = q is not below q
    assert Constant((1 << 63) - 1).poisson_sample(2, 0.5) == [0, 1]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(UserError, match=r'pip install "fedsb\[privacy\]"'):
        SecretNoise()
    SeededNoise(0).normal(2)
