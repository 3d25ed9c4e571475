"""Which test carries which marker, in one table; tests/conftest.py gives them out.

    python tests/markers.py quick      print the paths below which a marker is given, for a command line

`make quick` hands these paths to pytest, because importing every file of tests/ takes longer than the quick tests do.
"""

import sys

MARKERS = {
    "quick": [
        "checkpoint/test_boxes.py",
        "checkpoint/test_layouts.py",
        "config",
        "data/test_problems.py",
        "data/test_record_forms.py",
        "data/test_response_tokens.py",
        "data/test_rows.py",
        "data/test_set_files.py",
        "distributed/test_balance.py",
        "evaluation",
        "objective",
        "pictures/test_decode.py",
        "pictures/test_masking.py",
        "pictures/test_preprocess.py",
        "rollout/test_data_order.py",
        "rollout/test_dynamic_sampling.py",
        "run",
        "sglang/test_answers.py",
        "sglang/test_compilers.py",
        "sglang/test_cpu_launcher.py",
        "sglang/test_environment.py",
        "sglang/test_requirements.py",
        "sglang/test_sample_store.py",
        "stages/test_stage1.py",
        "test_documentation.py",
        "test_markers.py",
        "test_nothing_evaluated.py",
        "test_reading.py",
        "tools/test_start_checks.py",
        "training/test_learning_rate.py",
    ],
    "server": [
        "rollout/test_dapo_stages.py",
        "rollout/test_stages.py",
        "sglang/test_client.py",
        "sglang/test_faults.py",
        "sglang/test_nodes.py::test_rollouts_go_to_the_servers_of_all_nodes",
        "sglang/test_server.py",
        "stages/test_stage5.py",
        "test_pipeline.py",
        "test_resident.py",
        "test_several_nodes.py",
        "tools/test_benchmark_rollout.py",
        "tools/test_check_parity.py",
        "tools/test_check_server.py",
    ],
    "torchrun": [
        "distributed/test_collectives.py",
        "distributed/test_publishing.py",
        "model/test_log_probs.py",
        "model/test_parity.py",
        "rollout/test_dapo_stages.py",
        "stages/test_stage2.py",
        "stages/test_stage5.py",
        "test_pipeline.py",
        "test_resident.py",
        "test_several_nodes.py",
        "tools/test_benchmark_layout.py",
        "tools/test_benchmark_saving.py",
        "tools/test_benchmark_vision.py",
        "tools/test_gpu_acceptance.py::test_the_command",
        "training/test_papo_step.py",
    ],
    "gpu": ["model/test_gpu.py", "model/test_varlen.py::test_on_a_gpu"],
    "nightly": [  # benchmarks, at sizes that tell something; the smallest of each stays in CI
        "slurm",
        "test_resident.py::test_an_export_that_was_in_memory_is_made_again",
        "test_resident.py::test_stage_by_stage_goes_on_from_weights_alone",
        "plan/test_fit.py::test_machine_files_state_what_a_trace_finds",
        "plan/test_plan.py::test_a_real_step_of_true_width_holds_as_much",
        "plan/test_plan.py::test_few_layers_tell_all_of_other_layouts",
        "test_resident.py::test_asked_to_end_while_it_waits_it_saves_what_only_memory_holds",
        "distributed/test_publishing.py::test_processes_on_two_machines_leave_when_the_first_has_published",
        "sglang/test_nodes.py::test_rollouts_go_to_the_servers_of_all_nodes",
        "test_pipeline.py::test_killed_in_training_and_started_again_gives_the_same_bits",
        "test_several_nodes.py",
        "tools/test_benchmark_attention.py::test_report",
        "tools/test_benchmark_layout.py::test_one_more_view_is_one_more_prompt",
        "tools/test_benchmark_host.py::test_report",
        "tools/test_benchmark_layout.py::test_report[TP2 x PP2]",
        "tools/test_benchmark_objective.py::test_demo",
        "tools/test_benchmark_objective.py::test_large_vocabulary",
        "tools/test_benchmark_objective.py::test_options_reach_the_measurement",
        "tools/test_benchmark_objective.py::test_the_kinds_are_two_objectives",
        "tools/test_benchmark_rollout.py",
        "tools/test_benchmark_saving.py",
        "tools/test_benchmark_vision.py",
        "tools/test_check_server.py::test_a_server_that_keeps_old_pictures_fails",
        "tools/test_gpu_acceptance.py::test_the_sections_with_a_server",
        "tools/test_plot_layout.py::test_drawn_again",
        "tools/test_plot_layout.py::test_measured",
    ],
}
"""Marker -> places below tests/: a directory, a file, FILE::FUNCTION or one case of it, FILE::FUNCTION[CASE]."""

EXCEPTIONS = {
    "quick": [
        "config/test_presets.py::test_run_all_shows_the_commands_of_a_preset",
        "config/test_presets.py::test_the_plan_of_a_preset",
        "objective/test_golden.py::test_the_tool_passes_the_golden_file",
        "objective/test_golden.py::test_the_tool_finds_a_damaged_number",
        "objective/test_golden.py::test_the_tool_refuses_other_files",
        "run/test_moved.py",
        "sglang/test_requirements.py::test_the_lock_file_has_what_sglang_itself_asks_for",
        "run/test_run_config.py::test_dry_run_touches_nothing_and_a_second_start_leaves",
    ],
}
"""Places without a marker that a directory or file above them has: they start processes of their own, or read
.venv-sglang."""

FIXTURES = {"server": {"server", "small_run"}, "torchrun": {"small_run"}}
"""Marker -> fixtures whose tests carry it, wherever they are."""

SERVER_FILES = ["rollout", "sglang", "stages/test_end_request.py", "tools/test_soak.py"]
"""Where tests start a server by a fixture, besides MARKERS["server"]: tests/run.sh runs all of them in one process."""

SLOW_FIXTURES = {"demo_data", "evaluation_data", "tiny_hf", "small_run", "server"}
"""Fixtures that take too long for a quick test."""


def markers_of(place: str, fixtures: set[str]) -> set[str]:
    """Return the markers of a test.

    Args:
        place: its id below tests/, e.g. "objective/test_golden.py::test_losses[case 1]"
        fixtures: the names of all fixtures that it uses, directly or not
    """
    markers = {name for name, above in MARKERS.items() if is_below(place, above)}
    markers -= {name for name, above in EXCEPTIONS.items() if is_below(place, above)}
    markers |= {name for name, slow in FIXTURES.items() if slow & fixtures}
    if fixtures & SLOW_FIXTURES or "nightly" in markers:
        markers.discard("quick")
    return markers


def uses_server(nodeid: str) -> bool:
    """Tell whether a test stands in a file or room most of whose tests use an SGLang server."""
    return is_below(nodeid.removeprefix("tests/"), [*MARKERS["server"], *SERVER_FILES])


def is_below(place: str, above: list[str]) -> bool:
    """Tell whether `place` is one of `above` or lies below one: a file in a directory, a function in a file, a case."""
    return any(place == other or place.startswith((f"{other}/", f"{other}::", f"{other}[")) for other in above)


if __name__ == "__main__":
    print(*sorted({f"tests/{place.partition('::')[0]}" for place in MARKERS[sys.argv[1]]}))
