"""Run the stages of a config: collect, sft, ppo, evaluate, report.

    python scripts/train.py --config configs/quickstart.yaml [key=value ...]

The same command again goes on where it was: finished stages are not run again, and an
interrupted one resumes from its last checkpoint. This script only assembles the parts.
"""

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


def main() -> int:
    """Read the command line before anything slow is imported, then run."""
    config, flags = parse_command_line(description=__doc__.split("\n")[0])
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
            Run(config, run, stop, compile_seconds).run_stages()
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
        from jaxplan.rollout.setup import check_sizes, longest_turn, make_language
        from jaxplan.text.tokenizer import load_tokenizer
        from jaxplan.train.loop import Setting, check_mesh

        self.config, self.run, self.compile_seconds = config, run, compile_seconds
        tokenizer = load_tokenizer(config.text.tokenizer)
        self.tokenizer = tokenizer.fill_up(config.model.vocab_size)
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

    def run_stages(self) -> None:
        """Run every stage that has not finished, in order, and time it."""
        from jaxplan.core.processes import agree

        stages = {
            "collect": self.collect,
            "sft": self.sft,
            "ppo": self.ppo,
            "evaluate": self.evaluate,
            "report": self.report,
        }
        for stage in self.config.stages:
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
        """The expert's trajectories, as Parquet."""
        from jaxplan.envs.worlds import make_expert
        from jaxplan.io.progress import Progress
        from jaxplan.train.collect import Teacher, collect, to_json

        config = self.config
        teacher = Teacher(
            env=self.setting.env,
            expert=make_expert(config.env),
            tokenizer=self.tokenizer,
            observation_tokens=config.rollout.observation_tokens,
            plan_tokens=config.plan.budget,
        )
        about = {
            "tokenizer": self.tokenizer.sha256,
            "env": config.env.name,
            "text": config.env.text,
            "config": to_json(config),
        }
        with Progress("collect", config.collect.episodes) as progress:
            return collect(
                self.run.path / "dataset",
                teacher,
                config.collect,
                config.seed,
                about,
                lambda done, turns: progress.update(done, turns=turns),
                self.setting.stop,
            )

    def sft(self) -> dict:
        """The primed agent."""
        from jaxplan.io.datasets import read_dataset
        from jaxplan.train.data import load_segments
        from jaxplan.train.loop import train_sft

        config = self.config
        table = read_dataset(self.run.path / "dataset", self.tokenizer.sha256)
        train, held_out = load_segments(
            table,
            self.tokenizer,
            self.setting.language,
            config.plan,
            config.rollout,
            config.sft.held_out,
            config.seed,
        )
        return train_sft(self.setting, train, held_out)

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
        import jax

        from jaxplan.train.loop import load_policy
        from jaxplan.train.state import start_params

        setting, config = self.setting, self.config
        if not self.from_weights():
            return load_policy(setting, "sft")
        key = jax.random.key(config.seed)
        return start_params(key, config.model, setting.specs, setting.mesh)

    def evaluate(self) -> dict:
        """Every arm on the panel, each finished arm kept."""
        from jaxplan.eval.stage import evaluate_arms
        from jaxplan.train.loop import load_policy

        config = self.config
        policies = {}
        start = "weights" if self.from_weights() else "sft"
        if start in ("weights", *config.stages):
            policies[start] = lambda: self.primed().llama
        if "ppo" in config.stages:
            policies[f"{start}+rl"] = lambda: load_policy(self.setting, "ppo").llama
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
    sys.exit(main())
