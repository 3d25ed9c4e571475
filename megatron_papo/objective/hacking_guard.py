"""Watches a run for KL_prcp hacking: pure functions from the metrics of each optimizer step to signs, and from signs to
a state.

Maximising an unbounded KL can be gamed: the policy moves away from its masked-image twin by writing tokens that have
nothing to do with the picture, and the reward is lost (arXiv 2507.06448, section 5.4). The published early signs, each
compared with the run's own past, are

    kl_prcp               its level, recent mean against the baseline                            > level_factor
    kl_prcp_variance      over tokens; published about 8.4 times a healthy run's                  > variance_factor
    clip_fraction_high    share of tokens whose ratio was clipped from above                      > clip_fraction_factor
    entropy               of BOTH policies, with the picture and with the masked picture          > entropy_factor

baseline: the mean of the first warmup_steps, then an exponential mean over about BASELINE_STEPS steps that stands still
while any sign is up. recent: an exponential mean over about RECENT_STEPS steps. The alarm is raised when signs_needed
signs, one of them about KL_prcp itself, have been up for patience_steps steps in a row, and not within cooldown_steps
of the last one.

Everything is arithmetic on numbers that every rank has, so every rank decides alike; the state is plain data for the
checkpoint.
"""

from dataclasses import asdict, dataclass, field, replace

BASELINE_STEPS = 100
RECENT_STEPS = 4
LOWEST_CLIP_FRACTION = 0.01
"""Baseline of clip_fraction_high at least: it is 0 in a step that is on-policy."""


@dataclass(frozen=True)
class GuardState:
    """What the guard knows after some steps."""

    steps: int = 0
    baseline: dict[str, float] = field(default_factory=dict)
    recent: dict[str, float] = field(default_factory=dict)
    alarming_steps: int = 0
    """Alarming steps in a row, up to now."""
    cooldown: int = 0
    """Steps left in which no alarm is raised."""
    kl_prcp_scale: float = 1.0
    """What it has multiplied gamma by so far."""
    interventions: int = 0

    def as_dict(self) -> dict:
        """Return plain data from which GuardState(**data) makes the state again."""
        return asdict(self)


@dataclass(frozen=True)
class Thresholds:
    """When a sign is up and when signs make an alarm: see the module."""

    warmup_steps: int
    level_factor: float
    variance_factor: float
    clip_fraction_factor: float
    entropy_factor: float
    signs_needed: int
    patience_steps: int
    cooldown_steps: int


@dataclass(frozen=True)
class Verdict:
    """What the guard thinks of one step."""

    ratios: dict[str, float]
    """Recent value / baseline of every quantity; {} during the warm-up."""
    signs: tuple[str, ...]
    """The quantities over their factor."""
    alarm: bool


def watched_quantities(metrics: dict[str, float]) -> dict[str, float]:
    """Return the guard's input from an optimizer step's metrics (objective.papo_loss.finish_metrics)."""
    return {
        "kl_prcp": metrics["kl_prcp_mean"],
        "kl_prcp_variance": metrics["kl_prcp_variance"],
        "clip_fraction_high": metrics["clip_fraction_high"],
        "entropy": metrics["entropy"],
        "masked_image_entropy": metrics["masked_image_entropy"],
    }


def observe(state: GuardState, quantities: dict[str, float], thresholds: Thresholds) -> tuple[GuardState, Verdict]:
    """Return the state after one more step, and what to think of the step."""
    recent = _moved(state.recent, quantities, 1 / RECENT_STEPS)
    steps = state.steps + 1
    if steps <= thresholds.warmup_steps:
        baseline = _moved(state.baseline, quantities, 1 / steps)
        return replace(state, steps=steps, baseline=baseline, recent=recent), Verdict({}, (), False)

    floors = {"clip_fraction_high": LOWEST_CLIP_FRACTION}
    ratios = {name: recent[name] / max(state.baseline[name], floors.get(name, 1e-12)) for name in recent}
    up = {
        "kl_prcp": ratios["kl_prcp"] > thresholds.level_factor,
        "kl_prcp_variance": ratios["kl_prcp_variance"] > thresholds.variance_factor,
        "clip_fraction_high": ratios["clip_fraction_high"] > thresholds.clip_fraction_factor,
        "entropy": min(ratios["entropy"], ratios["masked_image_entropy"]) > thresholds.entropy_factor,
    }
    signs = tuple(name for name, is_up in up.items() if is_up)
    alarming = len(signs) >= thresholds.signs_needed and (up["kl_prcp"] or up["kl_prcp_variance"])
    in_a_row = state.alarming_steps + 1 if alarming else 0
    alarm = in_a_row >= thresholds.patience_steps and state.cooldown == 0
    after = replace(
        state,
        steps=steps,
        baseline=state.baseline if signs else _moved(state.baseline, quantities, 1 / BASELINE_STEPS),
        recent=recent,
        alarming_steps=0 if alarm else in_a_row,
        cooldown=thresholds.cooldown_steps if alarm else max(state.cooldown - 1, 0),
    )
    return after, Verdict(ratios, signs, alarm)


def lowered(state: GuardState, factor: float) -> GuardState:
    """Return the state after gamma was multiplied by factor once more."""
    return replace(state, kl_prcp_scale=state.kl_prcp_scale * factor, interventions=state.interventions + 1)


def _moved(means: dict[str, float], values: dict[str, float], weight: float) -> dict[str, float]:
    return {name: means.get(name, value) + weight * (value - means.get(name, value)) for name, value in values.items()}
