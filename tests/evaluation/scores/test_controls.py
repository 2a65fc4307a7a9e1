"""The yes-bias and early-stop controls against brute force over all biases."""

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from pope_rule import score_logits

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.chair.figures import ChairTable, score_captions
from vlmfix.evals.benchmarks.chair.task import Chair
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.benchmarks.yes_no import ACCURACY, YES_RATIO, YesNoTable, score_labels
from vlmfix.evals.data.samples import Answer, Sample
from vlmfix.evals.run.methods import MethodSpec
from vlmfix.evals.scores.bias_curves import Thinned
from vlmfix.evals.scores.controls import bias_curves, control_lines
from vlmfix.evals.scores.lengths import at_length
from vlmfix.evals.scores.thinned import thinned_versions
from vlmfix.evals.stats.table import Table

matcher = ChairMatcher()


def stop_length(num_tokens: int, eos_gaps: Sequence[float], bias: float) -> int:
    """How many tokens greedy decoding keeps under a bias >= 0 on the end token: the first step with a gap up to it.

    0 keeps everything, also a tie that greedy decoding passed over.
    """
    if bias <= 0:
        return num_tokens
    return next((t for t, gap in enumerate(eos_gaps[:num_tokens]) if gap <= bias), num_tokens)


def yes_bias_control(table: YesNoTable, target: float) -> SimpleNamespace:
    curve = bias_curves("pope", table, {})["yes bias"]
    place = curve.nearest(YES_RATIO, target)
    found = curve.table(place)
    return SimpleNamespace(
        bias=curve.biases[place], table=YesNoTable(found.image_ids, found.columns, items=found.items)
    )


def baseline(n: int = 200, seed: int = 0, levels: int | None = None) -> YesNoTable:
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.5
    scores = rng.normal(labels * 1.5, 1.0)
    if levels is not None:
        scores = np.round(scores * levels) / levels
    return score_logits(labels.tolist(), scores.tolist(), image_ids=range(n))


@pytest.mark.parametrize("target", [0.0, 0.123, 0.5, 0.731, 1.0])
@pytest.mark.parametrize("levels", [None, 1, 3])
def test_yes_ratio_is_the_nearest_possible(target, levels):
    table = baseline(levels=levels)
    control = yes_bias_control(table, target)
    scores = np.unique(table.score)
    possible = [(table.score > t).mean() for t in [*scores, scores[0] - 1]]
    reached = control.table.summary()["yes_ratio"]
    assert abs(reached - target) == pytest.approx(min(abs(p - target) for p in possible), abs=1e-12)
    assert reached == (table.score + control.bias > 0).mean()  # the bias does what it says
    if levels is None:
        assert abs(reached - target) <= 0.5 / len(table)


def test_auc_stays_and_figures_are_those_of_the_shifted_answers():
    table = baseline()
    control = yes_bias_control(table, 0.3)
    assert control.table.summary()["auc"] == table.summary()["auc"]
    answers = ["Yes" if s + control.bias > 0 else "No" for s in table.score]
    by_text = score_labels(table.label.tolist(), answers, image_ids=range(len(table)))
    assert control.table.counts() == by_text.counts()
    assert control.table.summary()["f1"] == by_text.summary()["f1"]
    assert control.bias < 0  # fewer yes answers than without
    assert control.table.question_ids == table.question_ids


def test_the_own_yes_ratio_needs_no_bias():
    table = baseline()
    control = yes_bias_control(table, table.summary()["yes_ratio"])
    assert control.bias == 0.0
    assert (control.table.prediction == table.prediction).all()


def test_a_better_ranking_cannot_come_from_a_bias():
    """At the yes-ratio of a better model the control keeps the worse ranking's accuracy."""
    labels = [True, False] * 50
    weak = score_logits(labels, [0.1 * ((i * 7) % 10) - 0.2 for i in range(100)], image_ids=range(100))
    strong = score_logits(labels, [1.0 if label else -1.0 for label in labels], image_ids=range(100))
    control = yes_bias_control(weak, strong.summary()["yes_ratio"])
    assert control.table.summary()["yes_ratio"] == 0.5
    assert control.table.summary()["accuracy"] < strong.summary()["accuracy"] == 1.0


def test_scores_one_rounding_step_apart():
    low = 1.0
    high = math.nextafter(low, 2.0)
    table = score_logits([True, False], [high, low], image_ids=[1, 2])
    assert yes_bias_control(table, 0.5).table.prediction.tolist() == [1, 0]


def test_all_scores_equal():
    table = score_logits([True, False, True, False], [3.0] * 4, image_ids=range(4))
    assert yes_bias_control(table, 0.1).table.counts()["TN"] == 2
    assert yes_bias_control(table, 0.9).table.counts()["TP"] == 2


def test_of_two_equally_near_ratios_the_smaller_bias_is_taken():
    table = score_logits([True, True, False, False], [5.0, 5.0, -1.0, -1.0], image_ids=range(4))
    assert yes_bias_control(table, 0.25).bias == 0.0  # 0 and 2 yes answers are as far from 1
    assert yes_bias_control(table, 0.75).bias == 0.0  # so are 2 and 4 from 3


def test_no_yes_bias_without_scores():
    assert bias_curves("pope", score_labels([True], ["Yes"], image_ids=[1]), {}) == {}


# Early stop. A token id is an index into these words.


def thinned(tokens, gaps, decode, truth, matcher, asked=None):
    """The captions cut as often as can be, one sample per image."""
    samples = {i: Sample("chair", i, None, "Describe.", 64, "gaps") for i in tokens}
    answers = {
        samples[i].key: Answer(decode(ids), tuple(ids), False, tuple(gaps.get(i, ())), asked=(asked or {}).get(i))
        for i, ids in tokens.items()
    }
    return thinned_versions(Chair(tuple(samples.values()), truth, matcher, 64), answers, decode)


def versions(*captions):
    return thinned(*captions).get("early stop", [])


def early_stop_control(tokens, gaps, decode, recall, truth, matcher):
    curve = Thinned(versions(tokens, gaps, decode, truth, matcher))
    place = curve.nearest(Chair.figure("recall").statistic, recall)
    bias, table = curve.biases[place], curve.table(place)
    cut = {i: decode(ids[: stop_length(len(ids), gaps[i], bias)]) for i, ids in tokens.items()}
    assert table.hallucinated.tolist() == score_captions(cut, truth, matcher).hallucinated.tolist()
    return SimpleNamespace(bias=bias, captions=cut, table=ChairTable(table.image_ids, table.columns))


WORDS = ("a", "dog", "cat", "car", "cup", "chair", "and", "near", "bird", ".")


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def random_captions(n: int = 25, seed: int = 0):
    rng = np.random.default_rng(seed)
    tokens = {i: rng.integers(0, len(WORDS), rng.integers(0, 20)).tolist() for i in range(n)}
    gaps = {i: [*np.round(rng.exponential(3, len(ids)), 1).tolist(), -1.0] for i, ids in tokens.items()}
    truth = {i: [w for w in WORDS[1:6] if rng.random() < 0.6] for i in tokens}
    return tokens, gaps, truth


def test_stop_length():
    gaps = [5.0, 2.0, 3.0, 0.5, -1.0]
    assert [stop_length(4, gaps, bias) for bias in (0, 0.4, 0.5, 1.9, 2.0, 4.9, 5.0, 99)] == [4, 4, 3, 3, 1, 1, 0, 0]
    assert stop_length(2, [math.inf, 0.0], 0.0) == 2  # a tie that greedy decoding passed over
    assert stop_length(2, [math.inf, 0.0], 1e-9) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8, 0.97, 1.0])
def test_recall_is_the_nearest_over_all_biases(seed, share):
    tokens, gaps, truth = random_captions(seed=seed)

    def recall(bias):
        cut = {i: decode(ids[: stop_length(len(ids), gaps[i], bias)]) for i, ids in tokens.items()}
        return score_captions(cut, truth, matcher).summary()["recall"]

    any_positive = float(np.nextafter(0.0, 1.0))  # where a gap is exactly 0
    biases = [0.0, any_positive, *sorted({g for row in gaps.values() for g in row if g > 0})]
    recalls = [recall(b) for b in biases]
    target = share * recalls[0]
    control = early_stop_control(tokens, gaps, decode, target, truth, matcher)
    distance = np.abs(np.array(recalls) - target)
    assert control.bias == biases[int(np.argmin(distance))]  # the first, that is the smallest, of the nearest
    assert control.table.summary()["recall"] == recall(control.bias)
    assert abs(control.table.summary()["recall"] - target) == pytest.approx(distance.min(), abs=1e-12)
    for i, caption in control.captions.items():
        assert decode(tokens[i]).startswith(caption)


def test_nothing_is_cut_when_the_target_is_not_lower():
    tokens, gaps, truth = random_captions()
    full = score_captions({i: decode(ids) for i, ids in tokens.items()}, truth, matcher)
    for target in (full.summary()["recall"], 1.0):
        control = early_stop_control(tokens, gaps, decode, target, truth, matcher)
        assert control.bias == 0.0
        assert control.table.counts() == full.counts()


def test_a_cut_inside_a_word_is_judged_by_its_text():
    """Recall may rise under a bias: "car|rot" ends as "car"."""
    pieces = ["a ", "car", "rot"]

    def join(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids)

    control = early_stop_control({1: [0, 1, 2]}, {1: [9.0, 8.0, 7.0]}, join, 1.0, {1: ["car"]}, matcher)
    assert (control.bias, control.captions) == (7.0, {1: "a car"})


def test_tokens_may_end_with_eos():
    """The EOS token itself has gap <= 0 and decodes to nothing."""
    words = ["a", "dog", "cat"]

    def skip_eos(ids: list[int]) -> str:
        return " ".join(words[i] for i in ids if i >= 0)

    with_eos = early_stop_control(
        {1: [0, 1, 2, -1]}, {1: [9.0, 5.0, 3.0, -2.0]}, skip_eos, 0.5, {1: ["dog", "cat"]}, matcher
    )
    without = early_stop_control(
        {1: [0, 1, 2]}, {1: [9.0, 5.0, 3.0, -2.0]}, skip_eos, 0.5, {1: ["dog", "cat"]}, matcher
    )
    assert with_eos.captions == without.captions == {1: "a dog"}
    assert with_eos.bias == without.bias == 3.0


def test_a_tie_with_eos_ends_under_any_positive_bias():
    control = early_stop_control({1: [1, 2]}, {1: [4.0, 0.0]}, decode, 0.5, {1: ["dog", "cat"]}, matcher)
    assert 0 < control.bias < 1e-300
    assert control.captions == {1: "dog"}


def test_early_stop_errors():
    good = ({1: [1, 2]}, {1: [2.0, 1.0]}, decode, {1: ["dog"]}, matcher)

    def changed(position, value):
        return (*good[:position], value, *good[position + 1 :])

    assert len(versions(*good)) == 3
    for position, value, message in [
        (1, {}, "stop margins"),
        (1, {1: [1.0]}, "2 tokens and 1 stop margins"),
        (1, {1: [1.0, math.nan]}, "NaN"),
        (3, {}, "ground truth"),
    ]:
        with pytest.raises(DataError, match=message):
            versions(*changed(position, value))
    assert versions(*changed(0, {})) == []
    without_objects = versions(*changed(3, {1: []}))
    assert bias_curves("chair", without_objects[0], {"early stop": without_objects}) == {}


# Self-verification: what the model says when it is asked for the objects of its captions


def verified_captions(n: int = 20, seed: int = 0):
    """Captions with log odds of yes for every object, some of them equal."""
    rng = np.random.default_rng(seed)
    named = {i: rng.choice(WORDS[1:6], rng.integers(1, 5), replace=False).tolist() for i in range(n)}
    texts = {i: " ".join(f"There is a {word}." for word in words) for i, words in named.items()}
    asked = {i: {word: float(np.round(rng.normal(1, 2), 1)) for word in words} for i, words in named.items()}
    truth = {i: [word for word in WORDS[1:6] if rng.random() < 0.6] for i in range(n)}

    def said(ids):
        return "".join(texts[i] for i in ids)

    found = thinned({i: [i] for i in range(n)}, {i: [9.0] for i in range(n)}, said, truth, matcher, asked)
    return found, asked, truth


@pytest.mark.parametrize("seed", range(3))
def test_what_the_model_denies_is_left_out_at_the_threshold_that_gives_the_recall(seed):
    """Against brute force over all thresholds, counting objects and not texts."""
    found, asked, truth = verified_captions(seed=seed)
    curve, recall = Thinned(found["self-verification"]), Chair.figure("recall").statistic
    levels = sorted({odds for each in asked.values() for odds in each.values()})

    def kept(odds):
        return {i: " and ".join(word for word, own in each.items() if own > odds) for i, each in asked.items()}

    figures = [score_captions(kept(odds), truth, matcher).summary() for odds in [-math.inf, *levels]]
    for share in (1.0, 0.9, 0.6, 0.2, 0.0):
        target = share * figures[0]["recall"]
        best = int(np.argmin([round(abs(each["recall"] - target), 12) for each in figures]))
        place = curve.nearest(recall, target)
        table = curve.table(place)
        assert recall.of(table) == pytest.approx(figures[best]["recall"], abs=1e-12)
        assert Chair.figure("chair_i").statistic.of(table) == pytest.approx(figures[best]["chair_i"], nan_ok=True)
        threshold = 0.0 if best == 0 else 1 / (1 + math.exp(-levels[best - 1]))
        assert curve.biases[place] == pytest.approx(threshold)


def test_what_was_not_asked_for_stays():
    tokens, gaps, truth = {1: [1, 2]}, {1: [9.0, 8.0]}, {1: ["dog"]}

    def said(ids):
        return "A dog and a cat."

    found = thinned(tokens, gaps, said, truth, matcher, {1: {"cat": -9.0, "horse": -9.0}})["self-verification"]
    assert [table.mentions.tolist() for table in found] == [[2], [1]], "the cat goes; there is no horse to go"
    assert list(thinned(tokens, gaps, said, truth, matcher)) == ["early stop"], "the model was not asked"


def test_at_another_length_by_regression():
    """What is linear in the words is found again; the captions' own length gives their figure, a far one nothing."""
    rng = np.random.default_rng(0)
    words, objects = rng.integers(10, 40, 60), rng.integers(2, 8, 60)
    columns = {"words": words, "gt_objects": objects, "mentions": 2 * words, "hallucinated": words - 8}
    table = Table(np.arange(60), columns | {"recalled": words + 3 * objects})
    recall, chair_i = (Chair.figure(name).statistic for name in ("recall", "chair_i"))
    for length in (20.0, 15.5):
        found = at_length(table, recall, [recall, chair_i], length)
        assert found == pytest.approx([(length + 3 * objects.mean()) / objects.mean(), (length - 8) / (2 * length)])
    own = at_length(table, recall, [recall, chair_i], words.mean())
    assert own == pytest.approx([recall.of(table), chair_i.of(table)])
    for length in (8.0, 45.0):
        assert np.isnan(at_length(table, recall, [recall, chair_i], length)).all(), "no caption is like that"
    table.columns["hallucinated"] = np.maximum(words - 24, 0)
    found = at_length(table, recall, [recall, chair_i], 15.5)
    assert found[0] == pytest.approx((15.5 + 3 * objects.mean()) / objects.mean()) and np.isnan(found[1]), "negative"


# The whole curve


def points(captions, most):
    tokens, gaps, truth = captions
    curve = Thinned(versions(tokens, gaps, decode, truth, matcher))
    return curve.points(Chair.figure("recall").statistic, [Chair.figure("chair_i").statistic], most)


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_is_what_cutting_at_every_bias_gives(seed):
    tokens, gaps, truth = random_captions(seed=seed)
    found = points((tokens, gaps, truth), 10_000)
    biases = [bias for bias, *_ in found]
    assert biases[0] == 0.0 and biases == sorted(set(biases))
    for bias, recall, chair_i in found:
        cut = {i: decode(ids[: stop_length(len(ids), gaps[i], bias)]) for i, ids in tokens.items()}
        summary = score_captions(cut, truth, matcher).summary()
        assert recall == pytest.approx(summary["recall"], abs=1e-12)
        assert chair_i == pytest.approx(summary["chair_i"], abs=1e-12, nan_ok=True)
    assert found[-1][1] == 0.0


def test_a_thinned_curve_keeps_its_ends():
    whole, thin = points(random_captions(), 10_000), points(random_captions(), 8)
    whole_biases, biases = ([bias for bias, *_ in found] for found in (whole, thin))
    assert len(thin) <= 10 < len(whole) and set(biases) < set(whole_biases)
    assert (biases[0], biases[-1]) == (whole_biases[0], whole_biases[-1])
    assert max(a[1] - b[1] for a, b in itertools.pairwise(thin)) < 0.3


# Matched again in every resample


def take(table, images):
    return table.take(np.concatenate([np.flatnonzero(table.image_ids == i) for i in images]))


def renumbered(table):
    return Table(np.arange(len(table)), table.columns)


def test_an_early_stop_is_matched_again_in_every_resample():
    """Against brute force: every resample's own rows, the nearest of all its biases, and its own figures."""
    tokens, gaps, truth = random_captions(12)
    cut = versions(tokens, gaps, decode, truth, matcher)
    table = score_captions({i: decode(ids[:6]) for i, ids in tokens.items()}, truth, matcher)
    recall, chair_i = (Chair.figure(name).statistic for name in ("recall", "chair_i"))
    (interval,) = Thinned(cut).differences(recall, table, [chair_i], seed=3, n_resamples=40)
    brute = []
    for weights in np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=40):
        images = np.repeat(np.arange(12), weights)
        own = renumbered(take(table, images))
        again = Thinned([renumbered(take(version, images)) for version in cut])
        other = again.table(again.nearest(recall, recall.of(own)))
        brute.append(chair_i.of(own) - chair_i.of(other))
    assert (interval.low, interval.high) == pytest.approx(np.nanquantile(brute, [0.025, 0.975]), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 2])
def test_a_yes_bias_is_matched_again_in_every_resample(levels):
    none, method = baseline(30, 0, levels), baseline(30, 1, levels)
    (interval,) = bias_curves("pope", none, {})["yes bias"].differences(
        YES_RATIO, method, [ACCURACY], seed=3, n_resamples=40
    )
    brute = []
    for weights in np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=40):
        images = np.repeat(np.arange(30), weights)
        own = take(method, images)
        brute.append(own.correct.mean() - yes_bias_control(take(none, images), YES_RATIO.of(own)).table.correct.mean())
    assert (interval.low, interval.high) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=1e-12)


# Yes bias of other benchmarks' tables


def lines_of(tables, kept):
    specs = [MethodSpec("none", {"method": "none"}, "baseline"), MethodSpec("m", {"method": "m"}, "method")]
    curves = {name: bias_curves(name, by_label["none"], {}) for name, by_label in tables.items()}
    return control_lines(specs, tables, curves, 0, kept)


def item_table(scores, labels, **more):
    n = len(labels)
    columns = {
        "label": np.array(labels),
        "score": np.array(scores, dtype=float),
        "prediction": (np.array(scores) > 0).astype(np.int8),
        "unparsed": np.zeros(n, dtype=bool),
        **more,
    }
    columns["correct"] = columns["prediction"] == columns["label"]
    return Table(np.arange(n) // 2, columns, ("existence",) * n, tuple(f"q{i}" for i in range(n)))


@pytest.mark.parametrize("benchmark", ["mme", "hallusionbench", "custom"])
def test_yes_bias_of_any_table_of_scored_questions(benchmark):
    """A method that is the baseline with a shifted threshold is not told apart from its control, and costs nothing."""
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.5
    scores = rng.normal(size=200) + 1.2 * labels - 0.9
    shifted = item_table(scores + 0.7, labels)
    tables = {"none": item_table(scores, labels), "m": shifted}
    if benchmark == "custom":
        tables = {name: item_table(t.score, labels, questions=np.ones(200)) for name, t in tables.items()}
    kept = {}
    (line,) = lines_of({benchmark: tables}, kept)
    assert line["control"] == "yes bias" and line["verdict"] == "same" and line["bias"] == pytest.approx(0.7, abs=0.05)
    assert line["difference"]["estimate"] == 0.0 and line["metric"].startswith(f"{benchmark}.")
    control = kept[benchmark]["m"]["yes bias"]
    assert control.prediction.tolist() == shifted.prediction.tolist() and control.keys == shifted.keys


@pytest.mark.parametrize("benchmark", ["amber", "custom"])
def test_yes_bias_goes_by_the_questions_among_other_rows(benchmark):
    labels, asked = [True, False, True, False, False, False], np.array([1, 1, 1, 1, 0, 0])

    def table(margins):
        found = item_table(margins, labels, questions=asked)
        columns = {name: np.where(asked, values, 0) for name, values in found.columns.items() if name != "score"}
        margin = np.where(asked, found.score, np.nan)
        return Table(found.image_ids, {**columns, "questions": asked, "margin": margin}, found.splits, found.items)

    none, m = table([2.0, 1.0, -1.0, -2.0, 9.0, 9.0]), table([1.0, -1.0, -1.0, -1.0, 0.0, 0.0])
    kept = {}
    (line,) = lines_of({benchmark: {"none": none, "m": m}}, kept)
    assert (line["method_value"], line["control_value"], line["bias"]) == (0.75, 0.75, -1.5)
    assert line["matched"] == "yes 25.0, 25.0" and line["metric"] == f"{benchmark}.accuracy"
    assert kept[benchmark]["m"]["yes bias"].prediction.tolist() == [1, 0, 0, 0, 0, 0]


def test_no_yes_bias_without_scores_or_among_free_answers():
    table = item_table([1.0, -1.0], [True, False], questions=np.array([0, 0]))
    assert lines_of({"custom": {"none": table, "m": table}}, {}) == []
    bare = Table(table.image_ids, {"label": table.label, "prediction": table.prediction}, table.splits, table.items)
    assert lines_of({"mme": {"none": bare, "m": bare}}, {}) == []
    assert lines_of({"mme": {"none": None, "m": None}}, {}) == []
