"""Folders, files and tests that start other processes, or take more than about three seconds.

`tests/conftest.py` marks them as `slow`, and `make test-fast` leaves them out.
"""

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
    "test_alternatives.py",
    "test_benchmarks.py",
    "test_package.py",
    "test_readme.py",
)
