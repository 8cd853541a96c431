"""The worlds there are and their scripted players, by the name a config gives."""

from jaxplan.config.schema import EnvConfig
from jaxplan.envs.base import Expert, TextEnv
from jaxplan.envs.craftax_classic import make_craftax_classic
from jaxplan.envs.craftax_expert import make_craftax_expert

WORLDS = {"craftax_classic": make_craftax_classic}
EXPERTS = {"craftax_classic": make_craftax_expert}


def make_env(config: EnvConfig) -> TextEnv:
    """Build the world that ``config`` names; the config admits no other name."""
    return WORLDS[config.name](config)


def make_expert(config: EnvConfig) -> Expert:
    """Build the scripted player of the world that ``config`` names."""
    return EXPERTS[config.name]()
