"""Folders, files and tests that start other processes, or take more than about three seconds.

`tests/conftest.py` marks them as `slow`, and `make test-fast` leaves them out.
"""

SLOW = (
    "ablations",
    "examples",
    "finetuning/test_distributed.py",
    "finetuning/test_finetuning.py",
    "finetuning/test_interruption.py",
    "finetuning/test_recipes.py::test_an_estimate_is_what_a_step_takes",
    "finetuning/test_recipes.py::test_help_answers_in_less_than_ten_seconds",
    "hub/test_earlier_checkpoints.py",
    "hub/test_hub.py",
    "hub/test_verification.py",
    "model/test_adapters.py::test_a_process_without_this_package_reloads_an_adapter_too",
    "model/test_checkpoint.py::test_a_folder_is_loaded_and_saved_without_the_network",
    "model/test_checkpoint.py::test_a_save_that_is_killed_leaves_the_old_checkpoint",
    "model/test_gguf.py::test_what_is_saved_is_an_ordinary_checkpoint",
    "model/test_memory.py",
    "model/test_own_classes.py::test_a_registered_class_travels_with_the_files_of_its_parents",
    "model/test_saving.py::test_a_stranger_loads_it_with_the_same_scores",
    "test_alternatives.py",
    "test_benchmarks.py",
    "test_package.py",
    "test_readme.py",
)
