"""Run the stages of a config: collect, sft, ppo, evaluate, report.

    python scripts/train.py --config configs/quickstart.yaml [key=value ...]

The same command again goes on where it was: finished stages are not run again, and an
interrupted one resumes from its last checkpoint. This script only assembles the parts.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

from jaxplan.config.reader import parse_command_line
from jaxplan.config.schema import RunConfig

# XLA logs an error a line for each CPU feature it merely prefers, whenever a program
# comes from the persistent cache; nothing is wrong.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"


def main(description: str, only: tuple[str, ...] = ()) -> int:
    """Read the command line before anything slow is imported, then run.

    Args:
        description: what the script does, for ``--help``.
        only: the stages it is for; all by default.
    """
    config, flags = parse_command_line(description=description.split("\n")[0])
    stages = [str(stage) for stage in config.stages if not only or stage in only]
    if not stages:
        _say(f"error: stages={list(config.stages)} has none of {', '.join(only)}")
        return 2
    from jaxplan.core.processes import OtherProcessError, start_processes
    from jaxplan.core.runtime import start_jax
    from jaxplan.io.rundir import RunDirectory, RunDirectoryError
    from jaxplan.io.stopping import EXIT_CODE, Stopped, StopRequest
    from jaxplan.io.weights import check_weights

    try:
        start_processes()
        compile_seconds = start_jax(CACHE)
        check_weights(config)
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        _say(f"error: {error}")
        return 2
    stop = StopRequest().listen()
    try:
        with RunDirectory(
            config.run_root,
            config,
            resume=flags.resume,
            fresh=flags.fresh,
            notify=_say,
        ) as run:
            Run(config, run, stop, compile_seconds).run_stages(stages)
    except Stopped:
        _say("stopped as asked; the same command goes on from here")
        return EXIT_CODE
    except (
        OtherProcessError,
        RunDirectoryError,
        FileNotFoundError,
        FloatingPointError,
        ValueError,
    ) as error:
        if os.environ.get("JAXPLAN_TRACEBACK"):
            raise
        _say(f"error: {error}")
        return 2
    return 0


def _say(sentence: str) -> None:
    from jaxplan.core.processes import is_first

    if is_first():
        print(sentence, file=sys.stderr, flush=True)


class Run:
    """One run: what all stages share, made once, and the stages."""

    def __init__(self, config: RunConfig, run, stop, compile_seconds) -> None:
        """Make tokenizer, world and language; refuse sizes that do not fit."""
        import jax

        from jaxplan.envs.worlds import make_env
        from jaxplan.io.chat import open_tokenizer
        from jaxplan.rollout.setup import check_sizes, longest_turn, make_language
        from jaxplan.train.loop import Setting, check_mesh

        self.config, self.run, self.compile_seconds = config, run, compile_seconds
        self.tokenizer = open_tokenizer(config)
        env = make_env(config.env)
        language = make_language(self.tokenizer, env, config.plan)
        turn_tokens = longest_turn(self.tokenizer, env, config.plan)
        check_sizes(language, config.rollout, config.plan, turn_tokens)
        self.setting = Setting(
            config=config,
            run_dir=run.path,
            env=env,
            language=language,
            vocab_size=self.tokenizer.vocab_size,
            turn_tokens=turn_tokens,
            stop=stop,
        )
        check_mesh(self.setting)
        used, there = self.setting.mesh.size, jax.device_count()
        if used < there:
            _say(f"mesh: {used} of {there} devices; mesh.data=-1 takes all")

    def run_stages(self, chosen: list[str]) -> None:
        """Run every chosen stage that has not finished, in order, and time it."""
        from jaxplan.core.processes import agree

        stages = {
            "collect": self.collect,
            "sft": self.sft,
            "ppo": self.ppo,
            "evaluate": self.evaluate,
            "report": self.report,
        }
        for stage in chosen:
            if agree(self.run.is_done(stage)) and stage != "report":
                _say(f"{stage}: done before")
                continue
            began, compiled = time.monotonic(), self.compile_seconds()
            results = stages[stage]()
            timing = {
                "wall_seconds": time.monotonic() - began,
                "compile_seconds": self.compile_seconds() - compiled,
            }
            self.run.finish(stage, results | timing)

    def collect(self) -> dict:
        """The teacher's trajectories, as Parquet."""
        from jaxplan.io.datasets import NO_TOKENS
        from jaxplan.io.progress import Progress
        from jaxplan.train.collect import collect, to_json

        config = self.config
        teacher = self.make_teacher()
        token_ids = config.collect.token_ids
        about = {
            "tokenizer": self.tokenizer.sha256 if token_ids else NO_TOKENS,
            "env": config.env.name,
            "text": config.env.text,
            "teacher": config.collect.teacher,
            "config": to_json(config),
        }
        with Progress("collect", config.collect.episodes) as progress:
            return collect(
                self.run.path / "dataset",
                teacher,
                about,
                lambda done, turns: progress.update(done, turns=turns),
                self.setting.stop,
            )

    def make_teacher(self):
        """Whoever is to be imitated."""
        import jax

        from jaxplan.envs.worlds import make_env, make_expert
        from jaxplan.train.collect import ExpertTeacher
        from jaxplan.train.scribe import Desk

        config = self.config
        desk = Desk(
            env=self.setting.env,
            tokenizer=self.tokenizer,
            config=config.collect,
            seed=config.seed,
            observation_tokens=config.rollout.observation_tokens,
            plan_tokens=config.plan.budget,
            other_texts={
                level: make_env(dataclasses.replace(config.env, text=level))
                for level in config.collect.texts
            },
        )
        if config.collect.teacher == "expert":
            return ExpertTeacher(make_expert(config.env, config.expert), desk)
        if jax.process_count() > 1:
            raise ValueError(
                f"collect.teacher={config.collect.teacher} plays in one process, and "
                f"there are {jax.process_count()}"
            )
        short = dataclasses.replace(config.env, max_steps=config.collect.steps)
        desk = dataclasses.replace(desk, env=make_env(short))
        if config.collect.teacher == "endpoint":
            from jaxplan.train.endpoint_teacher import EndpointTeacher

            journals = self.run.path / "answers"
            endpoint, stop = config.collect.endpoint, self.setting.stop
            return EndpointTeacher(endpoint, config.plan, desk, journals, stop)
        from jaxplan.train.llama_teacher import LlamaTeacher

        return LlamaTeacher(self.start, self.setting.mesh, config, desk)

    def sft(self) -> dict:
        """The primed agent."""
        from jaxplan.io.datasets import read_dataset
        from jaxplan.train.data import load_segments
        from jaxplan.train.loop import train_sft

        config = self.config
        folder = config.sft.dataset or self.run.path / "dataset"
        table = read_dataset(folder, self.tokenizer)
        train, held_out = load_segments(
            table,
            self.tokenizer,
            self.setting.language,
            config.plan,
            config.rollout,
            config.sft,
            config.seed,
        )
        return train_sft(self.setting, train, held_out, self.make_probe())

    def make_probe(self):
        """What lets the student play now and then, or None."""
        from jaxplan.eval.panels import make_probe
        from jaxplan.eval.stage import make_panel

        config = self.config
        if not config.sft.panel_every:
            return None
        few = dataclasses.replace(
            config.evaluate,
            episodes=config.sft.panel_episodes,
            modes=config.evaluate.modes[:1],
        )
        panel = make_panel(dataclasses.replace(config, evaluate=few), self.tokenizer)
        return make_probe(panel, self.setting.language)

    def ppo(self) -> dict:
        """The agent after reinforcement learning."""
        from jaxplan.train.loop import train_ppo

        return train_ppo(self.setting, self.primed())

    def from_weights(self) -> bool:
        """Whether there is no SFT between the weights the config names and PPO."""
        has_sft = "sft" in self.config.stages or self.run.is_done("sft")
        return self.config.model.weights is not None and not has_sft

    def primed(self):
        """What PPO starts from: the agent SFT left, or the weights."""
        from jaxplan.train.loop import load_policy

        return self.start() if self.from_weights() else load_policy(self.setting, "sft")

    def start(self):
        """The agent a run starts with: from the weights it names, or from chance."""
        import jax

        from jaxplan.train.state import start_params

        setting, config = self.setting, self.config
        key = jax.random.key(config.seed)
        return start_params(key, config.model, setting.specs, setting.mesh)

    def evaluate(self) -> dict:
        """Every arm on the panel, each finished arm kept."""
        from jaxplan.eval.stage import evaluate_arms
        from jaxplan.train.loop import load_policy

        config, setting = self.config, self.setting
        trained, start = config.stages, "weights" if self.from_weights() else "sft"
        if config.evaluate.run:
            setting = dataclasses.replace(setting, run_dir=Path(config.evaluate.run))
            trained, start = ("sft", "ppo"), "sft"
        policies = {}
        if start == "weights":
            policies[start] = lambda: self.start().llama
        elif start in trained:
            policies[start] = lambda: load_policy(setting, "sft").llama
        if "ppo" in trained:
            policies[f"{start}+rl"] = lambda: load_policy(setting, "ppo").llama
        return evaluate_arms(
            config, self.run, self.tokenizer, policies, self.setting.stop
        )

    def report(self) -> dict:
        """The page, the summary, and the table on the terminal."""
        from jaxplan.core.processes import first_alone
        from jaxplan.eval.stage import write_run_report

        def write() -> None:
            _say(f"report: {write_run_report(self.config, self.run)}")

        first_alone(write)
        return {}


if __name__ == "__main__":
    sys.exit(main(__doc__))
