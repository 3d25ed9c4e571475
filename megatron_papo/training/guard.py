"""The hacking guard of a run: what objective/hacking_guard.py sees, turned into the configured action."""

from dataclasses import dataclass, replace

from megatron_papo.config import HackingGuardConfig, ObjectiveConfig
from megatron_papo.objective.hacking_guard import GuardState, Thresholds, Verdict, lowered, observe, watched_quantities


def thresholds_of(config: HackingGuardConfig) -> Thresholds:
    """Return the guard's thresholds from its configuration."""
    return Thresholds(
        warmup_steps=config.warmup_steps,
        level_factor=config.level_factor,
        variance_factor=config.variance_factor,
        clip_fraction_factor=config.clip_fraction_factor,
        entropy_factor=config.entropy_factor,
        signs_needed=config.signs_needed,
        patience_steps=config.patience_steps,
        cooldown_steps=config.cooldown_steps,
    )


@dataclass(frozen=True)
class Decision:
    """One alarm and what follows from it; a line of guard.jsonl."""

    step: int
    attempt: int
    action: str
    """warn, lower_gamma, rollback (with a lower gamma) or stop."""
    signs: tuple[str, ...]
    ratios: dict[str, float]
    """Recent value / baseline of every watched quantity."""
    kl_prcp_scale: float
    """What kl_prcp_coef is multiplied by from the next step on."""

    @property
    def message(self) -> str:
        seen = ", ".join(f"{name} {self.ratios[name]:.1f} x its baseline" for name in self.signs)
        what = {
            "warn": "nothing is changed",
            "lower_gamma": f"kl_prcp_coef is now {self.kl_prcp_scale:.4g} x its value",
            "rollback": f"back to the checkpoint, kl_prcp_coef {self.kl_prcp_scale:.4g} x its value",
            "stop": "stopped: lower objective.kl_prcp_coef, or choose another hacking_guard.action",
        }[self.action]
        return f"hacking guard: step {self.step}: {seen}: {what}"


class Guard:
    """Holds the state over the steps of a stage. Every rank has one and, given the same metrics, decides alike."""

    def __init__(self, config: HackingGuardConfig, objective: ObjectiveConfig, saved: dict | None):
        self.config, self.thresholds = config, thresholds_of(config)
        self.watches = config.action != "off" and objective.kl_prcp_coef > 0
        self.state = GuardState(**saved) if saved else GuardState()
        self.signs: tuple[str, ...] = ()

    @property
    def kl_prcp_scale(self) -> float:
        """Return what kl_prcp_coef is multiplied by: 1 unless this guard is one that lowers it."""
        return self.state.kl_prcp_scale if self.config.lowers_gamma else 1.0

    def observe(self, metrics: dict[str, float], step: int, attempt: int) -> Decision | None:
        """Take in the metrics of a finished step, and return the decision if there is an alarm."""
        if not self.watches:
            return None
        self.state, verdict = observe(self.state, watched_quantities(metrics), self.thresholds)
        self.signs = verdict.signs
        return self._decide(verdict, step, attempt) if verdict.alarm else None

    def _decide(self, verdict: Verdict, step: int, attempt: int) -> Decision:
        action: str = self.config.action
        if self.config.lowers_gamma:
            if self.state.kl_prcp_scale < self.config.lowest_gamma_scale:
                action = "warn"
            else:
                self.state = lowered(self.state, self.config.gamma_factor)
                if action == "rollback_and_lower_gamma":
                    action = "rollback"
        return Decision(step, attempt, action, verdict.signs, verdict.ratios, self.state.kl_prcp_scale)

    def went_back(self) -> None:
        """Forget, after a rollback, the steps that led to the alarm; what was normal before it still is."""
        self.state = replace(self.state, recent=self.state.baseline, alarming_steps=0, cooldown=0)
        self.signs = ()
