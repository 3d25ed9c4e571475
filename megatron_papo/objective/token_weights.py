"""What the policy loss of each response token is multiplied by: which tokens keep their policy gradient, and how the
advantage is scaled by what the response owes to the picture.

The clipped loss is homogeneous in the advantage: a positive factor on A is a factor on the token's loss, and moves no
clip decision. So selection and scaling are one weight per token, w >= 0, a constant of the loss.

Everything is over the WHOLE optimizer step, in its order: a list with one tensor [T] per rollout, empty where the
response is (or does not count). Which rank or micro-batch computes a rollout then changes nothing. All arithmetic in
float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import torch
from torch import Tensor

Deal = Sequence[Sequence[Sequence[int]]]
"""The positions of a step's rollouts in each micro-batch of each rank: objective/dealt_average.py."""
SMALLEST_RANGE = 1e-6
MEAN_EPSILON = 1e-8


def share_of(count: int, share: float) -> int:
    """Return ceil(share x count), exactly: a share of 0.3 is 3 tenths, not the float next to it.

    Differs: VPPO's code computes it in float32, where .3 of 50 tokens is 16.
    """
    return math.ceil(count * Fraction(repr(share)))


def largest(values: Tensor, share: float) -> Tensor:
    """Return 1.0 on exactly ceil(share x N) of the largest of [N] values, else 0.0; of equal ones the first positions.

    Differs: VPPO's code sorts without keeping the order of equal values, so that which of them it takes is open.
    """
    kept = torch.zeros(len(values), dtype=torch.float64)
    kept[values.double().sort(descending=True, stable=True).indices[: share_of(len(values), share)]] = 1.0
    return kept


@dataclass(frozen=True)
class StepTokens:
    """What is known of the response tokens of a step's rollouts before the step; one tensor [T] for each rollout."""

    sensitivity: Sequence[Tensor] | None = None
    """See objective/sensitivity.py."""
    entropy: Sequence[Tensor] | None = None
    """Over the vocabulary, of the policy with the picture and the weights of this step."""


@dataclass(frozen=True)
class TokenSelection:
    """The tokens of largest sensitivity, of largest entropy, or both."""

    sensitivity_share: float | None = None
    entropy_share: float | None = None
    over_step: bool = False
    """Shares are of all tokens of the step, not of each response."""
    sensitivity_only_weight: float = 1.0
    """Of the tokens that are selected by sensitivity, but not by entropy."""
    renormalise: bool = False
    """Scale the weights so that their mean over the step is that over the selected tokens."""

    def __call__(self, tokens: StepTokens) -> list[Tensor]:
        """Return the weight of each token, 0 where it is not selected. Raises ValueError where values are missing."""
        by_sensitivity = self._by(tokens.sensitivity, self.sensitivity_share)
        by_entropy = self._by(tokens.entropy, self.entropy_share)
        selected = by_sensitivity or by_entropy
        if by_sensitivity and by_entropy:
            selected = [
                torch.maximum(first, self.sensitivity_only_weight * second)
                for first, second in zip(by_entropy, by_sensitivity, strict=True)
            ]
        if selected is None:
            raise ValueError("a selection needs a share by sensitivity, by entropy, or both")
        if not self.renormalise:
            return selected
        count = sum(len(weights) for weights in selected)
        kept = sum(int((weights > 0).sum()) for weights in selected)
        return [weights * (count / max(kept, 1)) for weights in selected]

    def _by(self, values: Sequence[Tensor] | None, share: float | None) -> list[Tensor] | None:
        if share is None:
            return None
        if values is None:
            raise ValueError("a selection lacks the values that it selects by")
        if not self.over_step:
            return [largest(of_response, share) for of_response in values]
        lengths = [len(of_response) for of_response in values]
        return list(largest(torch.cat([*values]).cpu(), share).split(lengths)) if values else []


@dataclass(frozen=True)
class TrajectoryShaping:
    """VPPO's trajectory advantage shaping (arXiv 2510.09285, its code at a23c54b).

        S_i = mean of s over response i,   n_i = (S_i - min S) / (max S - min S), clamped to [0, 1]
        f_i = low + n_i (high - low),      high = low + (1 - low) / (mean n + 1e-8)

    f is 1 where fewer than two responses hold tokens or max S - min S <= 1e-6; an empty response gets 1 and is in no
    statistic. Its mean over the responses is 1.
    """

    lowest: float
    """low"""

    def __call__(self, sensitivity: Sequence[Tensor], deal: Deal | None = None) -> Tensor:
        """Return f [rollouts].

        Args:
            sensitivity: of each token.
            deal: min and max over the rollouts of each rank, the mean of n over each micro-batch, as in the authors'
                code; None: all over the whole step.
        """
        means, factors = _means(sensitivity), torch.ones(len(sensitivity), dtype=torch.float64)
        for of_rank in deal if deal is not None else [[range(len(sensitivity))]]:
            there = [i for i in chain.from_iterable(of_rank) if len(sensitivity[i])]
            if len(there) < 2 or means[there].max() - means[there].min() <= SMALLEST_RANGE:
                continue
            low, high = means[there].min(), means[there].max()
            for micro_batch in of_rank:
                places = [i for i in micro_batch if len(sensitivity[i])]
                if places:
                    n = ((means[places] - low) / (high - low)).clamp(0.0, 1.0)
                    factors[places] = self.lowest + n * (1.0 - self.lowest) / (n.mean() + MEAN_EPSILON)
        return factors


@dataclass(frozen=True)
class TokenShaping:
    """PGPO's token advantage shaping (arXiv 2604.01840).

        u = log(1 + max(s, 0)), scaled to 0..1 over the response
        w = u / threshold below it, else 1 + boost (u - threshold) / (1 - threshold);   then w T / sum w

    A response whose tokens are all alike keeps w = 1.
    """

    threshold: float
    boost: float

    def __call__(self, sensitivity: Tensor) -> Tensor:
        """Return w of the tokens of one response. [T] -> [T]."""
        u = sensitivity.double().clamp(min=0.0).log1p()
        if len(u) == 0 or u.max() == u.min():
            return torch.ones_like(u)
        u = (u - u.min()) / (u.max() - u.min())
        above = 1.0 + self.boost * (u - self.threshold) / (1.0 - self.threshold)
        w = torch.where(u < self.threshold, u / self.threshold, above)
        return w * len(w) / w.sum()


@dataclass(frozen=True)
class ResponseShaping:
    """CGPO's response scale, on the perception tokens alone: 1 + strength tanh((S_i - median S) / MAD).

    MAD: the median of |S - median S|; where it is 0, the scale is 1. Both over the non-empty responses of the step.
    """

    strength: float
    share: float
    """Of each response's tokens, those of largest sensitivity, that count as perception tokens."""

    def __call__(self, sensitivity: Sequence[Tensor]) -> list[Tensor]:
        """Return the factor of each token."""
        means = _means(sensitivity)
        there = torch.tensor([len(of_response) > 0 for of_response in sensitivity])
        scales = torch.ones_like(means)
        if there.any():
            median = means[there].quantile(0.5)
            deviation = (means[there] - median).abs().quantile(0.5)
            if deviation > 0:
                scales = 1.0 + self.strength * torch.tanh((means - median) / deviation)
        return [
            1.0 + largest(of_response, self.share) * (scale - 1.0)
            for of_response, scale in zip(sensitivity, scales, strict=True)
        ]


@dataclass(frozen=True)
class PolicyWeights:
    """Which of them a run uses; they multiply."""

    selection: TokenSelection | None = None
    trajectory: TrajectoryShaping | None = None
    tokens: TokenShaping | None = None
    responses: ResponseShaping | None = None

    def __call__(self, tokens: StepTokens, deal: Deal | None = None) -> list[Tensor]:
        """Return the weight of each token of each rollout of the step. deal: see TrajectoryShaping.

        Raises ValueError where something is weighed by values that are not given.
        """
        factors: list[Sequence[Tensor]] = []
        if self.selection is not None:
            factors.append(self.selection(tokens))
        if self.trajectory is not None or self.tokens is not None or self.responses is not None:
            if tokens.sensitivity is None:
                raise ValueError("advantages are shaped by sensitivity, which was not given")
            if self.trajectory is not None:
                scales = self.trajectory(tokens.sensitivity, deal)
                factors.append([scale.expand(len(s)) for scale, s in zip(scales, tokens.sensitivity, strict=True)])
            if self.tokens is not None:
                factors.append([self.tokens(of_response) for of_response in tokens.sensitivity])
            if self.responses is not None:
                factors.append(self.responses(tokens.sensitivity))
        return [torch.stack(of_rollout).prod(dim=0) for of_rollout in zip(*factors, strict=True)]


def _means(sensitivity: Sequence[Tensor]) -> Tensor:
    """Return the mean of each response, 0 where it is empty. -> float64 [rollouts]."""
    return torch.stack([s.double().sum().cpu() / max(len(s), 1) for s in sensitivity])
