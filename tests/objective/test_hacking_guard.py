"""The hacking guard on made-up runs: each sign alone and together, patience, cool-down, actions, and that its state can
be saved."""

import json
import random
from dataclasses import asdict, replace

import pytest

from megatron_papo.config import HackingGuardConfig, ObjectiveConfig
from megatron_papo.objective.hacking_guard import GuardState, observe, watched_quantities
from megatron_papo.training.guard import Guard, thresholds_of

HEALTHY = {
    "kl_prcp_mean": 0.25,
    "kl_prcp_variance": 0.8,
    "clip_fraction_high": 0.03,
    "entropy": 0.35,
    "masked_image_entropy": 0.9,
}
THRESHOLDS = thresholds_of(HackingGuardConfig())


def run_of(steps, factors=lambda step: {}, noise=0.15, seed=0):
    """Metrics of a run: healthy values with noise, times factors(step)[name]."""
    rng = random.Random(seed)
    return [
        {
            name: value * factors(step).get(name, 1.0) * (1 + noise * rng.uniform(-1, 1))
            for name, value in HEALTHY.items()
        }
        for step in range(steps)
    ]


def watch(run, state=GuardState(), **changes):
    """-> the states and verdicts of all steps."""
    states, verdicts = [], []
    for metrics in run:
        state, verdict = observe(state, watched_quantities(metrics), replace(THRESHOLDS, **changes))
        states.append(state)
        verdicts.append(verdict)
    return states, verdicts


def from_step(first, **factors):
    return lambda step: factors if step >= first else {}


def alarms(verdicts):
    return [step for step, verdict in enumerate(verdicts) if verdict.alarm]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_no_alarm(seed):
    """Also one that improves: entropies fall, KL_prcp grows by half over 400 steps."""
    slow = lambda step: {"kl_prcp_mean": 1 + step / 800, "kl_prcp_variance": 1 + step / 800, "entropy": 1 - step / 1000}
    _, verdicts = watch(run_of(400, slow, noise=0.5, seed=seed))
    assert alarms(verdicts) == []


@pytest.mark.parametrize(
    "factors, sign",
    [
        (dict(kl_prcp_mean=3.0), "kl_prcp"),
        (dict(kl_prcp_variance=4.5), "kl_prcp_variance"),
        (dict(clip_fraction_high=4.5), "clip_fraction_high"),
        (dict(entropy=2.0, masked_image_entropy=2.0), "entropy"),
    ],
)
def test_each_sign_comes_up_alone_and_is_not_enough(factors, sign):
    _, verdicts = watch(run_of(60, from_step(30, **factors)))
    assert {s for verdict in verdicts for s in verdict.signs} == {sign}
    assert alarms(verdicts) == []
    _, verdicts = watch(run_of(60, from_step(30, **factors)), signs_needed=1)
    assert bool(alarms(verdicts)) == sign.startswith("kl_prcp")  # the others say nothing about KL_prcp by themselves
    _, verdicts = watch(run_of(60))
    assert not any(verdict.signs for verdict in verdicts)


def test_one_entropy_alone_is_no_sign():
    """A policy that explores raises its own entropy; hacking raises both."""
    for name in ("entropy", "masked_image_entropy"):
        assert not any(verdict.signs for verdict in watch(run_of(60, from_step(30, **{name: 3.0})))[1])


def test_clip_fraction_is_compared_with_one_percent_at_least():
    """On-policy runs clip nothing: a baseline of 0 must not make every clipped token a sign."""
    run = [metrics | {"clip_fraction_high": 0.0 if step < 20 else 0.02} for step, metrics in enumerate(run_of(40))]
    assert not any(verdict.signs for verdict in watch(run)[1])


HACKED = from_step(30, kl_prcp_mean=5.0, kl_prcp_variance=9.0)


def test_alarm_patience_and_cooldown():
    first = alarms(watch(run_of(90, HACKED))[1])
    assert 30 + THRESHOLDS.patience_steps - 1 <= first[0] <= 36
    assert (
        all(later - earlier > THRESHOLDS.cooldown_steps for earlier, later in zip(first, first[1:])) and len(first) >= 3
    )
    impatient, patient = (alarms(watch(run_of(90, HACKED), patience_steps=n)[1])[0] for n in (1, 8))
    assert impatient < first[0] < patient
    assert len(alarms(watch(run_of(90, HACKED), cooldown_steps=0)[1])) > len(first)
    assert (
        alarms(watch(run_of(90, HACKED), warmup_steps=200)[1]) == []
    )  # hacked from its own beginning: nothing to compare with


@pytest.mark.parametrize("name, value", [("level_factor", 7.0), ("variance_factor", 12.0)])
def test_a_higher_factor_hides_its_sign(name, value):
    _, verdicts = watch(run_of(90, HACKED), **{name: value})
    assert alarms(verdicts) == [] and any(verdict.signs for verdict in verdicts)
    assert alarms(watch(run_of(90, HACKED))[1])


@pytest.mark.parametrize(
    "name, factors",
    [
        ("clip_fraction_factor", dict(clip_fraction_high=4.5)),
        ("entropy_factor", dict(entropy=2.0, masked_image_entropy=2.0)),
    ],
)
def test_a_higher_factor_hides_the_other_signs_too(name, factors):
    run = run_of(60, from_step(30, **factors))
    assert any(verdict.signs for verdict in watch(run)[1]) and not any(
        verdict.signs for verdict in watch(run, **{name: 6.0})[1]
    )


def test_the_baseline_stands_still_while_a_sign_is_up():
    states, verdicts = watch(run_of(400, HACKED))
    up = next(step for step, verdict in enumerate(verdicts) if verdict.signs)
    assert states[-1].baseline == states[up].baseline
    assert verdicts[-1].signs and verdicts[-1].ratios["kl_prcp"] > 4  # after 360 steps it has not become normal


def test_saved_and_resumed_it_says_the_same():
    run = run_of(90, HACKED)
    states, verdicts = watch(run)
    for cut in (3, 8, 20, 33, 50):
        saved = json.loads(json.dumps(states[cut].as_dict()))
        later_states, later_verdicts = watch(run[cut + 1 :], GuardState(**saved))
        assert later_states[-1] == states[-1] and later_verdicts == verdicts[cut + 1 :]
    assert watch(run[51:])[1] != verdicts[51:]  # negative control: without the state it would not


def decisions(action, run, **settings):
    guard = Guard(HackingGuardConfig(action=action, **settings), ObjectiveConfig(), None)
    return guard, [d for step, metrics in enumerate(run) if (d := guard.observe(metrics, step + 1, 1)) is not None]


def test_actions():
    run = run_of(90, HACKED)
    guard, made = decisions("warn", run)
    assert {d.action for d in made} == {"warn"} and guard.kl_prcp_scale == 1.0
    guard, made = decisions("stop", run)
    assert made[0].action == "stop" and "lower objective.kl_prcp_coef" in made[0].message
    guard, made = decisions("lower_gamma", run)
    assert made[0].action == "lower_gamma" and made[0].kl_prcp_scale == 0.1 and guard.state.interventions >= 2
    assert guard.kl_prcp_scale == pytest.approx(0.1**guard.state.interventions)
    assert "kl_prcp_coef is now 0.1 x" in made[0].message and "kl_prcp_variance" in made[0].message
    guard, made = decisions("lower_gamma", run, gamma_factor=0.5)
    assert made[0].kl_prcp_scale == 0.5
    guard, made = decisions("rollback_and_lower_gamma", run)
    assert made[0].action == "rollback" and made[0].kl_prcp_scale == 0.1
    assert decisions("off", run)[1] == [] and json.loads(json.dumps(asdict(made[0])))["step"] == made[0].step


def test_lowered_enough_it_only_warns():
    _, made = decisions("lower_gamma", run_of(200, HACKED), gamma_factor=0.05, lowest_gamma_scale=0.01)
    assert [d.action for d in made][:4] == ["lower_gamma", "lower_gamma", "warn", "warn"]


def test_without_gamma_there_is_nothing_to_watch():
    guard = Guard(HackingGuardConfig(action="stop"), ObjectiveConfig(kl_prcp_coef=0.0), None)
    assert all(guard.observe(metrics, 1, 1) is None for metrics in run_of(90, HACKED))


def test_going_back_keeps_the_lowered_gamma_and_what_is_normal():
    run = run_of(90, HACKED)
    guard = Guard(HackingGuardConfig(action="rollback_and_lower_gamma"), ObjectiveConfig(), None)
    step = next(step for step, metrics in enumerate(run) if guard.observe(metrics, step + 1, 1) is not None)
    assert step > 30
    before = guard.state
    guard.went_back()
    assert guard.state.baseline == before.baseline == guard.state.recent != before.recent
    assert guard.kl_prcp_scale == 0.1 and guard.state.interventions == 1
    assert [guard.observe(metrics, 1, 2) for metrics in run[:30]] == [None] * 30  # the healthy steps again
    hacked_again = [guard.observe(metrics, 1, 2) for metrics in run[30:40]]
    assert sum(d is not None for d in hacked_again) == 1 and guard.kl_prcp_scale == pytest.approx(0.01)


def test_a_scale_saved_by_another_action_is_not_applied():
    saved = GuardState(kl_prcp_scale=0.25, interventions=1).as_dict()
    assert Guard(HackingGuardConfig(action="warn"), ObjectiveConfig(), saved).kl_prcp_scale == 1.0
    assert Guard(HackingGuardConfig(action="lower_gamma"), ObjectiveConfig(), saved).kl_prcp_scale == 0.25
