"""What `pytest -m quick` runs: every area thinly, for less than a minute, while one works.

By file below tests/, the test functions; their cases all run. Compare `pytest`, which runs everything.
"""

from __future__ import annotations

QUICK: dict[str, str] = {
    # rules, draws and trees
    "acceptance/test_rules": "one_child_is_accepted_as_often_as_possible lossy_rules_accept_what_they_say",
    "sampling/test_sampling": "noise_is_the_documented_function_of_seed_position_and_token penalties_follow_the_path "
                              "siblings_are_distinct_and_begin_with_the_draw bad_options_are_named",
    "api/test_keywords": "every_method_names_its_options what_sampling_excludes_and_what_it_is",
    "acceptance/test_tree": "paths_agree_with_parents_and_depths a_tree_refuses_equal_siblings_and_missing_parents",
    "planning/test_planner": "curves_pass_through_their_points_and_never_fall the_chosen_nodes_gain_most "
                             "auto_drafts_nothing_where_rows_run_one_by_one",
    "planning/test_shape_planner": "a_text_near_its_end_does_not_begin_again chances_are_learned_by_depth_and_rank",
    "drafting/test_repeats": "the_continuation_is_what_followed matches_are_true_and_the_longest",
    "drafting/test_drafters": "options_are_checked_by_name what_always_fails_is_soon_left_alone",
    # the model, its files and its texts
    "model/test_oracle": "main_logits mtp_logits",
    "contract/test_same_text": "caches_after_rollback_equal_a_fresh_run",
    "cache/test_prefix": "a_second_turn_is_bitwise_that_of_a_fresh_prefill",
    "cache/test_pages": "what_was_used_longest_ago_goes_first a_text_that_never_drafted_leaves_its_pages",
    "cpu/test_batch": "a_long_prompt_does_not_hold_up_the_others closing_ends_every_text_and_the_worker",
    "sampling/test_processors": "a_state_is_computed_once_for_all_rows_of_a_path",
    "sampling/test_grammar": "usual_layouts_of_json_are_in_the_grammar",
    "text/test_text": "stop_strings_cut_across_tokens characters_of_several_tokens_appear_once_complete",
    "model/checkpoint/test_convert": "ranks_of_one_number_become_those_of_another there_and_back_bit_for_bit",
    "loading/test_bad_input": "missing_tensor misshaped_tensor unknown_keyword",
    "cuda/test_memory": "memory_is_foreseen",
    "planning/test_measured": "measured_once_and_kept",
    # kernels and the steps of a GPU, by their references and interpreted
    "kernels/test_ordered": "products_are_summed_in_the_order_that_is_promised "
                            "references_give_a_row_alone_what_they_give_it_beside_others",
    "kernels/test_fp8": "the_product_is_that_of_the_quantised_numbers deepseeks_call_forms",
    "kernels/test_inputs": "wrong_arguments_are_refused",
    "cuda/test_step": "shape_numbers_nodes_like_the_tree accept_walks_to_the_deepest_match same_experts_as_the_gate",
    "cuda/test_guided": "drafts_are_accepted_and_the_text_is_the_one_without",
    "training/test_objective": "gradients_are_finite_differences a_perfect_draft_has_no_loss",
    "training/test_texts": "no_prompt_is_in_both_parts_and_every_domain_has_its_share",
    "distributed/test_ranks": "fewer_blocks_than_ranks_are_refused",
    # the bundled model, the command line, the chat, the documentation
    "api/test_bundled": "stop_string_cuts_text_and_ids",
    "cli/test_cli": "generate_streams_text_and_ends_with_statistics inspect_describes_the_bundled_model",
    "chat/test_screen": "a_pipe_gets_the_bare_text the_line_of_statistics_fits",
    "chat/test_input": "three_quotes history_outlives_the_chat",
    "bench/test_questions": "what_is_wrong_with_a_line",
    "bench/test_whole": "factors_are_found_and_never_negative the_cost_of_exchanges_is_found_again "
                        "what_has_no_meaning_is_named",
    "bench/test_benchmarks": "interval_covers_the_ratio a_search_keeps_the_fastest_launch_and_what_failed",
    "house/test_docs": "commands_parse links_lead_somewhere",
    "house/test_packaging": "files_are_short",
    "house/test_house": "imports_point_to_lower_packages mtp_spec_is_in_order",
}  # fmt: skip


def names() -> set[tuple[str, str]]:
    """Returns file and function of each."""
    return {(file, f"test_{name}") for file, part in QUICK.items() for name in part.split()}
