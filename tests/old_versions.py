"""What does not hold on older versions of transformers, and why; everything else of the plugin's tests passes there.

``scripts/test_versions`` runs them. *Upstream*: the unpatched model does the same.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers import __version__


class Exemption(NamedTuple):
    """Tests that are skipped for one reason.

    Attributes:
        reason: Why.
        tests: Regular expressions for the ends of their ids.
        below: In versions below this one.
        since: Not in versions below this one.
    """

    reason: str
    tests: tuple[str, ...]
    below: tuple[int, int] = (5, 1)
    since: tuple[int, int] = (0, 0)


V5 = (5, 0)
EXEMPTIONS = (
    Exemption(
        "upstream: scores of beams are no log-probs, and beams without a cache are others",
        (
            r"::test_a_beam_scores_as_its_tokens_\w+\[.*",
            r"::test_beams_of_a_batch_equal_those_alone_and_without_cache\[.*",
            r"::test_without_a_cache_answers_are_the_same_or_refused\[2-.*",
        ),
    ),
    Exemption(
        "T5 does not dispatch its attention, Florence-2 hands no keywords on: refused",
        (
            r"(test_special_\w+|test_decoding|test_recipes|test_anatomy|test_calibrate|test_info)\.py::.*\[.*(blip2_t5|florence2).*",
        ),
    ),
    Exemption(
        "refused: generate has no prefill of its own",
        (
            r"test_decoding_opera\.py::.*",
            r"(test_invariants|test_single_calls|test_ways_to_call)\.py::test_\w+\[opera\]",
            r"::test_opera_\w+\[.*",
            r"clients/test_\w+\.py::(test_opera_\w+|test_what_went_wrong_is_told\[.*-opera-.*)",
        ),
    ),
    Exemption("upstream: threads on one model disturb each other", (r"::test_threads_patch_once",)),
    Exemption(
        "upstream: threads on one model disturb each other",
        (
            r"::test_four_threads_\w+\[.*",
            r"::test_calls_of_the_stock_model_beside_\w+\[.*",
            r"::test_eight_threads_of_\w+",
        ),
        since=V5,
    ),
    Exemption("the table is that of the current version", (r"test_model_types\.py::.*",)),
    Exemption("some families are not there yet", (r"::test_the_matrix_shows_every_cell_and_shares_notes",)),
    Exemption(
        "the image processor makes other pixels: no sink, or captions without any real object",
        (
            r"::test_var_finds_a_threshold_that_image_tokens_reach",
            r"::test_pipeline\[var\]",
            r"::test_a_planted_head_is_the_only_one_that_matters",
        ),
    ),
    Exemption(
        "upstream: the model takes a cache of its own class alone",
        (r"::test_every_family_answers_like_whole_prompts_or_refuses\[lfm2_vl\]",),
    ),
    Exemption(
        "upstream: the unpatched model cannot read an image",
        (
            r"::test_every_family_answers_like_whole_prompts_or_refuses\[llama4\]",
            r"::test_hidden_states_of_the_last_token_recover_all_in_every_family\[llama4\]",
        ),
        since=V5,
    ),
    Exemption("rounds otherwise: 1.2e-5 where 1.0e-5 is asked", (r"::test_allpath_of_captions",)),
    Exemption(
        "upstream: a prompt is read otherwise without a cache",
        (r"test_decoding\.py::test_other_families\[paligemma.*",),
    ),
    Exemption("generate() does not take mm_token_type_ids yet", (r"::test_other_families\[qwen2_5_vl\]",)),
    Exemption(
        "upstream: a hybrid cache cannot be repeated, which raises",
        (r"::test_heads_are_ablated_in_every_kind_of_cache\[lfm2_vl\]",),
        V5,
    ),
    Exemption(
        "the processor accepts a prompt without an image; refused a step later",
        (r"::test_refusals\[act-data8-.*The processor rejects the prompt\]",),
    ),
    Exemption("upstream: second image in a later turn", (r"::test_generate_continues_a_conversation\[.*",), V5),
    Exemption("upstream: the static cache's length does not compile", (r"::test_compiled_decoding_\w+\[.*",), V5),
    Exemption(
        "upstream: the static cache counts its keys with operations, which become a second graph of each step",
        (r"::test_compiled_decoding_\w+\[(act|cmai).*",),
        since=V5,
    ),
    Exemption("batches of the 4-bit kernel differ from single prompts", (r"::test_four_bit_weights\[.*",), V5),
    Exemption(
        "refused where a forward takes no logits_to_keep; upstream: looking drafts up needs an end token",
        (r"test_generation_cases\.py::.*drafted_tokens_change_nothing.*",),
        V5,
    ),
    Exemption(
        "upstream: the unpatched model turns both pictures into the same words",
        (r"::test_the_answer_depends_on_the_image\[emu3\]",),
    ),
    Exemption("there is no paged cache for generate() yet", (r"::test_continuous_batching_\w+",), V5),
    Exemption("upstream: PaliGemma's batch and cache", (r"::test_the_image_free_pass_keeps_who_sees_whom\[.*",), V5),
)


def reason_to_skip(test: str) -> str | None:
    """Return why a test (by its id) is skipped in the installed version, or ``None``."""
    version = tuple(int(part) for part in __version__.split(".")[:2])
    for exemption in EXEMPTIONS:
        ends = (re.search(end + "$", test) for end in exemption.tests)
        if exemption.since <= version < exemption.below and any(ends):
            return f"transformers {__version__}: {exemption.reason}"
    return None
