"""Run the stages of a config: collect, sft, ppo, evaluate, report.

    python scripts/train.py --config configs/quickstart.yaml [key=value ...]
    python scripts/train.py --config ... --dry-run [--compile] [--device-memory 80GiB]

The same command again goes on where it was: finished stages are not run again, and an
interrupted one resumes from its last checkpoint. This script only assembles the parts.
"""

import dataclasses
import functools
import os
import sys
import time
from pathlib import Path

from jaxplan.config.reader import Flags, parse_command_line
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
        _refuse(f"stages={list(config.stages)} has none of {', '.join(only)}")
        return 2
    if {"sft", "ppo"} <= {*stages} and config.ppo.start != "sft":
        _refuse(
            f"ppo.start={config.ppo.start} leaves nothing to do for the SFT of this "
            "run: leave sft out of stages (and collect), or ppo.start"
        )
        return 2
    if flags.dry_run:
        return dry_run(config, flags)
    from jaxplan.core.processes import OtherProcessError, start_processes
    from jaxplan.core.runtime import start_jax
    from jaxplan.io.checkpoints import CheckpointDamagedError
    from jaxplan.io.rundir import RunDirectory, RunDirectoryError
    from jaxplan.io.stopping import EXIT_CODE, Stopped, StopRequest
    from jaxplan.io.weights import check_weights

    try:
        start_processes()
        compile_seconds = start_jax(CACHE)
        check_weights(config)
    except (RuntimeError, ValueError, OSError) as error:
        _refuse(error)
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
        CheckpointDamagedError,
        OtherProcessError,
        RunDirectoryError,
        FloatingPointError,
        OSError,
        ValueError,
    ) as error:
        if os.environ.get("JAXPLAN_TRACEBACK"):
            raise
        _say(f"error: {error}")
        return 2
    return 0


def dry_run(config: RunConfig, flags: Flags) -> int:
    """Print what each device will hold, and what would help if that is too much."""
    from jaxplan.core.runtime import start_jax
    from jaxplan.io.stopping import StopRequest
    from jaxplan.train.memory import plan_memory
    from jaxplan.train.memory_advice import device_bytes, memory_table, verdict
    from jaxplan.train.memory_compiled import compiled_bytes

    try:
        start_jax(CACHE)
    except (RuntimeError, OSError) as error:
        _refuse(error)
        return 2
    try:
        _, setting = make_setting(config, Path(config.run_root), StopRequest())
        plan = plan_memory(setting)
        compiled = compiled_bytes(setting) if flags.compile else None
    except (ValueError, OSError) as error:
        _refuse(error)
        return 2
    print(memory_table(plan, compiled))
    there = flags.device_memory or device_bytes()
    if there is None:
        return 0
    sentence, fits = verdict(setting, plan, there)
    print(sentence)
    return 0 if fits else 1


def make_setting(config: RunConfig, run_dir: Path, stop):
    """Tokenizer, world and language; sizes that do not fit are refused."""
    from jaxplan.envs.worlds import make_env
    from jaxplan.io.chat import open_tokenizer
    from jaxplan.rollout.setup import check_sizes, longest_turn, make_language
    from jaxplan.train.setting import Setting

    tokenizer = open_tokenizer(config)
    env = make_env(config.env)
    language = make_language(tokenizer, env, config.plan)
    turn_tokens = longest_turn(tokenizer, env, config.plan)
    check_sizes(language, config.rollout, config.plan, turn_tokens)
    setting = Setting(
        config=config,
        run_dir=run_dir,
        env=env,
        language=language,
        vocab_size=tokenizer.vocab_size,
        turn_tokens=turn_tokens,
        stop=stop,
    )
    return tokenizer, setting


def _refuse(reason: object) -> None:
    """Tell, in every process and without JAX, which may be what is wrong."""
    print(f"error: {reason}", file=sys.stderr, flush=True)


def _say(sentence: str) -> None:
    from jaxplan.core.processes import is_first

    if is_first():
        print(sentence, file=sys.stderr, flush=True)


class Run:
    """One run: what all stages share, made once, and the stages."""

    def __init__(self, config: RunConfig, run, stop, compile_seconds) -> None:
        """Make what all stages share; refuse what does not fit or cannot run."""
        import jax

        from jaxplan.models.attention import check_attention, compiled_kernels
        from jaxplan.train.setting import check_mesh

        self.config, self.run, self.compile_seconds = config, run, compile_seconds
        self.tokenizer, self.setting = make_setting(config, run.path, stop)
        check_mesh(self.setting)
        check_attention(config.model, jax.default_backend())
        kernels = compiled_kernels(config.model, config.rollout.segment_tokens)
        _say(
            f"attention: {config.model.attention}, {', '.join(kernels) or 'XLA alone'}"
        )
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
        return self.write_dataset(
            self.run.path / "dataset", self.make_teacher(), self.config.collect.teacher
        )

    def write_dataset(self, folder: Path, teacher, name: str) -> dict:
        """Whatever a teacher plays, as Parquet."""
        from jaxplan.io.datasets import NO_TOKENS
        from jaxplan.io.progress import Progress
        from jaxplan.train.collect import collect, to_json

        config, desk = self.config, teacher.scribe.desk
        token_ids = config.collect.token_ids
        about = {
            "tokenizer": self.tokenizer.sha256 if token_ids else NO_TOKENS,
            "env": config.env.name,
            "text": config.env.text,
            "teacher": name,
            "config": to_json(config),
        }
        stage = "relay" if name == "relay" else "collect"
        with Progress(stage, desk.config.episodes) as progress:
            return collect(
                folder,
                teacher,
                about,
                lambda done, turns: progress.update(done, turns=turns),
                self.setting.stop,
            )

    def make_desk(self, seed: int):
        """Where teachers play, and how it is written down."""
        from jaxplan.envs.worlds import make_env
        from jaxplan.train.scribe import Desk

        config = self.config
        return Desk(
            env=self.setting.env,
            tokenizer=self.tokenizer,
            config=config.collect,
            seed=seed,
            observation_tokens=config.rollout.observation_tokens,
            plan_tokens=config.plan.budget,
            other_texts={
                level: make_env(dataclasses.replace(config.env, text=level))
                for level in config.collect.texts
            },
        )

    def make_teacher(self):
        """Whoever is to be imitated."""
        import jax

        from jaxplan.envs.worlds import make_env, make_expert
        from jaxplan.train.collect import ExpertTeacher

        config = self.config
        desk = self.make_desk(config.seed)
        if config.collect.teacher == "expert":
            return ExpertTeacher(make_expert(config.env, config.expert), desk)
        short = dataclasses.replace(config.env, max_steps=config.collect.steps)
        desk = dataclasses.replace(desk, env=make_env(short))
        if config.collect.teacher == "endpoint":
            from jaxplan.train.endpoint_teacher import EndpointTeacher

            if jax.process_count() > 1:
                raise ValueError(
                    "collect.teacher=endpoint asks its server from one process, and "
                    f"there are {jax.process_count()}: run collect alone first"
                )
            journals = self.run.path / "answers"
            endpoint, stop = config.collect.endpoint, self.setting.stop
            return EndpointTeacher(endpoint, config.plan, desk, journals, stop)
        from jaxplan.train.llama_teacher import LlamaTeacher

        return LlamaTeacher(self.start, self.setting.mesh, config, desk)

    def sft(self) -> dict:
        """The primed agent."""
        from jaxplan.io.datasets import read_dataset
        from jaxplan.train.data import load_segments
        from jaxplan.train.sft_loop import train_sft

        config, relay = self.config, self.config.sft.relay

        def load(folder):
            return load_segments(
                read_dataset(folder, self.tokenizer),
                self.tokenizer,
                self.setting.language,
                config.plan,
                config.rollout,
                config.sft,
                config.seed,
            )

        train, held_out = load(config.sft.dataset or self.run.path / "dataset")
        probe = self.make_probe()
        if relay.episodes:
            train_sft(self.setting, train, held_out, probe, relay.after_updates)
            begun, _ = load(self.relay())
            train += begun
        return train_sft(self.setting, train, held_out, probe)

    def relay(self) -> Path:
        """Episodes that the student begins and the expert ends, as Parquet."""
        from jaxplan.envs.worlds import make_expert
        from jaxplan.train.relay import RelayTeacher, Student
        from jaxplan.train.scribe import RELAY_SEED
        from jaxplan.train.setting import load_player

        config, folder = self.config, self.run.path / "relay"
        student = Student(
            load=lambda: load_player(self.setting, "sft"),
            mesh=self.setting.mesh,
            language=self.setting.language,
            turn_tokens=self.setting.turn_tokens,
        )
        desk = self.make_desk(seed=config.seed + RELAY_SEED)
        desk = dataclasses.replace(
            desk,
            config=dataclasses.replace(
                config.collect, episodes=config.sft.relay.episodes
            ),
        )
        expert = make_expert(config.env, config.expert)
        self.write_dataset(folder, RelayTeacher(expert, desk, student, config), "relay")
        return folder

    def make_probe(self):
        """What lets the student play now and then, or None."""
        from jaxplan.eval.panels import make_probe
        from jaxplan.eval.stage import make_panel

        config = self.config
        if not config.sft.panel_every:
            return None
        guided = ("scripted", "prompted")
        own = [m for m in config.evaluate.modes if not m.startswith(guided)]
        few = dataclasses.replace(
            config.evaluate,
            episodes=config.sft.panel_episodes,
            modes=(*own, "dynamic")[:1],
        )
        panel = make_panel(dataclasses.replace(config, evaluate=few), self.tokenizer)
        return make_probe(panel, self.setting.language)

    def ppo(self) -> dict:
        """The agent after reinforcement learning."""
        from jaxplan.train.ppo_loop import train_ppo

        return train_ppo(self.setting, self.primed())

    def unprimed(self) -> str:
        """Where PPO starts from without SFT: chance or weights; else nothing."""
        config = self.config
        if config.ppo.start == "chance":
            return "chance"
        has_sft = "sft" in config.stages or self.run.is_done("sft")
        if config.model.weights is None or has_sft or config.ppo.start != "sft":
            return ""
        return "weights"

    def primed(self):
        """What PPO starts from: the agent SFT left, here or elsewhere, or none."""
        from jaxplan.io.rundir import check_finished
        from jaxplan.train.setting import load_policy

        if self.unprimed():
            return self.start()
        other, setting = self.config.ppo.start, self.setting
        if other != "sft":
            setting = dataclasses.replace(setting, run_dir=Path(other))
        check_finished(setting.run_dir, "sft")
        return load_policy(setting, "sft")

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
        from jaxplan.io.rundir import check_finished
        from jaxplan.train.setting import load_player

        config, setting = self.config, self.setting
        trained, start = config.stages, self.unprimed() or "sft"
        if config.evaluate.run:
            setting = dataclasses.replace(setting, run_dir=Path(config.evaluate.run))
            trained, start = ("sft", "ppo"), "sft"
        stage_of = {"sft": "sft", f"{start}+rl": "ppo"}
        learnt = {arm: stage for arm, stage in stage_of.items() if stage in trained}
        policies = {}
        if start != "sft":
            policies[start] = lambda: self.start().llama
        for arm, stage in learnt.items():
            if arm in (config.evaluate.arms or learnt):
                check_finished(setting.run_dir, stage)
            policies[arm] = functools.partial(load_player, setting, stage)
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
