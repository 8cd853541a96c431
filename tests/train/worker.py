"""One process of a run, alone or among several: collect, imitate, reinforce.

python -m tests.train.worker RUN_DIR DATA FSDP MODEL EPOCHS
"""

import sys
from pathlib import Path

from jaxplan.config.schema import (
    CollectConfig,
    EnvConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PpoConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
)
from jaxplan.core.processes import agree, start_processes
from jaxplan.io.datasets import read_dataset
from jaxplan.io.progress import Progress
from jaxplan.io.rundir import RunDirectory
from jaxplan.io.stopping import EXIT_CODE, Stopped, StopRequest
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.text.tokenizer import Tokenizer, load_tokenizer
from jaxplan.train.collect import ExpertTeacher, collect
from jaxplan.train.data import load_segments
from jaxplan.train.ppo_loop import train_ppo
from jaxplan.train.scribe import Desk
from jaxplan.train.setting import Setting, check_mesh, load_policy
from jaxplan.train.sft_loop import train_sft
from tests.fakes import Shore
from tests.train.test_collect import Guide


def make_setting(run_dir: Path, shape: tuple[int, ...], epochs: int = 1) -> Setting:
    """A tiny world and model on a mesh."""
    data, fsdp, model = shape
    config = RunConfig(
        name=run_dir.name,
        run_root=str(run_dir.parent),
        mesh=MeshConfig(data=data, fsdp=fsdp, model=model),
        env=EnvConfig(pool_size=4, pool_refresh=2),
        plan=PlanConfig(open="{plan}", close="<end>", budget=4),
        model=ModelConfig(
            width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn_width=24
        ),
        rollout=RolloutConfig(
            num_lanes=16,
            segment_tokens=96,
            rounds=5,
            prefill_tokens=8,
            decode_steps=2,
            history=2,
            observation_tokens=8,
        ),
        collect=CollectConfig(episodes=24, lanes=8, steps=9, plan_every=(2, 3)),
        sft=SftConfig(batch_segments=8, epochs=epochs, validate_every=10**6),
        ppo=PpoConfig(iterations=2, value_warmup_iterations=1, gamma=0.9),
    )
    env, tokenizer = Shore(), load_tokenizer("shipped")
    return Setting(
        config=config,
        run_dir=run_dir,
        env=env,
        language=make_language(tokenizer, env, config.plan),
        vocab_size=tokenizer.vocab_size,
        turn_tokens=longest_turn(tokenizer, env, config.plan),
        stop=StopRequest(),
    )


def collect_turns(setting: Setting, tokenizer: Tokenizer) -> dict:
    """The stage as in scripts/train.py, with a teacher for this world."""
    config = setting.config
    desk = Desk(
        env=setting.env,
        tokenizer=tokenizer,
        config=config.collect,
        seed=config.seed,
        observation_tokens=config.rollout.observation_tokens,
        plan_tokens=config.plan.budget,
    )
    about = {"tokenizer": tokenizer.sha256, "env": "shore", "text": "plain"}
    about |= {"teacher": "guide", "config": "{}"}
    with Progress("collect", config.collect.episodes) as progress:
        return collect(
            setting.run_dir / "dataset",
            ExpertTeacher(Guide(), desk),
            about,
            lambda done, turns: progress.update(done, turns=turns),
            setting.stop,
        )


def run_stages(setting: Setting) -> None:
    """All that trains, as in scripts/train.py."""
    check_mesh(setting)
    config, tokenizer = setting.config, load_tokenizer("shipped")
    with RunDirectory(config.run_root, config) as run:
        if not agree(run.is_done("collect")):
            run.finish("collect", collect_turns(setting, tokenizer))
        table = read_dataset(setting.run_dir / "dataset", tokenizer)
        train, held_out = load_segments(
            table,
            tokenizer,
            setting.language,
            config.plan,
            config.rollout,
            config.sft,
            config.seed,
        )
        run.finish("sft", train_sft(setting, train, held_out))
        run.finish("ppo", train_ppo(setting, load_policy(setting, "sft")))


if __name__ == "__main__":
    start_processes()
    directory, *sizes, epochs = sys.argv[1:]
    setting = make_setting(Path(directory), tuple(map(int, sizes)), int(epochs))
    setting.stop.listen()
    try:
        run_stages(setting)
    except Stopped:
        sys.exit(EXIT_CODE)
