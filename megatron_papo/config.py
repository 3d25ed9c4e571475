"""The configuration of a run: strict, typed, one section per subject. config_files.py reads it from YAML.

Every field is required in the YAML unless it has a default here. Units are part of the names or stand in the docstring
under the field.

There are two kinds of keys. Frozen ones (all that are not marked) decide what a run computes: another value needs a run
of another name. Living ones carry a `Living` mark with the reason why they may change while a run lives: they decide
when, how fast and where something happens or how long it is kept, but no number of the training.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Living:
    """Marks a key, or a section with all its keys, that may change while a run lives."""

    reason: str


LENGTH = Living("decides when the run ends, not what is computed until then")
CADENCE = Living("decides how often and for how long, not what is computed")
PLACE = Living("a place: what lies there is told apart by its content, so that the same files may move")
MEMORY = Living("where exports lie while they are needed, not what they hold")
SPEED = Living("decides how fast, not what comes out")
LIMIT = Living("ends a run that goes wrong, changes no number of one that goes well")
EVALUATION = Living("an evaluation reads checkpoints and changes none")
SERVER = Living("where and how the servers run; sampling settings and seeds are those of the requests")


def expand_home(path: str) -> str:
    """Return the name of a file or directory with `~` or `~user` at its start expanded.

    Raises ValueError where there is no such home directory, or for a name that no file can have.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path.partition('/')[0]}: no such home directory: write the path out")
    if "\0" in expanded:
        raise ValueError("no file has a name with a NUL character: correct the path")
    return expanded


PathText = Annotated[str, AfterValidator(expand_home)]
"""The name of a file or directory; `~` is expanded."""


def _require_template(template: str) -> str:
    """Return a prompt template. Raises ValueError where it is none."""
    try:
        rendered = template.format(problem="PROBLEM")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"prompt_template is not a format string with {{problem}} (write other braces doubled): {error}"
        )
    if "PROBLEM" not in rendered:
        raise ValueError("prompt_template does not contain {problem}, where the problem goes")
    return template


Template = Annotated[str, AfterValidator(_require_template)]
"""Python format string around `{problem}`."""
Form = Literal["columns", "messages", "geometry3k", "mathvista", "mathverse", "logicvista", "we_math", "mmmu_pro"]
"""What the rows of an evaluation set look like."""


Grading = Literal["mathruler", "published", "choice"]
"""What makes a response right."""


def _require_set_name(name: str) -> str:
    """Return the name of an evaluation set, which names a directory and a part of a dotted key. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise ValueError("the name of a set consists of letters, digits, _ and -, and begins with a letter or digit")
    return name


SetName = Annotated[str, AfterValidator(_require_set_name)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """The model that is trained."""

    path: Annotated[PathText | None, PLACE]
    """Hugging Face Qwen2.5-VL checkpoint directory to start from. null: the tiny model that stage 1 makes for the
    synthetic task."""
    dtype: Literal["float32", "bfloat16"]
    """Of the weights and activations in training and on the server. bfloat16 keeps fp32 main parameters in the
    optimizer."""
    recompute: Literal["none", "full"] = "none"
    """full: recompute each decoder and vision layer in the backward pass; memory for time."""
    freeze: list[Literal["vision_tower", "merger", "embeddings"]] = []
    """Parts that stage 5 leaves as they are, without gradient, optimizer state and weight decay. vision_tower: up to
    its last norm. merger: the two linear maps after it. embeddings: where tied, the output layer too. The cold start
    trains all."""


class PromptSource(Section):
    """Where a set of prompts comes from, and its column names where they are not those of the data section."""

    source: Annotated[PathText, PLACE]
    """`synthetic`, a .jsonl or .parquet file, a directory of them, or the name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset, or of a directory whose files or folders are named after splits
    (test-00000.parquet, validation/a.jsonl): only the files of this one are read. Ignored for a single file."""
    count: int | None = Field(default=None, gt=0)
    """Keep only the first so many rows; the number of rows to make for `synthetic`. null: all."""
    problem_key: str | None = None
    """Of this set; null: data.problem_key."""
    answer_key: str | None = None
    """Of this set; null: data.answer_key."""
    images_key: str | None = None
    """Of this set; null: data.images_key."""
    target_key: str | None = None
    """Of this set; null: data.target_key."""
    saliency_key: str | None = None
    """Of this set; null: data.saliency_key."""


class BenchmarkConfig(PromptSource):
    """One set of a suite: where its rows are, how they become prompts, and how answers are graded."""

    form: Form = "columns"
    """What a row looks like. columns: a column each for problem, answer and pictures. messages: the authors' release, a
    turn of the user and one of the assistant, taken as they stand. The others: the sets' own pages on the Hugging Face
    hub."""
    image_archive: str | None = None
    """Name of a zip file beside the table files that holds the pictures, read where it lies. null: paths are those of
    files."""
    prompt_template: Template | None = None
    """Of this set; null: data.prompt_template. "{problem}": the problem as it stands."""
    system_prompt: str | None = None
    """Of this set; null: data.system_prompt."""
    strip_problem: bool | None = None
    """Of this set; null: data.strip_problem."""
    min_pixels: int | None = Field(default=None, gt=0)
    """Of this set; null: evaluation.min_pixels."""
    max_pixels: int | None = Field(default=None, gt=0)
    """Of this set; null: evaluation.max_pixels."""
    resize: Literal["smart", "published"] | None = None
    """Of this set; null: evaluation.resize."""
    grading: Grading = "mathruler"
    """What makes a response right. mathruler: the content of its last box equals the answer. published: the same, but
    the answer ends with a newline, as in the authors' evaluation, which makes a few right responses wrong. choice: the
    letter of the right option, or its text."""
    problem_by: Annotated[str, Field(pattern=r"^(row|text|block:[1-9]\d*|column:.+)$")] = "row"
    """Which rows show the same problem, for standard errors. row: none. text: those with the same text. block:N: N rows
    one after the other. column:NAME: those with the same entry there."""
    problems_of: str | None = None
    """Name of the set whose problems these are, where two sets show the same; null: this one's own."""
    groups: list[str] = []
    """Over which sets averages are taken, beside that over all."""


class SyntheticTaskConfig(Section):
    """Counting squares: a grid x grid picture of 14-pixel cells with lowest..highest coloured squares and Gaussian
    noise."""

    grid: int = Field(default=4, ge=2)
    """Cells along each side of the picture."""
    lowest: int = Field(default=1, ge=0)
    """Smallest number of squares in a picture."""
    highest: int = Field(default=4, ge=1)
    """Largest number of squares in a picture."""
    noise: float = Field(default=8.0, ge=0)
    """Standard deviation of the pixel noise, in grey levels (0..255)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.lowest < self.highest <= self.grid**2:
            raise ValueError(
                f"needs lowest < highest <= grid * grid, got {self.lowest}, {self.highest}, grid {self.grid}:"
                f" --set data.synthetic.lowest={self.lowest} --set data.synthetic.highest={self.lowest + 3}"
                f" --set data.synthetic.grid={math.isqrt(self.lowest + 2) + 1}"
            )
        return self


class DataConfig(Section):
    """The prompts of training, cold start and evaluation, and how they are rendered."""

    train: PromptSource
    sft: PromptSource | None
    """Prompts with target responses for stage 2; null when there is no cold start."""
    evaluation: Annotated[PromptSource | None, EVALUATION] = None
    """Prompts of stage 7: the evaluation set named `evaluation`, beside those of evaluation.benchmarks."""
    synthetic: SyntheticTaskConfig = SyntheticTaskConfig()
    problem_key: str = "problem"
    """Column with the text of the problem."""
    answer_key: str = "answer"
    """Column with the right answer."""
    images_key: str = "images"
    """Column with the picture or the list of pictures."""
    target_key: str = "target"
    """Column with the target response (sft only)."""
    saliency_key: str = "saliency"
    """Column with one saliency map per image, read where it is present; needed for `masked_image.strategy:
    semantic`."""
    image_root: Annotated[PathText | None, PLACE] = None
    """Directory that relative image paths start from and must stay inside. null: the directory of the data file."""
    prompt_template: Template = (
        "{problem}\n\nYou first think through the reasoning process as an internal monologue, enclosed within "
        "<think> </think> tags. Then, provide your final answer enclosed within \\boxed{{}}."
    )
    """Python format string around the problem (PAPO's by default)."""
    system_prompt: str | None = None
    """null: whatever the chat template does by itself."""
    strip_problem: bool = True
    """Leave out white space before and after the problem, as the authors' template does. false: render it as it is."""
    min_pixels: int = Field(gt=0)
    """Least height * width of a resized image, see max_pixels."""
    max_pixels: int = Field(gt=0)
    """Images are resized, keeping their aspect, so that height * width lies between these two (multiples of 28 px each
    side)."""
    resize: Literal["smart", "published"] = "smart"
    """smart: once, to a size between the limits, Qwen2-VL's rule. published: twice, as the authors' code does: scaled
    to about the limit that it breaks, then rounded to multiples of 28, which may leave the limits by a few percent."""
    transparency: Literal["white", "black"] = "white"
    """What shows through transparent pixels. white: a white page. black: transparency is dropped, as in the authors'
    code, and the colour stored under it shows, in most files black: black lines on nothing become a black picture."""
    max_prompt_tokens: int = Field(gt=0)
    """Longer prompts (image tokens included) are dropped and counted."""
    skip_bad_rows: Annotated[int, LIMIT] = Field(default=0, ge=0)
    """Rows of a set that cannot be used (a damaged picture, no answer) are reported all at once and stop stage 1; up to
    so many are left out instead, counted, and listed with their reasons in skipped.jsonl."""
    max_suspicious_share: Annotated[float, LIMIT] = Field(default=0.5, ge=0, le=1)
    """Rows of a set that can be used but look wrong (pictures of one colour, answers that a right response would not
    match, or that an empty one would) are counted and shown; a larger share of one kind stops stage 1."""

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}:"
                f" --set data.min_pixels={self.max_pixels}, or --set data.max_pixels={self.min_pixels}"
            )
        return self


class SftConfig(Section):
    """Stage 2: supervised cold start on the Hugging Face model with DeepSpeed ZeRO."""

    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO: shard optimizer state (1), gradients too (2), parameters too (3)."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory."""
    processes: int = Field(default=1, gt=0)
    """Processes of torchrun, one per GPU."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step, over all processes."""
    micro_batch_size: int = Field(gt=0)
    """Samples per forward pass and process."""
    learning_rate: float = Field(gt=0)
    """AdamW's, after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up; constant afterwards."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, AdamW's."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all parameters."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch_size % (self.micro_batch_size * self.processes):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size * processes"
                f" = {self.micro_batch_size * self.processes}:"
                f" --set sft.global_batch_size={self.micro_batch_size * self.processes}, or a multiple"
            )
        return self


class ParallelConfig(Section):
    """How stage 5 spreads the model over processes."""

    tensor_model_parallel_size: int = Field(default=1, gt=0)
    """GPUs that share each layer."""
    pipeline_model_parallel_size: int = Field(default=1, gt=0)
    """Pipeline stages, each with its share of the layers; the vision tower is on the first."""
    data_parallel_size: int = Field(default=1, gt=0)
    """Replicas of the model, each with its share of a step's rollouts. Stage 5 runs in TP * PP * DP processes."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence. Needs tensor_model_parallel_size > 1."""
    vision_tower: Literal["sharded", "spread"] = "sharded"
    """sharded: the vision tower is tensor-parallel like the decoder. spread: every tensor-parallel rank holds it whole
    and encodes its share of a micro-batch's pictures: no divisibility of its sizes, one exchange instead of four
    all-reduces per layer, more memory."""

    @property
    def world_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.data_parallel_size

    @model_validator(mode="after")
    def _sequence_parallel(self) -> Self:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "sequence_parallel needs tensor_model_parallel_size > 1: --set parallel.sequence_parallel=false"
            )
        return self


class ServerConfig(Section):
    """The SGLang servers that a stage starts when it is not given any, and what is done when one fails. Not part of any
    fingerprint."""

    python: PathText | None = None
    """Python interpreter of SGLang's environment. null: $SGLANG_PYTHON, else that of .venv-sglang-cuda on GPUs, of
    .venv-sglang on CPUs."""
    host: str = "127.0.0.1"
    """Address, or network interface (ib0), that the servers listen on. Where $SERVER_LAUNCHER starts them on several
    nodes, 127.0.0.1 stands for the address that each node's name has."""
    port: int = Field(default=0, ge=0, lt=65536)
    """Of the first replica, the others count on from it. 0: any free ports."""
    replicas: int = Field(default=1, gt=0)
    """Servers with the same weights, which share the requests; of each node, where $SERVER_LAUNCHER names several."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs per replica."""
    first_gpu: int = Field(default=0, ge=0)
    """The replicas take the GPUs from this one on (SGLang's --base-gpu-id). Unused on a CPU."""
    memory_fraction: float = Field(default=0.8, gt=0, lt=1)
    """Share of GPU memory for weights and KV cache (SGLang's --mem-fraction-static). Unused on a CPU."""
    max_total_tokens: int | None = Field(default=None, gt=0)
    """Size of the KV cache in tokens; null: what the memory fraction allows."""
    deterministic: bool = True
    """A request's response is decided by its seed, whatever else is under way (SGLang's
    --enable-deterministic-inference): a stage that was killed goes on to the same rollouts. false: faster, and every
    sampling is another; SGLang's authors measured 34 % more time for deterministic decoding. Unused on a CPU, where it
    always is."""
    start_timeout_seconds: float = Field(default=1800.0, gt=0)
    """How long a server may take from its start until it answers. On GPUs SGLang compiles its kernels the first time,
    for many minutes."""
    health_interval_seconds: float = Field(default=10.0, gt=0)
    """How often a server is asked for its health while it has requests."""
    health_timeout_seconds: float = Field(default=30.0, gt=0)
    """A server that does not answer /health for so long hangs: its requests are sent again. SGLang itself gives up
    after 20 s."""
    shares_gpus: bool = False
    """The servers stand on GPUs that also train: they give up their memory when a stage is done with them (SGLang's
    release_memory_occupation) and get it back when the next one wants them; a resident stage 5 gives up its own while
    it waits."""
    max_restarts: int = Field(default=3, ge=0)
    """How often one stage starts a lost server again; one more, and it is done without, or the stage ends with an
    error."""
    extra_arguments: list[str] = []
    """Passed to sglang.launch_server as they are."""


class DynamicSamplingConfig(Section):
    """DAPO (arXiv 2503.14476): only groups that are neither all right nor all wrong are trained on; refill until the
    batch is full."""

    lowest_accuracy: float = Field(default=0.01, ge=0, le=1)
    """Lower limit of a group's mean accuracy, see highest_accuracy."""
    highest_accuracy: float = Field(default=0.99, ge=0, le=1)
    """A group is kept if its mean accuracy lies strictly between the two."""
    generation_batch_size: int | None = Field(default=None, gt=0)
    """Prompts per round of sampling; null: rollout_batch_size."""
    max_rounds: Annotated[int, LIMIT] = Field(default=20, gt=0)
    """If the batch is not full after so many rounds, the stage ends with an error."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.lowest_accuracy >= self.highest_accuracy:
            raise ValueError(
                f"lowest_accuracy {self.lowest_accuracy} is not below highest_accuracy {self.highest_accuracy}:"
                " --set rollout.dynamic_sampling.lowest_accuracy=0.01"
                " --set rollout.dynamic_sampling.highest_accuracy=0.99"
            )
        return self


class RolloutConfig(Section):
    """Stage 4: what is sampled for an iteration."""

    rollout_batch_size: int = Field(gt=0)
    """Prompts per iteration."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    group_size: int = Field(gt=1)
    """Responses per prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and of the log-probs that are trained."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Below 1 the sampling policy is not the one whose log-probs are trained: the published runs used 0.99."""
    max_response_tokens: int = Field(gt=0)
    """Longer responses are cut off."""
    concurrency: Annotated[int, SPEED] = Field(default=64, gt=0)
    """Requests under way at once."""
    request_timeout_seconds: Annotated[float, LIMIT] = Field(default=600.0, gt=0)
    """For one response. After the second time-out on a server that is otherwise healthy the stage ends with an
    error."""
    over_sampling: float = Field(default=0.0, ge=0)
    """Draw this share of prompts more than rollout_batch_size, and cancel what still runs once rollout_batch_size
    groups are complete: no waiting for the longest responses, but short ones are preferred, and which groups are
    complete first is a matter of timing: a stage that is run again gives other rollouts."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """1, in a resident run: the next iteration is sampled while the current one trains, with weights one iteration
    older than those that are then trained on it; objective.importance_sampling_cap corrects for that. Wants GPUs of
    their own for both sides."""

    @property
    def drawn_prompts(self) -> int:
        """Prompts drawn for an iteration without dynamic sampling."""
        return math.ceil(self.rollout_batch_size * (1 + self.over_sampling) - 1e-9)

    @property
    def prompts_per_round(self) -> int:
        dynamic = self.dynamic_sampling
        return self.rollout_batch_size if dynamic is None else dynamic.generation_batch_size or self.rollout_batch_size

    @model_validator(mode="after")
    def _dynamic_sampling_can_end(self) -> Self:
        dynamic = self.dynamic_sampling
        if dynamic is None:
            return self
        if self.over_sampling:
            raise ValueError(
                "over_sampling and dynamic_sampling, whose generation_batch_size draws more, do not go together:"
                " --set rollout.over_sampling=0, or --set rollout.dynamic_sampling=null"
            )
        if self.prompts_per_round * dynamic.max_rounds < self.rollout_batch_size:
            raise ValueError(
                f"dynamic_sampling cannot fill rollout_batch_size {self.rollout_batch_size} in max_rounds"
                f" {dynamic.max_rounds} of"
                f" {self.prompts_per_round} prompts:"
                f" --set rollout.dynamic_sampling.generation_batch_size={self.rollout_batch_size}"
            )
        if not any(
            dynamic.lowest_accuracy < right / self.group_size < dynamic.highest_accuracy
            for right in range(self.group_size + 1)
        ):
            raise ValueError(
                f"no group of {self.group_size} can have a mean accuracy between dynamic_sampling.lowest_accuracy"
                f" {dynamic.lowest_accuracy} and highest_accuracy {dynamic.highest_accuracy}:"
                " --set rollout.dynamic_sampling.lowest_accuracy=0.01"
                " --set rollout.dynamic_sampling.highest_accuracy=0.99"
            )
        return self


class RewardConfig(Section):
    """How a response is graded: accuracy_weight * accuracy + format_weight * format."""

    accuracy_weight: float = 0.9
    """Weight of accuracy (1 for a right answer, 0 for a wrong one) in a response's reward."""
    format_weight: float = 0.1
    """Weight of format (1 for <think> </think> and \\boxed{}, else 0) in a response's reward."""
    zero_if_cut_off: bool = False
    """Reward 0 for a response that reached max_response_tokens without ending."""
    soft_overlong_buffer_tokens: int | None = Field(default=None, gt=0)
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13): the overall reward falls linearly over the last
    so many tokens before rollout.max_response_tokens. null: none."""
    soft_overlong_penalty: float = Field(default=1.0, gt=0)
    """How much it has fallen at max_response_tokens."""
    missing_box_is_none: bool = False
    """A response without a box counts as the answer "None", as in the authors' code: it is right where the answer of
    the data is that word. false: it is wrong."""
    time_limit_seconds: float = Field(default=1.0, gt=0)
    """Of computing for grading one response; past it the answer counts as wrong and is counted as timed out. A busy
    machine takes nothing from it."""
    workers: Annotated[int, SPEED] = Field(default=2, gt=0)
    """Processes that grade."""


class MaskedImageConfig(Section):
    """How the masked image is drawn: what stands in the branch that the policy is compared with. One seed per (run
    seed, prompt, epoch), stored with the rollout."""

    strategy: Literal["random", "semantic", "full", "none", "noise", "diffusion", "blur", "grey"] = "random"
    """random: each square is blackened with probability `ratio`. semantic: the `ratio` of the squares that matter most,
    by a saliency map per image (data.saliency_key). full: the whole picture is black. none: no picture, its tokens are
    taken out of the prompt. noise: Gaussian. diffusion: variance-preserving noise. blur: Gaussian. grey: no colours."""
    ratio: float = Field(default=0.6, gt=0, le=1)
    """Share of the squares that are blackened; read by `random` and `semantic`."""
    square_pixels: int = Field(default=14, gt=0)
    """Side of a square; with space `patch`, of the resized picture."""
    noise_deviation: float = Field(default=64.0, gt=0)
    """Standard deviation of `noise`, in grey levels (0..255)."""
    diffusion_step: int = Field(default=500, gt=0, le=1000)
    """After how many of 1000 steps `diffusion` ends."""
    blur_pixels: float = Field(default=8.0, gt=0)
    """Standard deviation of `blur`."""
    space: Literal["native", "resized", "patch"] = "native"
    """native: on the native picture, before the resize (published). patch: on the one that the model sees, squares
    aligned to ViT patches. resized: between the two steps of data.resize `published`, on a picture within the pixel
    limits whose sides are no multiples of 28 yet (VPPO); as `patch` with `smart`, which has one step."""
    per: Literal["group", "response"] = "group"
    """group: the rollouts of a prompt share one (published). response: each has its own (VPPO), which costs the prompt
    again for each."""


class AnnealingConfig(Section):
    """Linear annealing of kl_prcp_coef, and of both entropy coefficients by the same factor."""

    end: float = Field(default=0.0, ge=0)
    """kl_prcp_coef at the end; it starts at objective.kl_prcp_coef."""
    steps: int = Field(gt=0)
    """Optimizer steps from the start of the run to the end of the annealing; constant afterwards."""


class SensitivityConfig(Section):
    """How much a response token depends on the picture (objective/sensitivity.py): what a policy says about it with the
    picture (p) and with the masked one (q). Read where tokens are selected, or advantages shaped, by it."""

    formula: Literal["k3", "abs", "entropy_gap", "exact", "jsd", "hellinger", "vepo"] = "k3"
    """k3: exp(d) - d - 1 with d = log q - log p, at most 10. abs: |d|. entropy_gap: max(H_q - H_p, 0) / H_q, over the
    vocabulary. exact: KL(p, q) over it. jsd: Jensen-Shannon divergence. hellinger: distance. vepo: VEPO's score of
    entropy, jsd and entropy difference. The last four need both logits at once."""
    weights: Literal["old", "current"] = "old"
    """old: once per iteration, with its first weights. current: with the weights of each step, two more sweeps before
    it."""

    @property
    def needs_both_logits(self) -> bool:
        return self.formula in ("exact", "jsd", "hellinger", "vepo")


class TokenSelectionConfig(Section):
    """Which response tokens keep a term of the loss: ceil(share * T) tokens of largest sensitivity, of largest entropy,
    or both; of equal ones the first."""

    sensitivity_share: float | None = Field(default=None, gt=0, le=1)
    """Share of the tokens, those of largest sensitivity; null: none by it."""
    entropy_share: float | None = Field(default=None, gt=0, le=1)
    """Share of the tokens, those of largest entropy of the policy that is trained; null: none by it."""
    per: Literal["response", "step"] = "response"
    """response: the share of each response's tokens. step: of all tokens of the optimizer step."""
    sensitivity_only_weight: float = Field(default=1.0, gt=0, le=1)
    """Weight of tokens that are selected by sensitivity but not by entropy; the others have 1."""
    average: Literal["all", "selected"] = "all"
    """What the term is divided by: all response tokens of the step, or those selected."""

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if self.sensitivity_share is None and self.entropy_share is None:
            raise ValueError("selects no token: give sensitivity_share, entropy_share or both, or null for the section")
        return self


class TrajectoryShapingConfig(Section):
    """VPPO's trajectory advantage shaping (arXiv 2510.09285): a response's advantage times a factor that grows with its
    mean sensitivity, the mean of which over the responses is 1."""

    lowest: float = Field(default=0.9, gt=0, le=1)
    """Factor of the least sensitive response of the step."""
    statistics: Literal["step", "dealt"] = "step"
    """step: over the whole optimizer step. dealt: as in the authors' code, over the rollouts that average_ranks and
    average_micro_batch_size deal out: extremes of each rank, means of each micro-batch."""


class TokenShapingConfig(Section):
    """PGPO's token advantage shaping (arXiv 2604.01840): the advantage of a token times a weight that grows with its
    sensitivity, the mean of which over the response is 1."""

    threshold: float = Field(default=0.4, gt=0, lt=1)
    """Sensitivity, from 0 to 1 within the response, at which the weight is 1 (before it is scaled to its mean)."""
    boost: float = Field(default=2.0, ge=0)
    """How far the weight of the most sensitive token is above 1."""


class ResponseShapingConfig(Section):
    """CGPO's response scale: 1 + strength tanh((S - median) / MAD), S a response's mean sensitivity, on its perception
    tokens."""

    strength: float = Field(default=0.1, gt=0, lt=1)
    """Largest change of an advantage, as a share of it."""
    share: float = Field(default=0.4, gt=0, le=1)
    """Of a response's tokens, those of largest sensitivity, that are its perception tokens."""


class ContrastConfig(Section):
    """CPPO's contrastive term (arXiv 2601.00501): + coefficient * softplus((KL(pi, pi_kept) - KL(pi, pi_mask)) /
    temperature), pi_kept given the picture of section kept_image, pi_mask that of masked_image; gradient through all
    three."""

    coefficient: float = Field(default=0.01, gt=0)
    """Weight of the term in the loss."""
    temperature: float = Field(default=0.1, gt=0)
    """What the difference of the two divergences is divided by."""
    share: float | None = Field(default=0.5, gt=0, le=1)
    """Of each response's tokens whose sensitivity is above 0, those with the largest; ties are kept. null: all
    tokens."""
    positive_advantages: bool = True
    """Only tokens of rollouts with an advantage above 0."""
    average: Literal["step", "dealt"] = "step"
    """step: over the selected tokens of the optimizer step. dealt: as in the authors' code, of each micro-batch, then
    over micro-batches and ranks, as average_ranks and average_micro_batch_size deal them out."""


class ObjectiveConfig(Section):
    """PAPO, arXiv 2507.06448. See docs/algorithm.md and objective/papo_loss.py for the formulas."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus"] = "grpo"
    """Of a rollout, r being its reward (objective/advantages.py). grpo: r minus the group's mean, over its standard
    deviation. dr_grpo: r minus the mean alone. rloo: r minus the mean of the others. reinforce_plus_plus: r minus the
    mean over all response tokens of the batch, over their standard deviation."""
    average: Literal["token", "sequence", "micro_batch"] = "token"
    """token: over all response tokens of the step. sequence: the mean over rollouts of their token means. micro_batch:
    token means of micro-batches of average_micro_batch_size, their mean on each of average_ranks, then over the ranks,
    as in the authors' code."""
    average_ranks: int = Field(default=8, gt=0)
    """average micro_batch, trajectory_shaping.statistics dealt: the ranks that a step's rollouts are dealt out over,
    every so-many-th to each (8 published). Part of the objective: parallel.data_parallel_size may be another."""
    average_micro_batch_size: int = Field(default=4, gt=0)
    """The same two: rollouts that share a token mean, in the order in which a rank has them (4 published). Part of the
    objective: training's micro-batches may be others."""
    clip_ratio_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio pi / pi_old is clipped at 1 - this from below."""
    clip_ratio_high: float = Field(default=0.3, gt=0)
    """The ratio pi / pi_old is clipped at 1 + this from above."""
    clip_ratio_dual: float = Field(default=3.0, gt=1)
    """Dual clip for negative advantages."""
    ratio_level: Literal["token", "sequence"] = "token"
    """sequence: one ratio per rollout, the geometric mean of its tokens' (GSPO, arXiv 2507.18071; clip ratios of 3e-4
    belong to it)."""
    importance_sampling_cap: float | None = Field(default=None, gt=0)
    """Truncated importance sampling: weight each token by min(pi_old / pi_rollout, this), pi_rollout as SGLang said.
    null: no weight."""
    overlong_filtering: bool = False
    """Responses cut off at max_response_tokens do not count in the loss (DAPO, arXiv 2503.14476); their rewards do in
    the advantages."""
    kl_ref_coef: float = Field(default=0.01, ge=0)
    """beta. 0: the reference model is not loaded."""
    kl_ref_estimator: Literal["k1", "abs", "k2", "k3"] = "k3"
    """Per-token estimate of KL(pi || pi_ref), d = log pi_ref - log pi. k1: -d. abs: |d|. k2: d^2 / 2. k3: exp(d) - d -
    1."""
    kl_prcp_coef: float = Field(default=0.02, ge=0)
    """gamma. 0: GRPO; masked images are then computed only if masked_image_entropy_coef asks for them."""
    kl_prcp_estimator: Literal["k1", "abs", "k2", "k3", "exact"] = "k3"
    """exact: the sum over the whole vocabulary; needs a masked_branch other than `cached`."""
    kl_prcp_clip: float | None = Field(default=None, gt=0)
    """Clamp each token's KL_prcp to [0, this]; null: no clamp."""
    kl_prcp_top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep only this share of a sequence's tokens, those with the largest KL_prcp; null: all."""
    kl_prcp_tokens: TokenSelectionConfig | None = None
    """Keep KL_prcp of these tokens alone; null: of all."""
    kl_prcp_annealing: AnnealingConfig | None = None
    kl_kept_coef: float = Field(default=0.0, ge=0)
    """Weight of KL(pi, pi_kept), pi_kept given the picture of section kept_image: MINIMISED (DVRP, arXiv 2601.06801:
    robustness). By kl_prcp_estimator."""
    contrast: ContrastConfig | None = None
    masked_branch: Literal["cached", "recompute", "recompute_with_grad"] = "cached"
    """Log-probs given the masked image. cached: once per iteration, with its first weights (published). recompute: with
    the weights of each step. recompute_with_grad: with gradient through both branches (the paper's objective), at twice
    the memory and time."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """eta_1: weight of the policy's entropy in the loss (the double entropy loss, first half)."""
    masked_image_entropy_coef: float = Field(default=0.0, ge=0)
    """eta_2: the masked-image policy's. Reaches the gradient only with masked_branch `recompute_with_grad`; otherwise
    (as published) it changes the logged loss alone."""
    entropy_estimator: Literal["sampled", "exact"] = "sampled"
    """sampled: -log pi of the sampled tokens (published). exact: the entropy over the vocabulary. Of both entropy
    terms."""
    sensitivity: SensitivityConfig = SensitivityConfig()
    policy_tokens: TokenSelectionConfig | None = None
    """Keep the policy gradient of these tokens alone; null: of all."""
    trajectory_shaping: TrajectoryShapingConfig | None = None
    token_shaping: TokenShapingConfig | None = None
    response_shaping: ResponseShapingConfig | None = None
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of -log pi averaged over the response tokens of correct rollouts (1e-3 in the authors' code, where it is
    off)."""

    @property
    def uses_masked_image(self) -> bool:
        return self.trains_on_masked_image or self.uses_sensitivity

    @property
    def trains_on_masked_image(self) -> bool:
        """Whether a term of the loss reads the masked-image branch."""
        return self.kl_prcp_coef > 0 or self.masked_image_entropy_coef > 0 or self.contrast is not None

    @property
    def uses_kept_image(self) -> bool:
        return self.kl_kept_coef > 0 or self.contrast is not None

    @property
    def uses_sensitivity(self) -> bool:
        """Whether anything is selected or shaped by the sensitivity of tokens."""
        shapings = (self.trajectory_shaping, self.token_shaping, self.response_shaping)
        detects = self.contrast is not None and self.contrast.share is not None
        by_sensitivity = any(selection.sensitivity_share is not None for selection in self.selections)
        return any(shapings) or detects or by_sensitivity

    @property
    def uses_step_entropy(self) -> bool:
        """Whether tokens are selected by the entropy of each step's policy."""
        return any(selection.entropy_share is not None for selection in self.selections)

    @property
    def selections(self) -> "list[TokenSelectionConfig]":
        """Return the selections of tokens that there are."""
        return [selection for selection in (self.policy_tokens, self.kl_prcp_tokens) if selection is not None]

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens are weighed in the loss by what sweeps before the step say."""
        return self.uses_sensitivity or self.uses_step_entropy or self.contrast is not None

    @property
    def uses_reference(self) -> bool:
        return self.kl_ref_coef > 0

    @property
    def masked_rows_ride(self) -> bool:
        """Whether each micro-batch of the update carries its masked-image twin."""
        with_grad_or_logits = self.masked_branch == "recompute_with_grad" or self.kl_prcp_estimator == "exact"
        return (self.trains_on_masked_image and with_grad_or_logits) or self.uses_kept_image

    @model_validator(mode="after")
    def _branches(self) -> Self:
        if self.kl_prcp_estimator == "exact" and self.masked_branch == "cached":
            raise ValueError(
                "kl_prcp_estimator exact needs the logits of both branches: --set objective.masked_branch=recompute or"
                " --set objective.masked_branch=recompute_with_grad"
            )
        if self.uses_kept_image and self.masked_branch != "recompute_with_grad":
            raise ValueError(
                "kl_kept_coef and contrast train through every view: --set objective.masked_branch=recompute_with_grad"
            )
        if self.uses_kept_image and self.kl_prcp_estimator == "exact":
            raise ValueError("kl_prcp_estimator exact compares two views, kl_kept_coef and contrast need three: use k3")
        if any(selection.average == "selected" for selection in self.selections) and self.average != "token":
            raise ValueError(
                "an average over the selected tokens needs average token: --set objective.average=token, or average all"
            )
        if self.kl_prcp_tokens is not None and self.kl_prcp_coef == 0:
            raise ValueError("kl_prcp_tokens needs a kl_prcp_coef above 0: --set objective.kl_prcp_tokens=null")
        if self.kl_prcp_annealing is not None and self.kl_prcp_coef == 0:
            raise ValueError(
                "kl_prcp_annealing needs a kl_prcp_coef above 0 to start from: --set objective.kl_prcp_annealing=null"
            )
        return self


class HackingGuardConfig(Section):
    """Watches KL_prcp for hacking and acts (objective/hacking_guard.py, docs/hacking_guard.md). Idle where kl_prcp_coef
    is 0."""

    action: Literal["off", "warn", "lower_gamma", "rollback_and_lower_gamma", "stop"] = "warn"
    """On an alarm. warn: only say so. lower_gamma: multiply kl_prcp_coef by gamma_factor from the next step on.
    rollback_and_lower_gamma: the same, after going back to the checkpoint that the stage started from (or its
    --rollback). stop: end with an error."""
    rollback_iterations: int = Field(default=0, ge=0)
    """How many iterations before the start of the current one a rollback goes (run_all.sh hands stage 5 that
    checkpoint). 0: to its start, and its rollouts are used again; else the rest of its rollouts, which another policy
    made, is left unused."""
    gamma_factor: float = Field(default=0.1, gt=0, lt=1)
    """What lower_gamma multiplies kl_prcp_coef with."""
    lowest_gamma_scale: float = Field(default=0.01, gt=0, le=1)
    """Once kl_prcp_coef has been lowered to less than this share of its value, an alarm is only a warning."""
    warmup_steps: int = Field(default=8, gt=0)
    """Optimizer steps whose mean is the first baseline; no alarm before."""
    level_factor: float = Field(default=2.0, gt=1)
    """Sign: KL_prcp over so many times its baseline."""
    variance_factor: float = Field(default=3.0, gt=1)
    """Sign: its variance over tokens. Published runs that collapsed: about 8.4 times a healthy one's."""
    clip_fraction_factor: float = Field(default=3.0, gt=1)
    """Sign: the share of tokens clipped from above."""
    entropy_factor: float = Field(default=1.5, gt=1)
    """Sign: both entropies."""
    signs_needed: int = Field(default=2, ge=1, le=4)
    """Signs at once that make a step alarming; one of them must be KL_prcp's level or variance."""
    patience_steps: int = Field(default=3, gt=0)
    """Alarming steps in a row that make an alarm."""
    cooldown_steps: int = Field(default=8, ge=0)
    """Steps after an alarm without another one."""

    @property
    def lowers_gamma(self) -> bool:
        return self.action in ("lower_gamma", "rollback_and_lower_gamma")


class OptimizerConfig(Section):
    """AdamW. Linear warm-up, then constant (published), or a linear decay."""

    learning_rate: float = Field(gt=0)
    """After the warm-up, before the decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up, counted over the whole run."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Fall linearly from the first step on, towards 0 after so many steps of the whole run, but not below a tenth.
    null: constant."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled, AdamW's; on all parameters, biases and norm weights too."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all parameters."""
    distributed: bool | None = None
    """Shard optimizer state over data-parallel ranks (Megatron's DistributedOptimizer). null: on GPUs yes, on CPU
    no."""


class TrainingConfig(Section):
    """Stage 5: how an iteration's rollouts are cut into steps and micro-batches."""

    layout: Literal["plain", "group"] = "plain"
    """plain: a row per rollout. group: each prompt once, followed by its responses; the same numbers for fewer tokens,
    wherever prompts are long against responses."""
    max_tokens_per_micro_batch: int | None = Field(default=None, gt=0)
    """layout group: tokens per micro-batch and data-parallel rank, masked-image twins included; it then replaces both
    micro-batch sizes. A group that is larger is cut, its prompt repeated."""
    global_batch_size: int = Field(gt=0)
    """Prompts (groups) per optimizer step; rollout_batch_size / global_batch_size steps per iteration."""
    micro_batch_size: int = Field(gt=0)
    """layout plain: rollouts per forward and backward pass and data-parallel rank. Changes memory and speed, not the
    result."""
    log_prob_micro_batch_size: int = Field(gt=0)
    """layout plain: rollouts per forward pass without gradient (old, reference and masked-image log-probs)."""
    encoded_picture_gigabytes: Annotated[float, SPEED] = Field(default=8.0, ge=0)
    """model.freeze vision_tower: host memory of each process of the first pipeline stage for what the tower says about
    pictures, so that it says it once (2.6 kB a patch in bfloat16; an iteration shows each picture and its masked one).
    What nobody has asked for longest leaves first. 0: keep none; the numbers are the same."""
    max_rollout_log_prob_difference: Annotated[float | None, LIMIT] = Field(default=None, gt=0)
    """Stop before the first step if the mean |log-prob by SGLang - log-prob by Megatron|, over the tokens that the
    server may sample, exceeds this; null: only report it. Rounding alone gives about 1e-6 in float32."""


class EvaluationConfig(Section):
    """Stage 7: how the answers to benchmark prompts are sampled."""

    samples_per_prompt: int = Field(default=8, gt=0)
    """k of avg@k."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling in stage 7."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of sampling in stage 7. 1: no limit."""
    top_k: int = Field(default=-1, ge=-1)
    """-1: no limit. The authors' code uses 50."""
    max_response_tokens: int = Field(gt=0)
    """Longer answers are cut off."""
    min_pixels: int | None = Field(default=None, gt=0)
    """null: data.min_pixels. The authors' code uses 1024, and then the processor's 3136."""
    max_pixels: int | None = Field(default=None, gt=0)
    """null: data.max_pixels. The authors' code uses 589824."""
    resize: Literal["smart", "published"] | None = None
    """null: data.resize. published: as the authors' evaluation does: scaled to about the limit that it breaks, narrow
    sides stretched to 28 pixels, then rounded to multiples of 28."""
    masked_images: bool = False
    """Also answer every prompt with its images masked."""
    masked_image: MaskedImageConfig | None = None
    """How they are masked in evaluation; null: the masked_image section."""
    without_images: bool = False
    """Also answer every prompt without its images, the text alone."""
    benchmarks: Annotated[dict[SetName, BenchmarkConfig], EVALUATION] = {}
    """The sets of a suite by name, e.g. those of configs/benchmarks/papo.yaml."""
    source: Annotated[PathText | None, PLACE] = None
    """Directory of a local copy of the benchmarks, in place of the names of Hugging Face datasets; a set whose own
    source is a file or directory stays there. null: each set's own source."""
    during_training: list[str] | None = None
    """Names of the evaluation sets that evaluate_every runs. null: all. Before the first and after the last iteration
    all are run in any case."""
    validation: str = "evaluation"
    """Name of the evaluation set by whose accuracy keep_best chooses (stage 7's `accuracy`, on the original images). A
    set that chooses a checkpoint flatters it: tables mark where the same set is reported."""

    def masking(self, training: MaskedImageConfig) -> MaskedImageConfig:
        """Return how images are masked. training: the masked_image section."""
        return self.masked_image or training


class Config(Section):
    """The whole configuration; each section below is one subject."""

    seed: int = Field(default=1, ge=0)
    """Of everything drawn at random: the order of the prompts, sampling, masked images, the synthetic task, the cold
    start."""
    iterations: Annotated[int, LENGTH] = Field(gt=0, le=100_000)
    """Rollout + train rounds of a run. Raising it continues a finished run."""
    keep_checkpoints: Annotated[int | None, CADENCE] = Field(default=2, gt=0)
    """Keep the Megatron checkpoints (with optimizer: about 14 bytes a parameter) of so many iterations, the newest, and
    beyond them those that hacking_guard.rollback_iterations may need and those that keep_best holds. Of the others the
    weights are deleted once the newest checkpoint and its export are complete; manifest and metrics stay. null: keep
    all."""
    keep_exports: Annotated[int | None, CADENCE] = Field(default=5, gt=0)
    """Keep the exported Hugging Face checkpoints (about 2 bytes a parameter in bfloat16) of so many iterations, the
    newest, and beyond them those that keep_best holds. null: keep all."""
    evaluate_every: Annotated[int | None, CADENCE] = Field(default=None, gt=0)
    """Evaluate the export of every so many iterations; in a resident run stage 4 does it, before it loads the next
    weights. null: evaluate only before the first and after the last iteration, which happens in any case."""
    keep_best: Annotated[int, CADENCE] = Field(default=0, ge=0)
    """Hold export and checkpoint of so many iterations with the highest accuracy on evaluation.validation so far; what
    it holds is not deleted. Needs evaluate_every. 0: hold none."""
    checkpoint_every: Annotated[int, CADENCE] = Field(default=1, gt=0)
    """Resident runs: stage 5 writes the Megatron checkpoint of every so many iterations, and of the last; a run that
    was killed repeats at most that many iterations, from the rollouts on disk. Otherwise each iteration hands its
    checkpoint to the next one's process, and all are written."""
    export_directory: Annotated[PathText | None, MEMORY] = None
    """Directory in memory, such as /dev/shm, for what a resident run needs only until the next rollouts are there: the
    exports of the iterations between two that checkpoint_every writes, but of those that are evaluated. Such an
    iteration writes rollouts, metrics and small files to the disk and no weights. Holds at most two exports (with
    rollout.max_staleness one more) and must be the same directory to training and servers: one machine. Where it has
    been emptied, a run that goes on makes the last export again, as it makes what checkpoint_every left out. null: all
    exports lie in the run."""
    save_while_sampling: Annotated[bool, CADENCE] = False
    """Resident runs: a Megatron checkpoint is written while the next rollouts are sampled, after its export, which
    sampling waits for. The weights then go to the disk twice. A run that is killed meanwhile trains that iteration
    again."""
    model: ModelConfig
    data: DataConfig
    sft: SftConfig | None
    parallel: ParallelConfig
    server: Annotated[ServerConfig, SERVER] = ServerConfig()
    rollout: RolloutConfig
    reward: RewardConfig = RewardConfig()
    masked_image: MaskedImageConfig = MaskedImageConfig()
    kept_image: MaskedImageConfig | None = None
    """The third view, of objective.kl_kept_coef and objective.contrast: a picture that keeps what matters. Drawn as the
    masked image, from a seed of its own. null: none."""
    objective: ObjectiveConfig = ObjectiveConfig()
    hacking_guard: HackingGuardConfig = HackingGuardConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    evaluation: Annotated[EvaluationConfig, EVALUATION]

    @property
    def evaluation_sets(self) -> dict[str, BenchmarkConfig]:
        """The evaluation sets by name: data.evaluation, called `evaluation`, and the benchmarks."""
        own, place = self.data.evaluation, self.evaluation.source
        sets = {} if own is None else {"evaluation": BenchmarkConfig.model_validate(dict(own))}
        for name, entry in self.evaluation.benchmarks.items():
            is_moved = place is not None and not _is_file_name(entry.source)
            sets[name] = entry.model_copy(update={"source": place}) if is_moved else entry
        return sets

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        """All contradictions between sections at once, a line each, with a --set that ends it."""
        rules = (
            self._cadence,
            self._sets,
            self._evaluation_pixels,
            self._data_fits,
            self._rollouts_fit,
            self._freeze,
            self._steps_fit,
            self._views,
        )
        problems = [problem for rule in rules for problem in rule()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _views(self) -> Iterator[str]:
        if self.objective.uses_kept_image and self.kept_image is None:
            yield "objective.kl_kept_coef and contrast need a kept picture: --set kept_image={strategy: random}"
        if self.kept_image is not None and not self.objective.uses_kept_image:
            yield "kept_image is read by objective.kl_kept_coef and contrast alone: --set kept_image=null"
        apart = self.masked_image.strategy == "none" or self.masked_image.per == "response"
        formula = self.objective.sensitivity
        if apart and self.objective.uses_sensitivity and formula.needs_both_logits:
            yield (
                f"objective.sensitivity.formula {formula.formula} compares both logits of one prompt, masked_image's"
                " strategy none and per response make other prompts: choose k3, abs or entropy_gap"
            )
        for name, view in (("masked_image", self.masked_image), ("kept_image", self.kept_image)):
            apart = view is not None and (view.strategy == "none" or view.per == "response")
            if apart and self.objective.masked_rows_ride:
                yield (
                    f"{name}: strategy none and per response make other prompts, which cannot ride in the update:"
                    " --set objective.masked_branch=cached, an estimator other than exact, and no third view"
                )
        if self.evaluation.masked_images and self.evaluation.masking(self.masked_image).strategy == "none":
            yield (
                "evaluation.masked_images needs pictures, masked_image.strategy none has none: --set"
                " evaluation.without_images=true, and masked_images=false"
            )

    def _cadence(self) -> Iterator[str]:
        """What needs the optimizer of every iteration on disk excludes checkpoint_every; keep_best needs scores."""
        if self.checkpoint_every > 1 and self.hacking_guard.action == "rollback_and_lower_gamma":
            yield (
                f"checkpoint_every {self.checkpoint_every} and hacking_guard.action rollback_and_lower_gamma exclude"
                " each other, the guard goes back to checkpoints that would not be there: --set checkpoint_every=1, or"
                " --set hacking_guard.action=lower_gamma"
            )
        if self.checkpoint_every > 1 and self.server.shares_gpus:
            yield (
                f"checkpoint_every {self.checkpoint_every} and server.shares_gpus exclude each other, training gives up"
                " the GPUs after each iteration and loads its checkpoint again: --set checkpoint_every=1"
            )
        if self.save_while_sampling and self.server.shares_gpus:
            yield (
                "save_while_sampling and server.shares_gpus exclude each other, training gives up the GPUs, with what"
                " is to be saved, before anything is sampled: --set save_while_sampling=false"
            )
        if self.export_directory is not None and self.checkpoint_every == 1:
            yield (
                f"export_directory {self.export_directory} is not used with checkpoint_every 1, all checkpoints are"
                " written: --set checkpoint_every=10, or --set export_directory=null"
            )
        if self.keep_best and self.evaluate_every is None:
            yield (
                f"keep_best {self.keep_best} needs evaluate_every, the best are chosen by their evaluation:"
                " --set evaluate_every=10, or --set keep_best=0"
            )

    def _sets(self) -> Iterator[str]:
        """Evaluation sets that are named are there, and their names tell them apart."""
        names, evaluation = list(self.evaluation_sets), self.evaluation
        if not names:
            yield (
                "no evaluation set: --set data.evaluation.source=FILE, or extend a suite such as"
                " benchmarks/papo.yaml (evaluation.benchmarks)"
            )
            return
        there = f"no evaluation set of that name, there is {', '.join(names)}"
        if evaluation.validation not in names:
            yield f"evaluation.validation {evaluation.validation}: {there}: --set evaluation.validation={names[0]}"
        during = evaluation.during_training
        for name in during or []:
            if name not in names:
                yield f"evaluation.during_training {name}: {there}: correct the name"
        if self.keep_best and during is not None and evaluation.validation not in during:
            yield (
                f"keep_best {self.keep_best} chooses by evaluation.validation {evaluation.validation}, which"
                f" evaluation.during_training leaves out: --set evaluation.during_training=[{evaluation.validation}]"
            )
        if self.data.evaluation is not None and "evaluation" in evaluation.benchmarks:
            yield (
                "evaluation.benchmarks evaluation: this is the name of data.evaluation: call it something else, or"
                " --set data.evaluation=null"
            )
        folded: dict[str, str] = {}
        for name, entry in evaluation.benchmarks.items():
            other = folded.setdefault(name.lower(), name)
            if other != name:
                yield f"evaluation.benchmarks: {other} and {name} differ in upper and lower case alone: rename one"
            if entry.problems_of is not None and entry.problems_of not in evaluation.benchmarks:
                yield (
                    f"evaluation.benchmarks.{name}.problems_of {entry.problems_of}: no set of that name:"
                    f" --set evaluation.benchmarks.{name}.problems_of=null"
                )

    def _evaluation_pixels(self) -> Iterator[str]:
        """Limits of the evaluation, and of each of its sets, which may set one of the two."""
        evaluation, data = self.evaluation, self.data
        sections: dict[str, EvaluationConfig | BenchmarkConfig] = {"evaluation": evaluation}
        sections |= {f"evaluation.benchmarks.{name}": entry for name, entry in evaluation.benchmarks.items()}
        for key, section in sections.items():
            lowest = section.min_pixels or evaluation.min_pixels or data.min_pixels
            highest = section.max_pixels or evaluation.max_pixels or data.max_pixels
            if lowest > highest:
                yield (
                    f"{key}: at least {lowest} and at most {highest} pixels exclude each other:"
                    f" --set {key}.min_pixels={highest}, or --set {key}.max_pixels={lowest} (null: those above it)"
                )
                return

    def _data_fits(self) -> Iterator[str]:
        if (self.sft is None) != (self.data.sft is None):
            yield "sft and data.sft go together: give both, or --set sft=null --set data.sft=null"
        sets = {"train": self.data.train, **self.evaluation_sets}
        if self.model.path is None and any(
            entry.source != "synthetic" for name, entry in sets.items() if name not in self.evaluation.benchmarks
        ):
            yield (
                "model.path is null, which is only possible with the synthetic task: --set model.path=DIR, the"
                " directory of a Qwen2.5-VL checkpoint"
            )

    def _rollouts_fit(self) -> Iterator[str]:
        rollouts, steps = self.rollout.rollout_batch_size, self.training.global_batch_size
        if rollouts % steps:
            yield (
                f"rollout.rollout_batch_size {rollouts} is not a multiple of training.global_batch_size {steps}:"
                f" --set rollout.rollout_batch_size={-(-rollouts // steps) * steps}"
            )
        if (self.reward.soft_overlong_buffer_tokens or 0) > self.rollout.max_response_tokens:
            yield (
                f"reward.soft_overlong_buffer_tokens {self.reward.soft_overlong_buffer_tokens} is larger than"
                f" rollout.max_response_tokens {self.rollout.max_response_tokens}:"
                f" --set reward.soft_overlong_buffer_tokens={self.rollout.max_response_tokens}"
            )
        if self.rollout.max_staleness and self.objective.importance_sampling_cap is None:
            yield (
                "rollout.max_staleness needs objective.importance_sampling_cap, other weights sampled the rollouts:"
                " --set objective.importance_sampling_cap=2.0 (usual), or --set rollout.max_staleness=0"
            )
        if self.rollout.max_staleness and self.server.shares_gpus:
            yield (
                "rollout.max_staleness and server.shares_gpus exclude each other, sampling and training go on at the"
                " same time: --set rollout.max_staleness=0"
            )

    def _freeze(self) -> Iterator[str]:
        frozen = self.model.freeze
        if self.parallel.vision_tower == "spread" and "vision_tower" in frozen and "merger" not in frozen:
            yield (
                "model.freeze vision_tower with parallel.vision_tower spread needs merger, too, what is encoded once is"
                " not spread: --set model.freeze=[vision_tower,merger], or --set parallel.vision_tower=sharded"
            )

    def _steps_fit(self) -> Iterator[str]:
        rows, dp = self.training.global_batch_size * self.rollout.group_size, self.parallel.data_parallel_size
        if self.training.layout == "group":
            if self.training.max_tokens_per_micro_batch is None:
                yield (
                    "training.layout group needs training.max_tokens_per_micro_batch:"
                    " --set training.max_tokens_per_micro_batch=16384, or --set training.layout=plain"
                )
            if self.training.global_batch_size < dp:
                yield (
                    f"training.layout group: {self.training.global_batch_size} groups a step cannot feed"
                    f" data_parallel_size {dp}: --set training.global_batch_size={dp}, or more"
                )
        elif rows % dp:
            yield (
                f"training.global_batch_size * rollout.group_size = {rows} rollouts cannot be split over"
                f" data_parallel_size {dp}:"
                f" --set training.global_batch_size={-(-self.training.global_batch_size // dp) * dp}"
            )


def _is_file_name(source: str) -> bool:
    """Say whether a source is written as a file or directory: OWNER/NAME is the name of a Hugging Face data set."""
    return source.startswith(("/", ".")) or source.endswith((".jsonl", ".parquet", ".json")) or source.count("/") > 1


def section_type(field: FieldInfo) -> type[Section] | None:
    """Return the type of the section that a field holds (or may hold, where it may be null); None for a leaf."""
    if get_origin(field.annotation) is dict:
        return None
    options = getattr(field.annotation, "__args__", (field.annotation,))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def entry_type(field: FieldInfo) -> type[Section] | None:
    """Return the type of the sections that a field holds by name; None for a field that is no such table."""
    arguments = get_args(field.annotation) if get_origin(field.annotation) is dict else ()
    return arguments[1] if arguments and issubclass(arguments[1], Section) else None


def kinds_of(field: FieldInfo) -> set[type]:
    """Return what a field may hold, e.g. {str, NoneType}; the values of a Literal count as their types."""
    kinds: set[type] = set()
    options = [field.annotation]
    while options:
        option = options.pop()
        origin, arguments = get_origin(option), get_args(option)
        if origin is Literal:
            kinds |= {type(value) for value in arguments}
        elif origin is Annotated:
            options.append(arguments[0])
        elif origin in (Union, UnionType):
            options += arguments
        elif isinstance(option, type):
            kinds.add(option)
    return kinds


def fields_along(key: str) -> list[FieldInfo]:
    """Return the fields that a dotted key passes, its own the last. Raises KeyError for a key that there is not."""
    section: type[Section] | None = Config
    fields: list[FieldInfo] = []
    names = iter(key.split("."))
    for name in names:
        if section is None or name not in section.model_fields:
            raise KeyError(f"{key}: the configuration has no such key")
        fields.append(section.model_fields[name])
        section = section_type(fields[-1])
        if (entry := entry_type(fields[-1])) is not None and next(names, None) is not None:
            section = entry  # the name of an entry is any
    return fields


def living_reason(key: str) -> str | None:
    """Say why a dotted key may change while a run lives; None for a frozen key. A section's mark holds for its keys."""
    marks = (mark for field in fields_along(key) for mark in field.metadata if isinstance(mark, Living))
    return next((mark.reason for mark in marks), None)


def is_living(key: str) -> bool:
    """Say whether a dotted key may change while a run lives; of a section, whether it may as a whole."""
    return living_reason(key) is not None


def is_place(key: str) -> bool:
    """Say whether a dotted key names something outside the run, which must have the same content at its new place."""
    return any(mark is PLACE for mark in fields_along(key)[-1].metadata)


def present_keys(section: Section, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all leaves of a configuration, of its sections that are null, and of its tables that
    are empty."""
    for name, field in type(section).model_fields.items():
        key, value = prefix + name, getattr(section, name)
        if section_type(field) is not None and value is not None:
            yield from present_keys(value, f"{key}.")
        elif entry_type(field) is not None and value:
            for entry, below in value.items():
                yield from present_keys(below, f"{key}.{entry}.")
        else:
            yield key


def leaf_keys(section: type[Section] | None = None, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys that are no sections, in the order of the schema."""
    keys: list[str] = []
    for name, field in (section or Config).model_fields.items():
        below = section_type(field)
        keys += [prefix + name] if below is None else leaf_keys(below, f"{prefix}{name}.")
    return keys


def value_of(config: Config, key: str) -> object:
    """Return the value at a dotted key: a leaf's, a section, or None where a section on the way is null, or an entry
    not there."""
    fields_along(key)
    value: object = config
    for name in key.split("."):
        if value is None:
            return None
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return value


@dataclass(frozen=True)
class Change:
    """One leaf key in which two configurations differ. None also stands for: not there, because its section is null."""

    key: str
    old: object
    new: object
    living: bool


def changes(old: Config, new: Config) -> list[Change]:
    """Return what differs between two configurations, leaf by leaf, in the order of the schema.

    Where a section is null on one side, its leaves are living only if the section as a whole is: that it appears or
    goes is the change.
    """
    return _changes(old, new, "")


def _changes(old: Section | None, new: Section | None, prefix: str) -> list[Change]:
    there = old if old is not None else new
    if there is None:
        return []
    found: list[Change] = []
    for name, field in type(there).model_fields.items():
        key = prefix + name
        before, after = (None if side is None else getattr(side, name) for side in (old, new))
        if section_type(field) is not None:
            found += _changes(before, after, f"{key}.")
        elif entry_type(field) is not None and before != after:
            found += _changes_of_entries(before or {}, after or {}, f"{key}.")
        elif old is None or new is None:
            found.append(Change(key, before, after, is_living(prefix.removesuffix("."))))
        elif before != after:
            found.append(Change(key, before, after, is_living(key)))
    return found


def _changes_of_entries(old: dict[str, Section], new: dict[str, Section], prefix: str) -> list[Change]:
    """Return what differs between two tables of sections; one that is new, or gone, is a single change."""
    found: list[Change] = []
    for name in dict.fromkeys([*old, *new]):
        key, before, after = prefix + name, old.get(name), new.get(name)
        if before is not None and after is not None:
            found += _changes(before, after, f"{key}.")
        else:
            was, now = (None if entry is None else dict(entry) for entry in (before, after))
            found.append(Change(key, was, now, is_living(key)))
    return found


def default_of(key: str) -> object:
    """Return the default of a dotted key; PydanticUndefined where a configuration file must give it."""
    return fields_along(key)[-1].get_default(call_default_factory=True)


def meaning_of(key: str) -> str:
    """Return what a dotted key means, in one line: the docstring under its field, or its section's."""
    field = fields_along(key)[-1]
    section = section_type(field)
    return " ".join((field.description or (section and section.__doc__) or "").split())
