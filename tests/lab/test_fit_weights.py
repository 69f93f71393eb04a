"""Mutual information by distance, and the position weights fitted to it."""

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest

from tst_ext.lab.fit_weights import fit, fit_weights, independent_floor, mutual_information
from tst_ext.train.data import Shard
from tst_ext.train.files import UserError

END = 0


def draw(vocabulary, count, key=1):
    return np.random.Generator(np.random.Philox(key=key)).integers(0, vocabulary, count)


def markov(stay, vocabulary, count):
    """A chain that stays with probability `stay` and else draws anew among all V: its second eigenvalue is `stay`."""
    rng = np.random.Generator(np.random.Philox(key=2))
    moves = rng.random(count) >= stay
    moves[0] = True
    return rng.integers(0, vocabulary, count)[moves][np.cumsum(moves) - 1]


def brute_force(tokens, distance, end_of_text):
    pairs = [
        (int(tokens[t]), int(tokens[t + distance]))
        for t in range(len(tokens) - distance)
        if all(tokens[u] != end_of_text for u in range(t, t + distance + 1))
    ]
    n, first, second = len(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    return sum(c / n * math.log(c * n / (first[x] * second[y])) for (x, y), c in Counter(pairs).items())


def shard(folder, tokens, vocabulary, end_of_text=END):
    content = np.asarray(tokens, dtype="<u2").tobytes()
    header = {"format": 1, "dtype": "uint16", "tokens": len(tokens), "vocabulary": vocabulary}
    header |= {"end_of_text": end_of_text, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "train.bin").write_bytes(content)
    (folder / "train.json").write_text(json.dumps(header))
    return Shard(folder, "train")


class TestMutualInformation:
    @pytest.mark.parametrize("estimate", [mutual_information, independent_floor])
    def test_of_independent_tokens_is_the_bias_of_the_estimate(self, estimate):
        vocabulary, count = 64, 50_000
        # 2 N I is chi-square distributed with (V - 1)**2 degrees of freedom, of variance twice that; 5 deviations.
        degrees = (vocabulary - 1) ** 2
        tolerance = 5 * math.sqrt(2 * degrees) / (2 * count)
        value = estimate(draw(vocabulary, count), 1, vocabulary, None)
        assert value == pytest.approx(degrees / (2 * count), abs=tolerance)

    def test_of_a_periodic_text_is_its_entropy(self):
        block = np.array([3, 3, 3, 1, 1, 2, 7])
        p = np.array([3, 2, 1, 1]) / 7
        value = mutual_information(np.tile(block, 101), 7, 8, None)
        assert value == pytest.approx(-(p * np.log(p)).sum(), rel=1e-14)  # tens of roundings
        floor = independent_floor(np.tile(block, 101), 7, 8, None)
        assert floor < value / 10  # (4 - 1)**2 / (2 * 700) is 0.006, the entropy 1.28

    @pytest.mark.parametrize("end_of_text", [None, END])
    @pytest.mark.parametrize("distance", [1, 2, 7])
    def test_equals_a_double_loop(self, distance, end_of_text):
        tokens = draw(12, 300, key=distance)
        expected = brute_force(tokens, distance, end_of_text)
        # Sums of at most 144 terms below 5, of which each rounds by 1e-16 of itself.
        assert mutual_information(tokens, distance, 12, end_of_text) == pytest.approx(expected, abs=1e-13)

    def test_large_vocabulary(self):
        # In 32 bits the pairs (33488, 0) and (0, 69632) would be one: 33488 * 128256 = 2**32 + 69632.
        tokens = np.array([0, 33_488, 69_632, 128_255])[draw(4, 300)]
        expected = brute_force(tokens, 1, None)
        assert mutual_information(tokens, 1, 128_256, None) == pytest.approx(expected, abs=1e-13)

    @pytest.mark.parametrize("distance", [1, 2, 4])
    def test_documents_are_kept_apart(self, distance):
        # A document repeats one of two tokens, so a pair of one document shares log 2; pairs across would share less.
        tokens = np.array([1, 1, 1, 1, 1, END, 2, 2, 2, 2, 2, END] * 10)
        assert mutual_information(tokens, distance, 3, END) == pytest.approx(math.log(2), rel=1e-14)
        assert abs(mutual_information(tokens, distance, 3, None) - math.log(2)) > 0.05
        with pytest.raises(UserError, match="got none at 5"):
            mutual_information(tokens, 5, 3, END)

    def test_floor_counts_the_same_pairs(self):
        # At distance 4 all pairs are (1, 5). At 3 they are (1, 4) and (2, 5), 11 times each, which no permutation makes
        # independent, 11 being odd.
        tokens = np.array([1, 2, 3, 4, 5, END] * 11)
        assert independent_floor(tokens, 4, 6, END) == 0
        assert independent_floor(tokens, 3, 6, END) > 0


class TestFit:
    @pytest.mark.parametrize("count", [3, 8, 64])
    @pytest.mark.parametrize(
        "constants", [(3.63, 1.35, -1.25), (0.02, 0.5, -3.0), (1.0, 5.0, -0.2), (2.0, -1.0, -0.7), (0.5, 1.0, -9.9)]
    )
    def test_recovers_the_constants(self, constants, count):
        c0, a, k = constants
        d = np.arange(1, count + 1)
        # 1e-16 of rounding, times at most 1e6 for how alike the curves of two k are (1, 2, 3 at k = -0.2: 1e4).
        assert fit(d, c0 + a * d**k) == pytest.approx(constants, rel=1e-9)

    def test_of_noisy_values(self):
        c0, a, k, sigma = 3.63, 1.35, -1.25, 0.01
        d = np.arange(1, 65)
        noise = sigma * np.random.Generator(np.random.Philox(key=3)).standard_normal(64)
        jacobian = np.stack([np.ones(64), d**k, a * d**k * np.log(d)], axis=1)
        deviation = sigma * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))
        error = np.abs(np.array(fit(d, c0 + a * d**k + noise)) - (c0, a, k))
        assert (error < 5 * deviation).all() and error.max() > 0

    def test_is_least_squares(self):
        d, values = np.arange(1, 17), np.exp(-0.3 * np.arange(1, 17))  # no power law
        best = np.array(fit(d, values))

        def squares(constants):
            return np.sum((constants[0] + constants[1] * d ** constants[2] - values) ** 2)

        for i in range(3):
            for sign in (-1, 1):
                assert squares(best + sign * 1e-3 * np.eye(3)[i]) > squares(best)

    @pytest.mark.parametrize("value", [0.0, 1.7])
    def test_of_a_flat_curve_is_uniform(self, value):
        assert fit(np.arange(1, 9), np.full(8, value)) == (value, 0.0, -1.0)

    def test_of_a_curve_flat_but_for_rounding(self):
        values = 1.7 + 2e-16 * np.arange(8)
        assert fit(np.arange(1, 9), values) == (pytest.approx(1.7, rel=1e-15), 0.0, -1.0)


class TestFitWeights:
    """On two documents, each a Markov chain of 8 tokens of its own: they share the document, log 2, at any distance."""

    STAY, STATES, LENGTH = 0.5, 8, 40_000  # tokens of both documents together, each with its end

    def tokens(self):
        chain = 1 + markov(self.STAY, self.STATES, self.LENGTH)
        half = self.LENGTH // 2
        chain[half:] += self.STATES
        chain[[half - 1, -1]] = END
        return chain

    def measure(self, folder, **changes):
        options = {"tokens": self.LENGTH, "distances": 12, "subtract_floor": False, "folder": folder / "out"}
        return fit_weights(shard(folder, self.tokens(), 17), **(options | changes))

    def test_of_a_markov_chain(self, tmp_path):
        result = self.measure(tmp_path)
        v, stay, pairs = self.STATES, self.STAY, self.LENGTH - 2 * 12 - 2
        for distance, value, floor in zip(result["distances"], result["values"], result["floor"], strict=True):
            same, other = (1 + (v - 1) * stay**distance) / v, (1 - stay**distance) / v
            exact = same * math.log(same * v) + (v - 1) * other * math.log(other * v)
            spread = math.sqrt(same * math.log(same * v) ** 2 + (v - 1) * other * math.log(other * v) ** 2 - exact**2)
            # The mean of log-ratios over N pairs, which the chain's memory makes worth (1 - stay) / (1 + stay) * N
            # independent ones; and, as with independent tokens, the chi-square of each document's table, of which mean
            # and deviation grow by no more than the same factor. 5 deviations of both.
            memory = (1 + stay) / (1 - stay)
            degrees = 2 * (v - 1) ** 2
            tolerance = 5 * spread * math.sqrt(memory / pairs)
            tolerance += memory * (degrees + 5 * math.sqrt(2 * degrees)) / (2 * pairs)
            assert value == pytest.approx(math.log(2) + exact, abs=tolerance)
            # The permutation mixes the documents too.
            degrees = (2 * v - 1) ** 2
            assert floor == pytest.approx(degrees / (2 * pairs), abs=5 * math.sqrt(2 * degrees) / (2 * pairs))
        assert result["values"][0] > result["values"][1] > result["values"][2] > result["values"][3]
        assert result["a"] > 0 > result["k"]

    def test_result_and_files(self, tmp_path):
        result = self.measure(tmp_path, tokens=30_000)
        text = self.tokens()[:30_000]
        assert result["tokens"] == 30_000 and result["subtract_floor"] is False
        assert result["distances"] == list(range(1, 13))
        assert result["values"][4] == mutual_information(text, 5, 17, END)
        assert result["floor"][4] == independent_floor(text, 5, 17, END)
        assert (result["c0"], result["a"], result["k"]) == fit(result["distances"], result["values"])
        assert result["sha256"] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()
        assert json.loads((tmp_path / "out" / "fit_weights.json").read_text()) == result
        assert (tmp_path / "out" / "fit_weights.png").read_bytes().startswith(b"\x89PNG")

    def test_more_tokens_than_there_are(self, tmp_path):
        assert self.measure(tmp_path, tokens=10**9)["tokens"] == self.LENGTH

    def test_subtracting_the_floor(self, tmp_path):
        raw, less = (self.measure(tmp_path, subtract_floor=subtract) for subtract in (False, True))
        assert less["subtract_floor"] is True
        assert (less["values"], less["floor"]) == (raw["values"], raw["floor"])
        rest = np.subtract(less["values"], less["floor"])
        assert (less["c0"], less["a"], less["k"]) == fit(less["distances"], rest)
        assert less["c0"] < raw["c0"]

    def test_less_than_the_floor_is_nothing(self, tmp_path):
        source = shard(tmp_path, draw(64, 2000), 64, None)  # independent tokens
        less = fit_weights(source, tokens=2000, distances=64, subtract_floor=True, folder=tmp_path)
        rest = np.subtract(less["values"], less["floor"])
        assert rest.min() < 0
        assert (less["c0"], less["a"], less["k"]) == fit(less["distances"], np.maximum(rest, 0))

    def test_without_end_of_text_all_pairs_count(self, tmp_path):
        text = self.tokens()[:1000]
        text[::10] = END
        kept = fit_weights(
            shard(tmp_path, text, 17, None), tokens=1000, distances=12, subtract_floor=False, folder=tmp_path
        )
        assert kept["values"][11] == mutual_information(text, 12, 17, None)
        with pytest.raises(UserError, match="distances: .* got none at 9"):
            fit_weights(shard(tmp_path, text, 17), tokens=1000, distances=12, subtract_floor=False, folder=tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"distances": 2}, "distances: expected at least 3.*got 2"),
            ({"tokens": 12}, "tokens: expected more than distances = 12, got 12; .*train.bin has 40000"),
            ({"tokens": -1}, "tokens: .*got -1"),
            ({"distances": 40_000}, "tokens: expected more than distances = 40000, got 40000"),
        ],
    )
    def test_errors(self, tmp_path, changes, message):
        with pytest.raises(UserError, match=message):
            self.measure(tmp_path, **changes)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            # Within a document information decays exponentially, to nothing: a power law that fits it overshoots.
            (1 + markov(0.5, 8, 20_000), r"no negative weight for i = 1..64.* to -0\.\d+; measure more distances"),
            # One token alone shares nothing at any distance, so that all weights are 0.
            (np.ones(100), "a positive one for 1, got 0 "),
        ],
    )
    def test_unusable_weights(self, tmp_path, tokens, message):
        with pytest.raises(UserError, match=message):
            fit_weights(
                shard(tmp_path, tokens, 17), tokens=20_000, distances=12, subtract_floor=True, folder=tmp_path / "out"
            )
        assert not (tmp_path / "out").exists()

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "out").write_text("a file")
        with pytest.raises(UserError, match="folder .*out"):
            self.measure(tmp_path)
