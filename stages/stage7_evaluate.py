"""Stage 7: avg@k of a checkpoint on benchmark prompts.

Sample evaluation.samples_per_prompt responses to each prompt with the evaluation section's sampling, grade them as in
training, and average over samples, then over prompts. With evaluation.masked_images every prompt is answered a second
time with its pictures masked, with evaluation.without_images once more as text alone: what is left of the accuracy was
not seen in the picture.

In a run: every evaluation set that this iteration is evaluated on, or the one that --evaluation-set names. The work is
in megatron_papo/evaluation/, which a resident stage 4 uses, too. Finished samples are kept beside the output: killed,
or asked for more samples per prompt, only those that are missing are asked for.

Reads:  an evaluation set (stage 1: prompts.jsonl, images/), a Hugging Face checkpoint.
Writes: predictions.jsonl, one records.Prediction per line; metrics.json; protocol.json, what was asked and how.
"""

from megatron_papo.checkpoint.keep import tidy
from megatron_papo.run.command_line import StageParser, add_server_option, run, server_of
from megatron_papo.run.stage_output import read_manifest


def main() -> None:
    parser = StageParser("stage7_evaluate", __doc__ or "")
    add_server_option(parser)
    args, tasks = parser.parse()
    from megatron_papo.evaluation.evaluate import evaluate_all

    evaluate_all(tasks, lambda task: server_of(args, task))
    directory, last = tasks[-1].run, tasks[-1].turn.iteration
    if directory is not None and last == directory.config.iterations and read_manifest(directory.trained(last)):
        tidy(directory, last)  # which iterations are the best is known only now, and no stage 6 comes after


if __name__ == "__main__":
    run(main)
