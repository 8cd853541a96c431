"""The last two stages of a run: play the panel with every arm, and report."""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxplan.config.schema import RunConfig
from jaxplan.core.mesh import make_mesh
from jaxplan.core.processes import agree
from jaxplan.envs.base import Expert
from jaxplan.envs.guided import Guided
from jaxplan.envs.worlds import make_env, make_expert, make_references
from jaxplan.eval.panels import Panel, by_episode, play_panel, result_of
from jaxplan.eval.replay import make_replay
from jaxplan.eval.report import print_table, write_report
from jaxplan.eval.scripted import describe_play, format_play, play_scripted_panel
from jaxplan.io.progress import Progress
from jaxplan.io.rundir import RunDirectory, made_by
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.models.params import LlamaParams
from jaxplan.rollout.rounds import Language
from jaxplan.rollout.scripted import RandomPlayer
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.rollout.spoken import spoken_turns
from jaxplan.text.tokenizer import Tokenizer

_TIMED_STAGES = ("collect", "sft", "ppo", "evaluate")


def make_panel(config: RunConfig, tokenizer: Tokenizer) -> Panel:
    """The panel of a run."""
    env = make_env(dataclasses.replace(config.env, max_steps=config.evaluate.max_steps))
    guide = make_expert(config.env, config.expert)
    known = [style for style in config.collect.styles if style in guide.styles]
    return Panel(
        env=env,
        config=config.evaluate,
        rollout=config.rollout,
        model=config.model,
        budget=config.plan.budget,
        turn_tokens=longest_turn(tokenizer, env, config.plan),
        guide=guide,
        style=guide.styles.index(known[0]) if known else 0,
    )


def evaluate_arms(
    config: RunConfig,
    run: RunDirectory,
    tokenizer: Tokenizer,
    policies: dict[str, Callable[[], LlamaParams]],
    stop: StopRequest,
) -> dict[str, Any]:
    """Play the panel with the arms of ``evaluate.arms``.

    An arm that has finished is not played again when the stage is. A policy that is
    told the price of a plan token plays once for each price P, as ``arm@P``.

    Args:
        config: the run.
        run: its directory.
        tokenizer: of the policies.
        policies: by arm, loaded when their turn comes.
        stop: asked between two segments.

    Returns:
        ``results``, a row for each arm and mode.

    Raises:
        Stopped: someone asked; finished arms are kept.
        ValueError: an arm is neither a scripted player nor a policy of the run.
    """
    panel = make_panel(config, tokenizer)
    env = panel.env
    players: dict[str, Expert] = {
        "random": RandomPlayer(len(env.action_names)),
        **make_references(config.env),
    }
    chosen = config.evaluate.arms or (*players, *policies)
    players["expert"] = make_expert(config.env, config.expert)
    strange = [arm for arm in chosen if arm not in players | policies]
    if strange:
        raise ValueError(
            f"evaluate.arms: {strange} are neither scripted players "
            f"({', '.join(players)}) nor policies of this run ({', '.join(policies)})"
        )
    results = []
    for arm in chosen:
        if arm in players:
            scripted = partial(_play_scripted, arm, players[arm], panel, stop)
            plays: dict[str, Callable[[], dict[str, Any]]] = {arm: scripted}
        else:
            plays = _plays(arm, policies[arm], panel, config, tokenizer, stop)
        for name, play in plays.items():
            marker = f"evaluate-{name}"
            if not agree(run.is_done(marker)):
                run.finish(marker, play())
            results += run.results(marker)["results"]
    return {"results": results}


def _plays(
    arm: str,
    load: Callable[[], LlamaParams],
    panel: Panel,
    config: RunConfig,
    tokenizer: Tokenizer,
    stop: StopRequest,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What a policy plays, by name: the panel, once for each price it is told."""
    language = make_language(tokenizer, panel.played, config.plan)
    told = {
        f"{arm}@{price:.12g}": language.saying(number)
        for number, price in enumerate(config.plan.prices)
    } or {arm: language}

    def play(name: str) -> dict[str, Any]:
        with jax.set_mesh(make_mesh(config.mesh)):
            return _play(name, load(), panel, told[name], tokenizer, stop)

    return {name: partial(play, name) for name in told}


def _play_scripted(
    arm: str, player: Expert, panel: Panel, stop: StopRequest
) -> dict[str, Any]:
    with Progress(f"evaluate {arm}", panel.config.episodes) as progress:
        play = play_scripted_panel(panel, player, _reporter(progress, stop))
    names, confidence = panel.env.event_names, panel.config.confidence
    row = result_of(arm, "never", play.episodes, names, confidence)
    if arm == "expert":
        row |= describe_play(play, names, player.goal_names, confidence)
    return {"results": [row], "episodes": {"never": by_episode(play.episodes)}}


def _reporter(progress: Progress, stop: StopRequest) -> Callable[[int, int], None]:
    def report(done: int, env_steps: int) -> None:
        progress.update(done, env_steps=env_steps)
        if stop.requested:
            raise Stopped

    return report


def _play(
    arm: str,
    params: LlamaParams,
    panel: Panel,
    language: Language,
    tokenizer: Tokenizer,
    stop: StopRequest,
) -> dict[str, Any]:
    listed = panel.listed()
    with Progress(f"evaluate {arm}", len(listed)) as progress:
        episodes, segments = play_panel(
            params, panel, language, listed, _reporter(progress, stop)
        )
    confidence = panel.config.confidence
    rows = [
        result_of(
            arm, mode, episodes.of_mode(number), panel.env.event_names, confidence
        )
        for number, mode in enumerate(panel.config.modes)
    ]
    # Lane 0 begins with the first mode, on the first world.
    worlds = listed.worlds
    worlds = worlds.world if isinstance(worlds, Guided) else worlds
    world = jax.tree.map(lambda leaf: leaf[0], worlds)
    turns = spoken_turns(segments, tokenizer, entry=0)
    seed = int(np.asarray(panel.seeds)[0])
    mode = panel.config.modes[0]
    return {
        "results": rows,
        "episodes": {
            mode: by_episode(episodes.of_mode(number))
            for number, mode in enumerate(panel.config.modes)
        },
        "replay": make_replay(arm, mode, seed, world, turns, panel.env),
    }


def write_run_report(config: RunConfig, run: RunDirectory) -> Path:
    """Write the report of a run, and print its table.

    Returns:
        The page.
    """
    results = run.results("evaluate")["results"]
    stages = {name: _results_or_nothing(run, name) for name in _TIMED_STAGES}
    seconds = {name: stage.get("wall_seconds") for name, stage in stages.items()}
    compiling = [stage.get("compile_seconds", 0.0) for stage in stages.values()]
    summary = {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        **made_by(),
        "commit": run.commit,  # of the start, whatever has been committed since
        "wall_seconds": seconds | {"compile": sum(compiling)},
        "results": results,
    }
    print_table(results)
    for row in results:
        if "plan_life" in row:
            sys.stdout.write(f"\n{format_play(row)}")
    return write_report(run.path, summary, _last_replay(run, results))


def _results_or_nothing(run: RunDirectory, stage: str) -> dict[str, Any]:
    return run.results(stage) if run.is_done(stage) else {}


def _last_replay(run: RunDirectory, results: list[dict[str, Any]]) -> Any:
    """The episode of the arm that learnt longest."""
    return run.results(f"evaluate-{results[-1]['arm']}").get("replay")
