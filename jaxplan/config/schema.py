"""The whole run as one tree: every default stands here, once, beside its unit.

YAML files hold only what differs from this module. Each part of the program is handed
its own section and never the tree.
"""

import math
import re
import typing
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from jaxplan.config.types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    NumberOnly,
    PositiveFloat,
    PositiveInt,
    section,
)

Stage = Literal["collect", "sft", "ppo", "evaluate", "report"]
Estimator = Literal[
    "turn",
    "smdp",
    "token_gae",
    "token_gae_through_obs",
    "bilevel",
    "row_return",
    "grpo",
    "confidence_weighted",
]


def _check_plan_mode(mode: str) -> str:
    if re.fullmatch(r"dynamic|never|every-[1-9][0-9]*", mode) is None:
        raise ValueError(
            f"got '{mode}'; allowed: 'dynamic', 'never' and 'every-K' with a whole "
            "number K >= 1, as in 'every-4'"
        )
    return mode


def _check_panel_mode(mode: str) -> str:
    if re.fullmatch(r"(scripted|prompted)-[1-9][0-9]*", mode):
        return mode
    try:
        return _check_plan_mode(mode)
    except ValueError as error:
        more = "on a panel also 'scripted-K' and 'prompted-K', with the expert's help"
        raise ValueError(f"{error}; {more}") from None


PlanMode = Annotated[str, AfterValidator(_check_plan_mode)]
PanelMode = Annotated[str, AfterValidator(_check_panel_mode)]
TextLevel = Literal["compact", "balrog", "balrog_precise"]


def _check_data_axis(size: int) -> int:
    if size != -1 and size < 1:
        raise ValueError(f"got {size}; allowed: a number >= 1, or -1 for all the rest")
    return size


DataAxis = Annotated[int, NumberOnly, AfterValidator(_check_data_axis)]


def _check_run_name(name: str) -> str:
    if name in (".", "..") or re.fullmatch(r"[A-Za-z0-9._=+@-]+", name) is None:
        raise ValueError(
            f"got '{name}', which is to be one folder in run_root; allowed: letters, "
            "digits and . _ = + @ -"
        )
    return name


RunName = Annotated[str, AfterValidator(_check_run_name)]


@section
class AboutConfig:
    """What a config file is for: read by people, checked by the tests."""

    question: str = ""
    source: str = ""
    run: str = ""
    hardware: str = ""
    hours: NonNegativeFloat = 0.0


@section
class PogsConfig:
    """The graphs of ``pogs``; defaults of gym-pogs, whose time limit is 30 steps."""

    nodes: Annotated[int, Field(ge=2)] = 20  # of the tree
    k_hops: PositiveInt = 3  # how far the player sees
    min_backtracks: NonNegativeInt = 0  # hard mode: of the explorer with a memory


ProbeKind = Literal["constant", "observed", "delayed", "action", "both", "plan"]


@section
class ProbeConfig:
    """The worlds of ``probe``, whose answers are known: see jaxplan/envs/probes.py."""

    kinds: tuple[ProbeKind, ...] = ("plan",)  # an episode's is drawn from them
    delay: PositiveInt = 3  # turns from the choice to the reward of ``delayed``

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("kinds=(): an episode needs a probe to play; name one")


@section
class EnvConfig:
    """The world the agent lives in, and the words it is described with."""

    name: Literal["craftax_classic", "pogs", "probe"] = "craftax_classic"
    text: TextLevel = "compact"
    max_steps: PositiveInt = 1000  # env steps until an episode is truncated
    pool_size: PositiveInt = 256  # ready-made worlds a finished lane may be given
    pool_refresh: NonNegativeInt = 16  # worlds made anew per training iteration
    pogs: PogsConfig = Field(default_factory=PogsConfig)
    probe: ProbeConfig = Field(default_factory=ProbeConfig)


@section
class TextConfig:
    """The tokenizer: ``shipped``, or the path of any Hugging Face tokenizer.json."""

    tokenizer: str = "shipped"


@section
class PlanConfig:
    """The plan grammar: turn := [ open text{1..budget} close ] action."""

    open: str = "<plan>"
    close: str = "</plan>"
    budget: PositiveInt = 32  # plan-text tokens until the grammar closes the plan
    prices: tuple[NonNegativeFloat, ...] = ()  # of a plan token, told to lanes in turn

    def __post_init__(self) -> None:
        if len(set(self.prices)) < len(self.prices):
            raise ValueError(f"prices={list(self.prices)}: name each once")


@section
class RopeScalingConfig:
    """Llama 3's frequency scaling of rotary embeddings (``rope_type: llama3``)."""

    factor: PositiveFloat = 32.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192


LoraTarget = Literal["query", "key", "value", "attention_out", "gate", "up", "down"]


@section
class LoraConfig:
    """Low-rank adapters beside frozen weights (arXiv:2106.09685)."""

    rank: NonNegativeInt = 0  # 0: no adapters, all weights learn
    alpha: PositiveFloat = 64.0  # adapters are scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) instead (arXiv:2312.03732)
    targets: tuple[LoraTarget, ...] = typing.get_args(LoraTarget)  # with an adapter

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"targets={list(self.targets)}: name at least one, each once; "
                "rank=0 turns adapters off"
            )

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@section
class ModelConfig:
    """A Llama: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

    Norms, softmax, log-probabilities, the value head and the optimizer are float32
    whatever the dtypes. The backward pass finds all of the forward pass (``none``), of
    each layer its products with weights (``dots``) or its input (``layer``), and
    computes the rest again.
    """

    weights: str | None = None  # Hugging Face folder to start from, with its own shape
    vocab_size: PositiveInt | None = None  # null: as many as the tokenizer has ids
    width: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 1
    head_dim: PositiveInt = 32
    ffn_width: PositiveInt = 384
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # as matrices are stored
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "layer"] = "layer"  # what is computed twice
    attention: Literal["xla", "cudnn", "tokamax"] = "xla"  # of updates, not of caches
    lora: LoraConfig = Field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}"
            )


@section
class RolloutConfig:
    """How lanes are decoded: rounds of (world step, prefill chunk, decode steps)."""

    num_lanes: PositiveInt = 64
    segment_tokens: PositiveInt = 512  # tokens of one lane in one segment
    rounds: PositiveInt = 24  # act/observe/decode cycles in one segment
    prefill_tokens: PositiveInt = 28  # unread tokens a lane encodes at once in a round
    decode_steps: NonNegativeInt = 4  # tokens decoded in one round after the first
    history: PositiveInt = 4  # turns of observations and actions that stay visible
    observation_tokens: PositiveInt = 40  # room for one observation
    temperature: PositiveFloat = 1.0


@section
class OptimizerConfig:
    """Linear warm-up, cosine decay and clipping by the *global* norm.

    ``adamw`` steps by AdamW. ``muon`` turns the matrices of the layers by
    orthogonalised momentum (arXiv:2502.16982) and the rest by AdamW without decay; its
    steps are as long as those of AdamW, so that one learning rate serves both.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 3e-4
    warmup_updates: NonNegativeInt = 20
    final_fraction: Fraction = 0.1  # learning rate at the end, as a share of the peak
    weight_decay: NonNegativeFloat = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    max_grad_norm: PositiveFloat = 1.0


@section
class ExpertConfig:
    """How good the scripted player is; the defaults are the best it can."""

    errors: Fraction = 0.0  # share of steps in which it does something at random
    dawdling: Fraction = 0.0  # share of steps in which it does nothing
    unknown_goals: tuple[str, ...] = ()  # goals it does not know, such as shelter


@section
class EndpointConfig:
    """A server that speaks OpenAI's protocol, such as vLLM's, as the teacher."""

    url: str = "http://localhost:8000/v1"
    model: str = "default"  # as the server calls it
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    history: PositiveInt = 16  # observations a request repeats, the current one too
    answer_tokens: PositiveInt = 200  # of one answer at most
    temperature: NonNegativeFloat = 1.0
    timeout_seconds: PositiveFloat = 120.0  # of one request
    retries: NonNegativeInt = 5  # of one request, with growing pauses
    budget_tokens: NonNegativeInt = 0  # asked and answered in all; 0: no limit


@section
class CollectConfig:
    """The teacher's trajectories, the data of SFT."""

    teacher: Literal["expert", "llama", "endpoint"] = "expert"
    prompting: Literal["every", "never", "dynamic"] = "every"  # of llama and endpoint
    endpoint: EndpointConfig = Field(default_factory=EndpointConfig)
    episodes: PositiveInt = 256
    lanes: PositiveInt = 64
    steps: PositiveInt = 400  # env steps of one trajectory at most
    plan_every: tuple[PositiveInt, PositiveInt] = (2, 12)  # K ~ U[low, high] turns
    random_phase: bool = False  # the first plan in any of the first K turns, not in 0
    replan_on_change: bool = False  # also say a plan when the goal is another one
    styles: tuple[str, ...] = ()  # drawn for each trajectory; none: the usual one
    action_noise: Fraction = 0.05  # share of steps whose action is random, not learnt
    noise_steps: PositiveInt = 1  # in which a random action is repeated, on average
    sleeping: Fraction = 0.0  # share of the sleeping turns that is written down
    texts: tuple[TextLevel, ...] = ()  # text levels written down besides env.text
    token_ids: bool = True  # write down the token ids of the texts as well

    def __post_init__(self) -> None:
        low, high = self.plan_every
        if low > high:
            raise ValueError(f"plan_every=({low}, {high}): the low end is the larger")


@section
class RelayConfig:
    """Episodes that the student begins and the expert ends, for the rest of SFT.

    Where the student gets to, and no expert would, is where it needs to be told what to
    do (DAgger, arXiv:1011.0686).
    """

    episodes: NonNegativeInt = 0  # 0: the student never plays
    after_updates: PositiveInt = 1000  # of SFT, until it does
    turns: PositiveInt = 200  # that the student plays at most


@section
class SftConfig:
    """Imitation of the collected turns on packed segments."""

    dataset: str = ""  # folder of a dataset; by default what the run collected
    plans: Literal["kept", "stripped", "shuffled"] = "kept"  # of the dataset
    epochs: PositiveInt = 1
    updates: NonNegativeInt = 0  # if any, so many instead of whole epochs
    batch_segments: PositiveInt = 16
    held_out: Fraction = 0.05  # share of episodes kept for validation
    validate_every: PositiveInt = 50  # updates
    checkpoint_every: PositiveInt = 100  # updates
    panel_every: NonNegativeInt = 0  # updates until the student plays; 0: never
    panel_episodes: PositiveInt = 32  # of that panel, in the first of evaluate.modes
    plan_weight: NonNegativeFloat = 1.0  # loss weight of a plan token
    action_weight: NonNegativeFloat = 1.0  # loss weight of an action token
    observation_weight: NonNegativeFloat = 0.0  # of a token of an observation
    kl_coef: NonNegativeFloat = 0.0  # of KL(agent | starting weights) per token
    lora: bool = True  # false: all weights learn here, adapters come with PPO
    measure_kl: bool = False  # on held-out episodes; the starting weights are kept
    relay: RelayConfig = Field(default_factory=RelayConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.relay.episodes and self.relay.after_updates >= self.updates:
            raise ValueError(
                f"relay.after_updates={self.relay.after_updates} is not below "
                f"updates={self.updates}: who relays must say how many updates there "
                "are, and some must be left to learn from the relay"
            )


@section
class RoleCoefficients:
    """One number for each role of a sampled token (docs: ppo.md, section 1)."""

    decide: NonNegativeFloat = 0.0
    plan: NonNegativeFloat = 0.0
    action: NonNegativeFloat = 0.0


@section
class PpoConfig:
    """PPO on turns with a priced plan; symbols as in the PPO formulation."""

    start: str = "sft"  # of this run, or chance, or the directory of a run with an SFT
    mode: PlanMode = "dynamic"  # of the turns it learns from
    iterations: PositiveInt = 40
    num_epochs: PositiveInt = 1
    num_minibatches: PositiveInt = 2
    gamma: Fraction = 0.99  # per env step
    estimator: Estimator = "turn"  # all but turn and smdp are for comparison only
    gae_lambda: Fraction = 0.95  # per turn
    gae_lambda_token: Fraction = 1.0  # inside a turn, of smdp; < 1 punishes length
    plan_cost: NonNegativeFloat = 0.0  # reward lost per plan-text token
    call_cost: NonNegativeFloat = 0.0  # reward lost per plan
    clip_eps: PositiveFloat = 0.2
    clip_eps_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    ratio_level: Literal["token", "turn"] = "token"  # turn: its geometric mean
    off_policy: Literal["bypass", "decoupled"] = "bypass"  # decoupled: stale data
    decide_explore: Fraction = 0.0  # share of decisions to plan made by a fair coin
    format_coef: NonNegativeFloat = 0.0  # of -log(mass on legal tokens)
    advantage_clip: PositiveFloat = 10.0
    role_coef: RoleCoefficients = Field(
        default_factory=lambda: RoleCoefficients(decide=1.0, plan=1.0, action=1.0)
    )
    kl_coef: RoleCoefficients = Field(
        default_factory=lambda: RoleCoefficients(decide=0.05, plan=0.05, action=0.05)
    )
    ent_coef: RoleCoefficients = Field(
        default_factory=lambda: RoleCoefficients(decide=0.01, plan=0.0, action=0.003)
    )
    vf_coef: NonNegativeFloat = 0.5
    value_loss: Literal["huber", "clip"] = "huber"
    vf_clip_eps: PositiveFloat = 0.2  # of value_loss: clip, in units of the targets
    value_scaling: bool = False  # learn values in units of the targets' running std
    value_warmup_iterations: NonNegativeInt = 4  # value-only updates, trunk frozen
    value_trunk_grad: bool = True  # after the warm-up
    value_learning_rate_ratio: PositiveFloat = 10.0  # of the head, to the trunk's
    critic: ModelConfig | None = None  # a Llama of its own; null: the head on the actor
    critic_learning_rate_ratio: PositiveFloat = 1.0  # of that Llama, to the actor's
    checkpoint_every: PositiveInt = 10  # iterations
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-5, warmup_updates=10)
    )


@section
class EvaluateConfig:
    """The panel: every arm and plan mode on the same list of worlds."""

    arms: tuple[str, ...] = ()  # none: random and all the run has trained
    run: str = ""  # directory of the run whose policies play; by default its own
    episodes: PositiveInt = 64  # per arm and mode
    modes: tuple[PanelMode, ...] = ("dynamic", "never", "every-1", "every-4")
    max_steps: PositiveInt = 400
    seed: NonNegativeInt = 10_000  # first world seed of the panel
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95

    def __post_init__(self) -> None:
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes={list(self.modes)}: name at least one, each once")


@section
class SweepConfig:
    """What scripts/sweep.py varies: every value with every other, for every seed."""

    axes: tuple[tuple[str, tuple[float | str, ...]], ...] = ()  # keys, and their values
    seeds: PositiveInt = 3  # seed, seed + 1, ...
    beside: str = ""  # another sweep's result.json, drawn into the same figure


@section
class MeshConfig:
    """How devices share a run: lanes over data and fsdp, weights over fsdp and model.

    Their product is the number of devices; lanes and packed segments of a batch must
    be multiples of data x fsdp.
    """

    data: DataAxis = 1  # -1: as many as there are devices left
    fsdp: PositiveInt = 1  # splits the width of weights
    model: PositiveInt = 1  # splits heads, kv heads, feed-forward and vocabulary


@section
class RunConfig:
    """One run: a list of stages over one world, one model, one run directory."""

    name: RunName = "run"
    about: AboutConfig = Field(default_factory=AboutConfig)
    seed: NonNegativeInt = 0
    run_root: str = "runs"  # the run directory is run_root/name
    stages: tuple[Stage, ...] = ("collect", "sft", "ppo", "evaluate", "report")
    env: EnvConfig = Field(default_factory=EnvConfig)
    expert: ExpertConfig = Field(default_factory=ExpertConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    collect: CollectConfig = Field(default_factory=CollectConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    ppo: PpoConfig = Field(default_factory=PpoConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        lanes, parts = self.rollout.num_lanes, self.ppo.num_minibatches
        if lanes % parts:
            raise ValueError(
                f"rollout.num_lanes={lanes} is not divisible by "
                f"ppo.num_minibatches={parts}"
            )
        prices = self.plan.prices
        if prices and self.ppo.plan_cost:
            raise ValueError(
                f"plan.prices={list(prices)} and ppo.plan_cost={self.ppo.plan_cost} "
                "both price a plan token; leave out one"
            )
        if prices and lanes % len(prices):
            raise ValueError(
                f"rollout.num_lanes={lanes} is not divisible by the "
                f"{len(prices)} plan.prices"
            )
