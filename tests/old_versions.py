"""What does not hold on older versions of transformers, and why; everything else of the plugin's tests passes there.

``scripts/test_versions`` runs them. *Upstream*: the unpatched model does the same.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers import __version__


class Exemption(NamedTuple):
    """Tests that are skipped.

    Attributes:
        below: In versions below this one.
        tests: Regular expression for the end of their ids.
        reason: Why.
        since: Not in versions below this one.
    """

    below: tuple[int, int]
    tests: str
    reason: str
    since: tuple[int, int] = (0, 0)


ANY_OLD, OLD_4 = (5, 1), (5, 0)
EXEMPTIONS = (
    Exemption(ANY_OLD, r"::test_a_beam_scores_as_its_tokens_\w+\[.*", "upstream: scores of beams are no log-probs"),
    Exemption(
        ANY_OLD,
        r"(test_special_\w+|test_decoding|test_recipes|test_anatomy|test_calibrate|test_info)\.py::.*\[.*(blip2_t5|florence2).*",
        "T5 does not dispatch its attention, Florence-2 hands no keywords on: refused",
    ),
    Exemption(
        ANY_OLD,
        r"::test_beams_of_a_batch_equal_those_alone_and_without_cache\[.*",
        "upstream: scores of beams, as above",
    ),
    Exemption(
        ANY_OLD,
        r"(test_decoding_opera\.py::.*|(test_invariants|test_single_calls|test_ways_to_call)\.py::test_\w+\[opera\]|::test_opera_\w+\[.*)",
        "refused: generate has no prefill of its own",
    ),
    Exemption(
        ANY_OLD,
        r"clients/test_\w+\.py::(test_opera_\w+|test_what_went_wrong_is_told\[.*-opera-.*)",
        "refused: generate has no prefill of its own",
    ),
    Exemption(ANY_OLD, r"::test_threads_patch_once", "upstream: threads on one model disturb each other"),
    Exemption(ANY_OLD, r"test_model_types\.py::.*", "the table is that of the current version"),
    Exemption(ANY_OLD, r"::test_the_matrix_shows_every_cell_and_shares_notes", "some families are not there yet"),
    Exemption(
        ANY_OLD, r"::test_var_finds_a_threshold_that_image_tokens_reach", "the image processor makes other pixels"
    ),
    Exemption(
        ANY_OLD,
        r"::test_every_family_answers_like_whole_prompts_or_refuses\[lfm2_vl\]",
        "upstream: the model takes a cache of its own class alone",
    ),
    Exemption(
        ANY_OLD,
        r"::test_every_family_answers_like_whole_prompts_or_refuses\[llama4\]",
        "upstream: the unpatched model cannot read an image",
        since=(5, 0),
    ),
    Exemption(ANY_OLD, r"::test_allpath_of_captions", "rounds otherwise: 1.2e-5 where 1.0e-5 is asked"),
    Exemption(
        ANY_OLD,
        r"test_decoding\.py::test_other_families\[paligemma.*",
        "upstream: a prompt is read otherwise without a cache",
    ),
    Exemption(ANY_OLD, r"::test_other_families\[qwen2_5_vl\]", "generate() does not take mm_token_type_ids yet"),
    Exemption(ANY_OLD, r"::test_pipeline\[var\]", "the image processor makes other pixels, without a sink"),
    Exemption(
        ANY_OLD,
        r"::test_a_planted_head_is_the_only_one_that_matters",
        "the image processor makes other pixels, and the random model other captions, without any real object",
    ),
    Exemption(
        ANY_OLD,
        r"::test_heads_are_ablated_in_every_kind_of_cache\[qwen2_5_vl\]",
        "known: the search of calibrate(model, 'adhh') fails on Qwen-VL",
    ),
    Exemption(
        OLD_4,
        r"::test_heads_are_ablated_in_every_kind_of_cache\[lfm2_vl\]",
        "known: the search of calibrate(model, 'adhh') is wrong on hybrid caches",
    ),
    Exemption(
        ANY_OLD,
        r"::(test_four_threads_\w+\[.*|test_calls_of_the_stock_model_beside_\w+\[.*|test_eight_threads_of_\w+)",
        "upstream: threads on one model disturb each other",
        since=(5, 0),
    ),
    Exemption(
        ANY_OLD,
        r"::test_refusals\[act-data8-.*The processor rejects the prompt\]",
        "the processor accepts a prompt without an image; refused a step later",
    ),
    Exemption(OLD_4, r"::test_generate_continues_a_conversation\[.*", "upstream: second image in a later turn"),
    Exemption(OLD_4, r"::test_compiled_decoding_\w+\[.*", "upstream: the static cache's length does not compile"),
    Exemption(
        ANY_OLD,
        r"::test_compiled_decoding_\w+\[(act|cmai).*",
        "upstream: the static cache counts its keys with operations, which become a second graph of each step",
        since=(5, 0),
    ),
    Exemption(
        OLD_4,
        r"test_families\.py::test_(strength_zero|vhr_acts)\w+\[glm4v(_moe)?\]",
        "known: the image-free pass of vhr fails on GLM-4V",
    ),
    Exemption(OLD_4, r"::test_markers_of_an_image_leave_with_it\[glm4v\]", "known: the image-free pass, as above"),
    Exemption(
        ANY_OLD,
        r"::test_hidden_states_of_the_last_token_recover_all_in_every_family\[llama4\]",
        "upstream: the unpatched model cannot read an image",
        since=(5, 0),
    ),
    Exemption(OLD_4, r"::test_four_bit_weights\[.*", "batches of the 4-bit kernel differ from single prompts"),
    Exemption(
        OLD_4,
        r"test_generation_cases\.py::.*drafted_tokens_change_nothing.*",
        "refused where a forward takes no logits_to_keep; upstream: looking drafts up needs an end token",
    ),
    Exemption(
        ANY_OLD,
        r"::test_the_answer_depends_on_the_image\[emu3\]",
        "upstream: the unpatched model turns both pictures into the same words",
    ),
    Exemption(OLD_4, r"::test_continuous_batching_\w+", "there is no paged cache for generate() yet"),
    Exemption(OLD_4, r"::test_the_image_free_pass_keeps_who_sees_whom\[.*", "upstream: PaliGemma's batch and cache"),
)


def reason_to_skip(test: str) -> str | None:
    """Return why a test (by its id) is skipped in the installed version, or ``None``."""
    version = tuple(int(part) for part in __version__.split(".")[:2])
    for exemption in EXEMPTIONS:
        if exemption.since <= version < exemption.below and re.search(exemption.tests + "$", test):
            return f"transformers {__version__}: {exemption.reason}"
    return None
