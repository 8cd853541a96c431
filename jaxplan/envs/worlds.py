"""The worlds there are and their scripted players, by the name a config gives."""

from jaxplan.config.schema import EnvConfig, ExpertConfig
from jaxplan.envs.base import Expert, TextEnv
from jaxplan.envs.craftax_classic import make_craftax_classic
from jaxplan.envs.craftax_expert import make_craftax_expert
from jaxplan.envs.pogs import make_pogs
from jaxplan.envs.pogs_expert import make_pogs_expert, make_pogs_references
from jaxplan.envs.probes import make_probe, make_probe_expert

WORLDS = {
    "craftax_classic": make_craftax_classic,
    "pogs": make_pogs,
    "probe": make_probe,
}
EXPERTS = {
    "craftax_classic": make_craftax_expert,
    "pogs": make_pogs_expert,
    "probe": make_probe_expert,
}
REFERENCES = {"pogs": make_pogs_references}
_AT_ITS_BEST = ExpertConfig()


def make_env(config: EnvConfig) -> TextEnv:
    """Build the world that ``config`` names; the config admits no other name."""
    return WORLDS[config.name](config)


def make_expert(config: EnvConfig, skill: ExpertConfig = _AT_ITS_BEST) -> Expert:
    """Build the scripted player that teaches the world ``config`` names.

    Raises:
        ValueError: ``skill`` asks for what this player has not.
    """
    return EXPERTS[config.name](config, skill)


def make_references(config: EnvConfig) -> dict[str, Expert]:
    """Build the scripted players a result table has beside the agents, by arm."""
    return REFERENCES[config.name](config) if config.name in REFERENCES else {}
