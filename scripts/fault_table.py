"""The twenty rows of the fault table as docs/reliability.md shows them: fault, test, what happens, figure.

`scripts/publish.py` writes the page; a test looks that every test named here exists.
"""

from collections.abc import Mapping
from typing import NamedTuple

STOP, STATE, NUMBERS = (f"test_table_{name}.py" for name in ("stop", "state", "numbers"))


class Fault(NamedTuple):
    """A row of the table."""

    what: str
    tests: tuple[str, ...]
    """FILE::NAME; files without a folder are in tests/faults/"""
    happens: str
    figures: str = ""
    """With {case: metric} in the place of a figure of benchmarks/results/reliability.csv"""


FAULTS = (
    Fault(
        "SIGKILL at a random step",
        (f"{STOP}::test_a_killed_run_ends_as_the_undisturbed_one", "test_kill.py::test_twenty_kills_of_the_command"),
        "continues from the newest complete checkpoint; weights, optimizer, random state and log end bit for bit as "
        "without it",
        "{SIGKILL at a random step: kills} kills in {SIGKILL at a random step: runs} runs, {SIGKILL at a random step: "
        "runs equal bit for bit} runs equal",
    ),
    Fault(
        "SIGKILL at each point inside a save",
        (
            f"{STOP}::test_killed_inside_a_save",
            f"{STOP}::test_killed_while_a_checkpoint_takes_the_place_of_its_older_self",
            "test_kill_in_save.py::test_killed_in_the_third_save",
        ),
        "a part of a checkpoint is never taken for one; the one before is intact; leftovers go at the next start",
        "{SIGKILL inside a save: kills} points, {SIGKILL inside a save: runs equal bit for bit} runs equal",
    ),
    Fault(
        "SIGTERM, SIGUSR1, Ctrl-C",
        (
            f"{STOP}::test_a_signal_saves_and_leaves",
            f"{STOP}::test_the_same_signal_twice_at_once_is_one",
            f"{STOP}::test_a_signal_at_any_moment_of_a_run",
            "test_signals.py::test_a_second_signal_leaves_at_once",
        ),
        "finishes the step, saves, leaves with 128 + its number; a second signal, half a second later, leaves at once",
        "{SIGTERM at a random moment: signals} at random moments, {SIGTERM at a random moment: ended and continued as "
        "documented} as documented; {stop of fat5-demo: SIGTERM to exit}",
    ),
    Fault(
        "disk full, I/O error, read-only folder in a save",
        (
            f"{STOP}::test_a_failing_disk",
            f"{STOP}::test_a_disk_that_fails_for_good",
            f"{STOP}::test_a_limit_on_the_size_of_files_that_comes_and_goes",
        ),
        "training goes on, tries again after 1, 2, 4 and 8 minutes, and ends with 2 after five failures; the last good "
        "checkpoint stays",
    ),
    Fault(
        "flipped byte, truncation, missing file in a checkpoint",
        (f"{STATE}::test_a_damaged_checkpoint", "test_damaged_checkpoint.py::test_damage_is_found_and_named"),
        "found before use, the file is named, the checkpoint before is taken; `--strict` refuses",
        "{damaged checkpoint: refused by name} of {damaged checkpoint: files flipped, cut or removed} files, {damaged "
        "checkpoint: bits found by verification} of {damaged checkpoint: single bits flipped} single bits",
    ),
    Fault(
        "the same in a data shard",
        (
            f"{STATE}::test_a_damaged_shard",
            "tests/data/test_shards.py::test_a_flipped_byte_is_named_at_first_read_only",
        ),
        "size at opening, hash at the first read; the shard is named",
        "{damaged shard: refused by name} of {damaged shard: files flipped, cut or removed} files",
    ),
    Fault(
        "NaN or Inf in loss or gradient, on one rank too",
        (
            f"{NUMBERS}::test_a_number_that_is_not_finite",
            f"{NUMBERS}::test_a_gradient_that_is_not_finite_on_one_rank_only",
        ),
        "no rank makes the update; `on_nan` aborts (default), skips or rewinds; the examples' ids are on record",
    ),
    Fault(
        "loss spike",
        (f"{NUMBERS}::test_a_loss_spike",),
        "an event with the examples' ids; `on_spike` warns (default) or rewinds; no loss is left out of the log",
    ),
    Fault(
        "a data worker dies or hangs",
        (
            "test_workers.py::test_a_killed_worker_ends_the_run_in_one_line_and_resume_is_exact",
            f"{STOP}::test_a_data_worker_that_hangs",
        ),
        "one line with the worker, or after 300 s of silence with the awaited piece; continuing is exact",
    ),
    Fault(
        "a rank dies or hangs",
        (
            "tests/train/test_many_devices.py::test_dropout_differs_and_a_lost_process_ends_the_run_which_then_continues_exactly",
            "test_ranks.py::test_a_killed_rank_ends_all_and_torchruns_restart_continues_exactly",
            f"{STOP}::test_a_rank_that_hangs",
        ),
        "all end non-zero, seconds after a death, or after 10 minutes of silence; torchrun's restart continues exactly",
        "all ended {rank 0 of 2 killed: until all have ended} after the death of rank 0, {rank 1 of 2 killed: "
        "until all have ended} after that of rank 1",
    ),
    Fault(
        "other numbers of processes, workers, micro-batches",
        (
            f"{NUMBERS}::test_world_workers_and_micro_batches_change_on_the_way",
            "tests/train/test_many_devices.py::test_a_checkpoint_continues_under_another_number_of_processes",
        ),
        "the same examples in the same order, losses within 2·10⁻⁵; numbers that do not divide are refused",
    ),
    Fault(
        "another configuration on resume",
        (
            f"{STATE}::test_another_seed_is_refused",
            f"{STATE}::test_another_learning_rate_is_warned_about_and_intervals_are_not",
            "test_changed_configuration.py::test_refused_with_both_values",
        ),
        "harmless keys pass, learning-rate-like keys warn, data, tokenizer, seed, model are refused with both values",
    ),
    Fault(
        "a checkpoint of another format version",
        (f"{STATE}::test_format_0_is_refused_by_its_number",),
        "refused with the version, not passed over for an older one",
    ),
    Fault(
        "a pickle as checkpoint, tokenizer or data",
        (f"{STATE}::test_a_pickle", "test_pickle.py::test_in_a_checkpoint_with_a_forged_manifest"),
        "never unpickled, refused by name",
    ),
    Fault(
        "out of memory",
        (f"{NUMBERS}::test_out_of_memory_on_a_cpu", f"{NUMBERS}::test_out_of_memory_on_a_gpu"),
        "one line: the step's shapes, the peak, what to change; the run continues with smaller micro-batches",
    ),
    Fault(
        "tracker or network down, log disk full",
        (
            f"{NUMBERS}::test_a_tracker_without_its_network",
            f"{NUMBERS}::test_a_tracker_without_its_disk",
            f"{NUMBERS}::test_a_full_disk_under_the_log",
        ),
        "one warning; the run ends bit for bit as without it",
    ),
    Fault(
        "the same folder twice",
        (
            f"{STOP}::test_two_commands_at_the_same_moment",
            "test_lock.py::test_a_lock_of_another_host_is_stale_without_heartbeats",
        ),
        "the second is refused and told by whom; the lock of a dead process is taken over",
    ),
    Fault(
        "kernels that do not repeat",
        (f"{NUMBERS}::test_a_run_repeats_bit_for_bit", f"{NUMBERS}::test_a_run_repeats_bit_for_bit_on_a_gpu"),
        "two runs are equal bit for bit, compiled on a GPU too",
        "costs {fat5-small step: over before} of the step on an H100",
    ),
    Fault(
        "padding, neighbours, the batch",
        (
            f"{NUMBERS}::test_a_document_does_not_depend_on_its_company",
            "tests/model/test_packed.py::test_a_document_changes_nothing_in_others",
        ),
        "no neighbour changes a bit of a document's losses, be it NaN; alone, padded and packed agree to rounding",
    ),
    Fault(
        "empty, binary, endless or mistyped input, unknown keys",
        (
            f"{STATE}::test_a_bad_corpus",
            f"{STATE}::test_an_unknown_key",
            "test_bad_input.py::test_bad_key",
            "tests/data/test_corpus.py::test_bad_input_is_one_clear_line",
        ),
        "one line: what, where, what to do; exit code 2; nothing half-written",
    ),
)


def fault_table(figures: Mapping[str, str]) -> str:
    """The table in Markdown; figures by "case: metric", absent ones are said to be not measured."""
    lines = ["| | fault | what happens | figure | injected by |", "|---|---|---|---|---|"]
    for number, fault in enumerate(FAULTS, start=1):
        tests = "<br>".join(f"`{test}`" for test in fault.tests)
        lines.append(f"| {number} | {fault.what} | {fault.happens} | {_filled(fault.figures, figures)} | {tests} |")
    return "\n".join(lines)


def _filled(text: str, figures: Mapping[str, str]) -> str:
    for key in [part.partition("}")[0] for part in text.split("{")[1:]]:
        text = text.replace(f"{{{key}}}", figures.get(key, "(not measured yet)"))
    return text
