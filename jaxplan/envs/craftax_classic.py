"""Craftax-Classic as a `TextEnv`: Craftax's own step, without its reset or renderer.

Craftax is imported inside functions, because importing it starts the JAX backend. Its
episode limit, ``done`` and observation are not used: they do not tell a death from a
time limit, build a new world every step, and lose visible mobs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxplan.config.schema import EnvConfig
from jaxplan.envs.base import EnvStep, Phrases, State
from jaxplan.envs.craftax_balrog import BALROG, BALROG_PRECISE
from jaxplan.envs.craftax_compact import COMPACT
from jaxplan.envs.craftax_view import (
    FACING_NAMES,
    ITEM_NAMES,
    TILE_NAMES,
    VITAL_NAMES,
    PlayerView,
    view,
)
from jaxplan.envs.craftax_words import Describer

# Craftax's and Crafter's order, in the words of BALROG; the index is the action.
ACTION_NAMES = (
    "Noop",
    "Move West",
    "Move East",
    "Move North",
    "Move South",
    "Do",
    "Sleep",
    "Place Stone",
    "Place Table",
    "Place Furnace",
    "Place Plant",
    "Make Wood Pickaxe",
    "Make Stone Pickaxe",
    "Make Iron Pickaxe",
    "Make Wood Sword",
    "Make Stone Sword",
    "Make Iron Sword",
)

TEXTS = {"compact": COMPACT, "balrog": BALROG, "balrog_precise": BALROG_PRECISE}


@dataclass(frozen=True)
class CraftaxClassic:
    """The world and the words for it; two equal ones share their compiled code."""

    text: Describer
    event_names: tuple[str, ...]
    max_steps: int
    action_names: tuple[str, ...] = ACTION_NAMES

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase a description can contain."""
        return self.text.phrases

    @property
    def max_phrases(self) -> int:
        """The most phrases one description has."""
        return self.text.max_phrases

    @property
    def instructions(self) -> str:
        """The text that opens a context, once."""
        return self.text.instructions

    def reset(self, key: PRNGKeyArray) -> State:
        """Make a new world; all its randomness comes from ``key``."""
        from craftax.craftax_classic.envs.craftax_state import (
            EnvParams,
            StaticEnvParams,
        )
        from craftax.craftax_classic.world_gen import generate_world

        state = generate_world(key, EnvParams(), StaticEnvParams())
        return jax.tree.map(_strongly_typed, state)

    def step(self, key: PRNGKeyArray, state: State, action: Int[Array, ""]) -> EnvStep:
        """Play one action. Never resets; never both terminated and truncated."""
        from craftax.craftax_classic.envs.craftax_state import (
            EnvParams,
            StaticEnvParams,
        )
        from craftax.craftax_classic.game_logic import craftax_step

        action = action.astype(jnp.int32)
        new, reward = craftax_step(key, state, action, EnvParams(), StaticEnvParams())
        terminated = new.player_health <= 0  # lava, too, takes all health
        return EnvStep(
            state=new,
            reward=reward.astype(jnp.float32),
            terminated=terminated,
            truncated=(new.timestep >= self.max_steps) & ~terminated,
            events=new.achievements & ~state.achievements,
        )

    def view(self, state: State) -> PlayerView:
        """Look at the world through the player's eyes."""
        return view(state)

    def describe(self, state: State) -> Phrases:
        """Say what the player sees, and nothing else."""
        return self.text.describe(view(state))

    def passive(self, state: State) -> Bool[Array, ""]:
        """Tell whether the next action will be ignored (the player is asleep)."""
        return state.is_sleeping

    def draw(self, states: State) -> dict[str, Any]:
        """Draw the view, and list vitals and inventory."""
        seen = jax.device_get(jax.jit(jax.vmap(view))(states))
        steps = range(len(seen.facing))
        frames = [_frame(jax.tree.map(lambda leaf, i=i: leaf[i], seen)) for i in steps]
        return {"tile_names": list(TILE_NAMES), "frames": frames}


def _frame(seen: PlayerView) -> dict[str, Any]:
    inventory = dict(zip(ITEM_NAMES, seen.inventory.tolist(), strict=True))
    return {
        "view": seen.tiles.tolist(),
        "facing": FACING_NAMES[int(seen.facing)][:1],
        "sleeping": bool(seen.sleeping),
        "vitals": dict(zip(VITAL_NAMES, seen.vitals.tolist(), strict=True)),
        "inventory": {name: count for name, count in inventory.items() if count},
        "light": round(float(seen.light), 3),
    }


def _strongly_typed(leaf: Any) -> Array:
    """Fix the type of a leaf: with weakly typed ones the step is compiled twice."""
    return jnp.asarray(leaf, jnp.asarray(leaf).dtype)


def make_craftax_classic(config: EnvConfig) -> CraftaxClassic:
    """Build the world of ``config`` with its text level and episode limit."""
    from craftax.craftax_classic.constants import Achievement

    return CraftaxClassic(
        text=TEXTS[config.text],
        event_names=tuple(achievement.name.lower() for achievement in Achievement),
        max_steps=config.max_steps,
    )
