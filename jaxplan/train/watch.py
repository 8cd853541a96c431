"""Warnings of a PPO run: numbers that mean trouble, what causes it, what to change."""

from collections.abc import Mapping

from jaxplan.config.schema import PpoConfig

_COLLAPSED = 0.02  # entropy of plan or act, as a share of log 2
_OUTSIDE = 0.01  # share of ratios outside [0.9, 1.1] before any update
_PATIENCE = 5  # iterations in a row that explain less than nothing
_INTERVAL = 20  # iterations until the same is said again

_ROLES = ("decide", "plan", "action")


class Watch:
    """Looks at every iteration's metrics, and says each thing only now and then.

    Args:
        config: of the run; its values are named in the advice.
    """

    def __init__(self, config: PpoConfig):
        self._config = config
        self._said: dict[str, int] = {}
        self._unexplained = 0

    def warnings(self, number: int, row: Mapping[str, float]) -> list[str]:
        """What there is to say of iteration ``number``.

        Args:
            number: of the iteration, counted from 0.
            row: its metrics; one that is missing is not looked at.
        """
        found = {
            "decide": self._decide(row),
            "ratio": self._ratio(row),
            "critic": self._critic(row),
            "skipped": self._skipped(row),
        }
        return [
            text for cause, text in found.items() if self._is_news(cause, text, number)
        ]

    def _is_news(self, cause: str, text: str, number: int) -> bool:
        if not text or number - self._said.get(cause, -_INTERVAL) < _INTERVAL:
            return False
        self._said[cause] = number
        return True

    def _decide(self, row: Mapping[str, float]) -> str:
        entropy = row.get("ppo/decide_entropy", 1.0)
        if entropy >= _COLLAPSED:
            return ""
        rate = row.get("rollout/plan_rate", 0.0)
        config = self._config
        return (
            f"ppo/decide_entropy={entropy:.3g} is below {_COLLAPSED}: the agent no "
            f"longer chooses whether to plan (rollout/plan_rate={rate:.1%}). Usually "
            "plans cost more than they earn, or one early success decided it: set "
            f"ppo.decide_explore to 0.05, raise ppo.ent_coef.decide="
            f"{config.ent_coef.decide}, or lower ppo.plan_cost={config.plan_cost}"
        )

    def _ratio(self, row: Mapping[str, float]) -> str:
        shares = {
            role: row.get(f"ppo/ratio_error_outside_{role}", 0.0) for role in _ROLES
        }
        role = max(shares, key=lambda name: shares[name])
        if shares[role] <= _OUTSIDE:
            return ""
        return (
            f"ppo/ratio_error_outside_{role}={shares[role]:.1%} is above {_OUTSIDE:.0%}"
            ": before any update the policy disagrees with what was sampled. Usually "
            "arithmetic is too coarse: set model.compute_dtype to float32; if the data "
            "is stale instead, set ppo.off_policy to decoupled"
        )

    def _skipped(self, row: Mapping[str, float]) -> str:
        skipped = row.get("ppo/skipped_updates", 0.0)
        if not skipped:
            return ""
        return (
            f"ppo/skipped_updates={skipped:.0f}: so many gradients of this iteration "
            "were not finite, and what they were to teach is lost. Usually steps are "
            "too large: lower ppo.optimizer.learning_rate="
            f"{self._config.optimizer.learning_rate}"
        )

    def _critic(self, row: Mapping[str, float]) -> str:
        explained = row.get("ppo/explained_variance", 0.0)
        self._unexplained = self._unexplained + 1 if explained < 0 else 0
        if self._unexplained < _PATIENCE:
            return ""
        config = self._config
        return (
            f"ppo/explained_variance={explained:.3g}, below 0 for {self._unexplained} "
            "iterations: the critic is worse than a constant. Usually it learns too "
            "slowly or returns are large: raise ppo.value_warmup_iterations="
            f"{config.value_warmup_iterations} or ppo.value_learning_rate_ratio="
            f"{config.value_learning_rate_ratio}, or set ppo.value_scaling to true"
        )
