"""Which tests are slow: folders, files, tests, and tests with one of their parameters.

`tests/conftest.py` marks them. `make test-fast` leaves out both lists, `make test` the second.
"""

# They start other processes, or take more than about three seconds.
SLOW = (
    "ablations",
    "examples",
    "finetuning/test_distributed.py",
    "finetuning/test_finetuning.py",
    "finetuning/test_interruption.py",
    "finetuning/test_recipes.py::test_a_step_of_gemma_2_2b_counted_by_hand",
    "finetuning/test_recipes.py::test_an_estimate_is_what_a_step_takes",
    "finetuning/test_recipes.py::test_help_answers_in_less_than_ten_seconds",
    "finetuning/test_training.py::test_the_trainer_trains_evaluates_and_predicts",
    "hub/test_earlier_checkpoints.py",
    "hub/test_hub.py",
    "hub/test_verification.py",
    "model/test_adapters.py::test_a_process_without_this_package_reloads_an_adapter_too",
    "model/test_adapters.py::test_a_saved_adapter_is_merged_in_one_call",
    "model/test_adapters.py::test_adapters_over_it_train_and_reload",
    "model/test_attention.py::test_company_never_changes_the_score_in_flex_attention",
    "model/test_attention.py::test_windows_reach_exactly_in_flex_attention",
    "model/test_attention.py::test_wrappers_and_compiled_models_are_verified_too",
    "model/test_checkpoint.py::test_a_folder_is_loaded_and_saved_without_the_network",
    "model/test_checkpoint.py::test_a_save_that_is_killed_leaves_the_old_checkpoint",
    "model/test_gguf.py::test_what_is_saved_is_an_ordinary_checkpoint",
    "model/test_list_chunks.py::test_peak_memory_does_not_grow_with_the_list",
    "model/test_masked_lm.py::test_padding_never_changes_a_prediction",
    "model/test_memory.py",
    "model/test_modeling.py::test_compiled_is_the_same",
    "model/test_modeling.py::test_compiled_layers_are_the_same_and_soon_compiled_for_all_lengths",
    "model/test_own_classes.py::test_a_registered_class_travels_with_the_files_of_its_parents",
    "model/test_saving.py::test_a_stranger_loads_it_with_the_same_scores",
    "serving/test_interfaces.py::test_scores_do_not_depend_on_the_company",
    "serving/test_limits.py::test_hundreds_of_requests_at_once_are_all_answered",
    "serving/test_limits.py::test_the_script_listens_on_loopback_and_ends_after_its_last_answer",
    "serving/test_replicas.py",
    "test_alternatives.py",
    "test_benchmarks.py",
    "test_package.py",
    "test_readme.py",
)

# They are of benchmarks and estimates, or do once more what another test does: 15 to 60 seconds each.
NIGHTLY = (
    "ablations/test_ablations.py::test_side_by_side_is_the_same",
    "examples/test_export.py::test_a_stranger_scores_with_what_is_exported[torch]",
    "examples/test_export.py::test_other_families_and_poolers_export_to_onnx",
    "examples/test_uptrain.py::test_an_interrupted_run_ends_with_the_same_weights[flags1]",
    "finetuning/test_distributed.py::test_two_processes_train_and_predict_what_one_does[adapters under fsdp2]",
    "finetuning/test_recipes.py::test_an_estimate_is_what_a_step_takes",
    "finetuning/test_recipes.py::test_help_answers_in_less_than_ten_seconds",
    "model/test_modeling.py::test_compiled_is_the_same",
    "test_benchmarks.py::test_memory_and_time_of_a_list_are_measured",
    "test_benchmarks.py::test_the_gain_of_compiling_is_printed",
    "test_benchmarks.py::test_what_is_timed_gives_the_same_scores",
)
