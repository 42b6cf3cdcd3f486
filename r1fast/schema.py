"""Every option of a recipe, with its meaning: the typed schema. Names are TRL's or verl's where they exist.

Types are strict: a number in quotes is text, true is no number, 10.0 no integer. An option that changes nothing is
refused, by value, because the recipe that a run saves names every option: one at its default counts as not set.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    field_validator,
    model_validator,
)  # fmt: skip

from r1fast import loss_fields
from r1fast.schema_types import (
    AboveZero,
    Bytes,
    Count,
    Files,
    FolderName,
    LearningRate,
    Made,
    ModelRef,
    NonNegative,
    Plain,
    Positive,
    Prompts,
    Reads,
    Ref,
    RewardModelRef,
    RewardName,
    RowKind,
    Seconds,
    Seed,
    SFTRows,
    Share,
    StageName,
    Temperature,
    Weight,
)  # fmt: skip

Dtype = Literal["auto", "float32", "bfloat16"]
PromptTemplate = Literal["r1_zero", "chat", "plain", "few_shot", "tokenizer"]
ResponseFormatName = Literal["think_answer", "special_token", "think_summary"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]
ScoredPart = Literal["summary", "response"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of the options that have not their default value."""
        options = type(self).model_fields
        return [name for name in names if getattr(self, name) != options[name].get_default(call_default_factory=True)]

    def problems(self) -> Iterator[str]:
        """What is wrong with options beside each other; a class adds its own to those of its bases."""
        return iter(())

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self.problems():
            raise ValueError(problem)
        return self


class ModelSection(Strict):
    """The model that a stage starts from when it names none."""

    path: Ref | None = None  # a folder, a Hub id, or @stage
    dtype: Dtype = "auto"  # of the forward pass; auto: bfloat16 on a GPU, float32 on a CPU. Master weights are float32.


class TrainerSection(Strict):
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradient reduction over ranks
    activation_checkpointing: bool = False
    compile: bool = False


class KernelsSection(Strict):
    impl: Literal["reference"] | None = None  # None: the best that an op has on this device


class VllmOptions(Strict):
    """Generation by vLLM: in every training process, or by a running server (docs/rollout.md)."""

    server_base_url: Ref | None = None  # of a server; None: in every training process
    server_timeout: Seconds = 240.0  # how long a request to the server is tried again after it got no answer
    request_timeout: Seconds = 600.0  # for one answer of the server: n samples of one prompt, waiting included
    # To the server. folder: through the run directory, which it must see under the same path. nccl: two CUDA devices.
    weight_transfer: Literal["folder", "nccl"] = "folder"
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3  # in process: vLLM's share of the device's memory
    max_model_length: Positive | None = None  # in process; None: the model's max_position_embeddings

    def problems(self) -> Iterator[str]:
        url = self.server_base_url
        if url is None:
            others, advice = ["server_timeout", "request_timeout", "weight_transfer"], "needs server_base_url: set that"
        else:
            others, advice = ["gpu_memory_utilization", "max_model_length"], "is a setting of the server: start it so"
        for name in self.changed(others):
            yield f"{name} {advice}, or drop it"
        if url is not None and not _is_url(url):
            yield f"server_base_url is {url!r}; expected http://host:port"


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        return is_address and re.fullmatch("[!-~]+", text) is not None
    except ValueError:  # a port that is no number
        return False


class RolloutSection(Strict):
    engine: Literal["r1fast", "vllm"] = "r1fast"
    max_num_seqs: Positive = 512  # samples that are decoded at the same time
    # Of engine r1fast: prompt tokens of one prefill, and the most that keys and values may take (bytes; default: what
    # max_num_seqs samples need). With less, fewer samples are decoded at a time; one that does not fit is an error.
    max_num_batched_tokens: Positive = 8192
    kv_cache_memory_bytes: Bytes | None = None
    enforce_eager: bool = False  # decode without CUDA graphs
    # 1: GRPO samples a step ahead, while it updates, from a copy of the weights (a whole model more on every rank).
    async_steps: Annotated[int, Field(ge=0, le=1)] = 0
    vllm: VllmOptions = VllmOptions()

    def problems(self) -> Iterator[str]:
        if self.engine != "vllm":
            if self.changed(["vllm"]):
                yield f"vllm has options, but engine is {self.engine!r}: set engine: vllm, or drop them"
            return
        if self.changed(["max_num_batched_tokens", "kv_cache_memory_bytes"]):
            yield (
                "max_num_batched_tokens and kv_cache_memory_bytes are of engine: r1fast; vLLM's memory is "
                "vllm.gpu_memory_utilization: drop them"
            )
        if self.vllm.server_base_url is not None and self.enforce_eager:
            yield "enforce_eager is a setting of the server: start it so, or drop it"
        if self.vllm.server_base_url is None and self.async_steps:
            yield (
                f"async_steps = {self.async_steps} does not apply to vLLM in process, which takes turns with training: "
                "name a server in vllm.server_base_url, or drop it"
            )


class RewardWorkers(Strict):
    num_workers: Annotated[int, Field(gt=0, le=1024)] = 1
    timeout_s: Seconds = 30.0
    memory_limit_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None  # of one; None: its part of half the machine's


class WeightedSpec(Strict):
    weight: Weight = 1.0
    domains: list[str] = []  # that it applies to; all when empty

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        return not self.domains or row.get("domain") in self.domains


class RewardSpec(WeightedSpec):
    """What a rule pays; other keys are keyword arguments of the function."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain] = Field(init=False)
    function: Ref | None = None  # registry name or dotted path; None: the name of the reward


class RewardModelSpec(WeightedSpec):
    """A reward model's part in the reward: sigmoid(score) * weight."""

    model: RewardModelRef
    prompt_template: PromptTemplate = "chat"  # that it was trained with
    score_on: ScoredPart = "response"


def _reward_kind(value: Any) -> str:
    return "options" if isinstance(value, (dict, RewardSpec)) else "number"


# A weight alone, or options; the tags are never shown.
Reward = Annotated[
    Annotated[Weight, Tag("number")] | Annotated[RewardSpec, Tag("options")], Discriminator(_reward_kind)
]


def _measured(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a reward that is measured and not learned from."""
    if "weight" in options:
        raise ValueError("weight does not apply to a reward that is only measured; drop it")
    RewardSpec.model_validate(options)
    return options


Rewards = Annotated[dict[RewardName, Reward], Reads("code")]
EvalRewards = Annotated[
    dict[RewardName, Annotated[dict[str, Any], AfterValidator(_measured)]], Field(min_length=1), Reads("code")
]


def reward_specs(rewards: Mapping[str, float | RewardSpec | dict[str, Any]]) -> dict[str, RewardSpec]:
    """Rewards as a recipe may write them, each with all options and the name of its function."""
    specs = {}
    for name, value in rewards.items():
        spec = RewardSpec(weight=value) if isinstance(value, (int, float)) else RewardSpec.model_validate(value)
        specs[name] = spec.model_copy(update={"function": spec.function or name})
    return specs


class StageBase(Strict):
    makes: ClassVar[tuple[Made, ...]] = ()  # what other stages may name of it, as @name
    name: StageName  # of a folder in the run directory
    kind: str
    model: ModelRef | None = None  # @stage, folder or Hub id; None: the recipe's model.path
    seed: Seed | None = None  # None: the recipe's seed


class GenerateOptions(StageBase):
    prompt_template: PromptTemplate = "r1_zero"
    response_format: ResponseFormatName = "think_answer"
    prefill_think: bool = False  # end the prompt with <think>
    max_prompt_length: Positive = 512
    max_completion_length: Positive = 512

    def unused_lengths(self, why: str) -> Iterator[str]:
        """Lengths of sampling that are set in a stage that does not sample."""
        for name in self.changed(("max_prompt_length", "max_completion_length")):
            yield f"{name} = {getattr(self, name)} does not apply: {why}; drop it"


class EvalOptions(GenerateOptions):
    """What is measured before and after a stage, on samples at `eval_temperature`."""

    eval_files: list[Prompts] = []
    eval_rewards: EvalRewards = {"accuracy": {}, "format": {}}
    eval_num_samples: Positive = 4  # k of pass@1 over k samples, and of cons@k
    eval_temperature: Temperature = 1.0
    eval_greedy: bool = True
    eval_limit: Positive | None = None  # rows of eval_files
    eval_before: bool = True  # of stages that train

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        others = [name for name in EvalOptions.model_fields if name.startswith("eval_") and name != "eval_files"]
        for name in self.changed(others) if not self.eval_files else ():
            yield f"{name} applies to eval_files, and there are none: name some, or drop it"
        if self.eval_files and self.eval_temperature == 0 and self.eval_num_samples > 1:
            yield (
                f"eval_num_samples = {self.eval_num_samples} with eval_temperature 0 are {self.eval_num_samples} equal "
                "samples: set eval_num_samples: 1, or raise eval_temperature"
            )


class TrainOptions(StageBase):
    learning_rate: LearningRate = 1e-6
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr_scheduler_type: Schedule = "constant"
    warmup_steps: Count = 0
    min_lr_ratio: Share = 0.0  # of learning_rate, at the end of a decaying schedule
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.4  # share of the steps that decay (wsd)
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    max_grad_norm: AboveZero = 1.0
    max_tokens_per_microbatch: Positive = 16384
    # DeepSeek-V3's balance rule. 0 freezes the bias, as V3's last phase does and RL should: a few hundred prompts load
    # experts unevenly for good reasons, and a bias that moves between sampling and update re-routes the same tokens.
    router_bias_update_rate: NonNegative = 0.0
    router_aux_loss_coef: NonNegative = 0.0  # factor of the balance loss within each sequence (V3: 1e-4)
    save_steps: Positive = 100  # the last step is always saved

    def num_updates(self) -> int | None:
        """Optimizer steps of the stage, or the most that they can be; None where only the data tell."""
        return getattr(self, "max_steps", None)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        updates, schedule = self.num_updates(), self.lr_scheduler_type
        if updates is not None and self.warmup_steps > updates:
            yield f"warmup_steps = {self.warmup_steps} is longer than the stage's {updates} optimizer steps"
        if schedule != "wsd" and self.changed(["decay_ratio"]):
            yield f"decay_ratio applies to lr_scheduler_type wsd, got {schedule}: drop it"
        if schedule == "constant" and self.changed(["min_lr_ratio"]):
            yield "min_lr_ratio applies to a schedule that decays, and constant does not: drop it"


class FitOptions(TrainOptions):
    """Of stages that learn from the rows of files."""

    batch_size: Positive  # rows per step
    max_length: Positive


class EpochOptions(FitOptions):
    """Of those that take every row as often."""

    num_train_epochs: Positive

    def updates_on(self, num_rows: int) -> int:
        """Optimizer steps on so many rows."""
        steps = self.num_train_epochs * -(-num_rows // self.batch_size)
        return min(steps, self.num_updates() or steps)


class FilterOptions(Strict):
    """What keeps a sampled response out of a data set; the first reason that applies is recorded."""

    min_language: Share = 1.0
    max_repetition: Share = 0.2  # share of repeated 10-grams of words
    max_paragraph_chars: Positive = 2000
    allow_code: bool = False


class SampleOptions(GenerateOptions):
    """Sampling by a model as it is; what passes the filters is kept."""

    num_prompts: Positive | None = None  # None: every row of train_files
    num_samples: Positive = 4
    temperature: Temperature = 1.0
    rewards: Rewards = {"accuracy": 1.0}  # of which a sample needs min_reward in all, where any applies
    min_reward: Weight = 1.0
    max_per_prompt: Positive | None = None  # kept, of the samples that pass
    filters: FilterOptions = FilterOptions()

    def most_samples(self) -> int:
        """Of a prompt."""
        return self.num_samples

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not any(spec.weight for spec in reward_specs(self.rewards).values()):
            yield "rewards: none has a weight, so no sample is judged; give one a weight"
        most = self.most_samples()
        if self.temperature == 0 and most > 1:
            yield f"num_samples = {most} with temperature 0 are {most} equal samples: set it to 1"
        if self.max_per_prompt is not None and self.max_per_prompt > most:
            yield f"max_per_prompt = {self.max_per_prompt} is more than num_samples = {most}: drop it"


if TYPE_CHECKING:  # what is made from a table is read through `loss`, which is typed
    from r1fast_kernels.loss_options import LossOptions as Loss

    LossFields = StageBase
else:
    LossFields = create_model("LossFields", __base__=StageBase, **loss_fields.fields())


class LossOptions(LossFields):
    """The policy's loss: beside the options here those of r1fast_kernels/loss_options.py, under their names there."""

    loss_aggregation: Literal["sample", "token", "constant"] | None = None  # of a loss of one's own; None: sample
    old_logprobs: Literal["policy", "sampler"] = "policy"  # sampler: what it gave, without a forward pass for them
    ref_model: ModelRef | None = None  # the reference, where it is not the model that the stage starts from
    lm_head_fp32: bool = False  # the head's product in float32, where the model is in another dtype (MiniMax-M1)

    @property
    def loss(self) -> "Loss":
        """As the op takes them; is_cap is None where the recipe says auto."""
        given = {option.name: getattr(self, option.key) for option in loss_fields.OPTIONS}
        if self.is_own_loss:
            given["loss_type"] = loss_fields.LOSS_TYPES[0]
        return loss_fields.LossOptions(**given | {"is_cap": None if given["is_cap"] == "auto" else given["is_cap"]})

    @property
    def has_automatic_cap(self) -> bool:
        return getattr(self, "sampling_importance_cap") == "auto"  # noqa: B009

    @property
    def loss_name(self) -> str:
        return getattr(self, "loss_type")  # noqa: B009  # mypy does not see it

    @property
    def is_own_loss(self) -> bool:
        return self.loss_name not in loss_fields.LOSS_TYPES

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        changed = self.changed(type(self).model_fields)
        loss, weights = self.loss, [name for name in changed if name.startswith("sampling_importance_")]
        if self.loss_name == "cispo" and loss.epsilon_high is None:
            yield "loss_type cispo caps the ratio at epsilon_high itself: set it (5.0, say)"
        yield from loss_fields.unused(self.loss_name, {name: getattr(self, name) for name in changed})
        if self.loss_aggregation is not None and not self.is_own_loss:
            yield f"loss_aggregation is of a loss of one's own; {self.loss_name} has its own mean: drop it"
        if loss.beta == 0 and "kl_estimator" in changed:
            yield "kl_estimator needs beta above 0: without it there is no KL in the loss"
        if loss.beta == 0 and self.ref_model is not None and not self.is_own_loss:
            yield "ref_model needs beta above 0, or a loss of one's own that reads ref_logprobs_T"
        if "sampling_importance_mode" in weights and loss.is_cap is None and loss.is_min is None:
            yield "sampling_importance_mode needs bounds: set sampling_importance_cap (3.0, say), or _min"
        if self.old_logprobs == "sampler" and weights and weights != ["sampling_importance_cap"]:
            yield f"{weights[0]} does not apply: with old_logprobs: sampler every such weight is 1; drop it"


class PretrainStage(FitOptions, EvalOptions):
    """Next-token training of a model from scratch; trains its tokenizer too unless it takes one."""

    makes = ("model",)
    kind: Literal["pretrain"]
    train_files: Files[SFTRows]
    architecture: dict[str, Plain]  # model_type and the fields of the Hugging Face configuration
    tokenizer: ModelRef | None = None  # @stage or a folder; None: train one of vocab_size on train_files
    # Bytes and special tokens are 265; trainers reserve memory for what is asked.
    vocab_size: Annotated[int, Field(ge=265, le=2**20)] = 1024
    batch_size: Positive = 64
    max_steps: Positive
    max_length: Positive = 1024
    mask_prompt: bool = True
    prompt_template: PromptTemplate = "chat"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.model is not None:
            yield f"model = {self.model!r} does not apply: pretrain starts from scratch; drop it, or use sft"
        if self.tokenizer is not None and self.changed(["vocab_size"]):
            yield f"vocab_size = {self.vocab_size} does not apply: tokenizer is given; drop one of them"
        if self.changed(["eval_before"]):
            yield "eval_before does not apply: pretrain starts from scratch; drop it"
        if not self.eval_files:
            yield from self.unused_lengths("without eval_files nothing is sampled")


class SFTStage(EpochOptions, EvalOptions):
    """Supervised fine-tuning on prompts and completions, or messages."""

    makes = ("model",)
    kind: Literal["sft"]
    train_files: Files[SFTRows]
    batch_size: Positive = 128
    num_train_epochs: Positive = 2
    max_steps: Positive | None = None  # stops earlier than num_train_epochs
    max_length: Positive = 32768
    learning_rate: LearningRate = 5e-5
    lr_scheduler_type: Schedule = "cosine"
    min_lr_ratio: Share = 0.1
    prompt_template: PromptTemplate = "chat"

    def samples(self) -> bool:
        return bool(self.eval_files)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.samples():
            yield from self.unused_lengths("without eval_files nothing is sampled")


class GRPOStage(LossOptions, TrainOptions, EvalOptions):
    """Group relative policy optimization on rule rewards and reward models."""

    makes = ("model",)
    kind: Literal["grpo"]
    train_files: Files[Prompts]
    rewards: Rewards = {"accuracy": 1.0, "format": 1.0}
    reward_models: dict[RewardName, RewardModelSpec] = {}
    domain_weights: dict[str, NonNegative] = {}  # share of a step's prompts by column `domain`; empty: as they come
    num_generations: Annotated[int, Field(ge=2, lt=2**31)] = 8
    prompts_per_step: Positive = 16  # per rollout
    steps_per_generation: Positive = 1  # optimizer steps (minibatches) per rollout
    num_iterations: Positive = 1  # passes over a rollout
    max_steps: Positive = 200  # rollouts
    temperature: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    # A completion that max_completion_length cuts is trained on like any other, or its tokens are left out of the loss.
    mask_truncated_completions: bool = False
    partial_rollout_length: Positive | None = None  # tokens a completion gets per step, the next goes on; None: all
    overlong_buffer_length: Positive | None = None  # DAPO: the last tokens of max_completion_length, each costs reward
    overlong_penalty: AboveZero = 1.0  # reward that all of them cost
    dynamic_sampling_refills: Count = 0  # DAPO: rounds per step to replace groups of equal reward
    ref_model_sync_steps: Positive | None = None  # optimizer steps between copies of the policy into the reference
    router_replay: bool = False  # the update takes the experts that the sampler took (mixture of experts)
    skip_zero_variance_groups: bool = False  # leave them out of the update; exact where beta is 0
    log_completions: Count = 16  # rows of samples/*.parquet per logged step
    log_completions_steps: Positive = 10

    def num_updates(self) -> int:
        return self.max_steps * self.steps_per_generation * self.num_iterations

    @model_validator(mode="before")
    @classmethod
    def _samples_from_the_policy(cls, raw: Any) -> Any:
        for name in ("top_p", "top_k", "min_p", "min_tokens", "repetition_penalty"):
            if isinstance(raw, dict) and name in raw:
                raise ValueError(
                    f"{name} = {raw[name]!r} does not apply: what is trained on is sampled from the policy's whole "
                    "distribution, because any other would bias the importance ratio; drop it"
                )
        return raw

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self._reward_problems()
        yield from self._length_problems()
        num_samples = self.prompts_per_step * self.num_generations
        if num_samples >= 2**31:
            yield f"prompts_per_step * num_generations = {num_samples}; expected less than {2**31}"
        if num_samples % self.steps_per_generation:
            yield (
                f"prompts_per_step * num_generations = {num_samples} is not a "
                f"multiple of steps_per_generation = {self.steps_per_generation}"
            )
        if self.log_completions == 0 and self.changed(["log_completions_steps"]):
            yield "log_completions_steps does not apply: log_completions is 0; drop it"
        if self.ref_model_sync_steps and self.loss.beta == 0:
            yield "ref_model_sync_steps needs beta above 0: without KL there is no reference to copy into"
        if self.skip_zero_variance_groups and (self.loss.beta > 0 or self.loss.entropy_coef or self.is_own_loss):
            yield "skip_zero_variance_groups needs beta 0, entropy_coef 0 and a built-in loss: else such groups learn"

    def _reward_problems(self) -> Iterator[str]:
        specs: list[WeightedSpec] = [*reward_specs(self.rewards).values(), *self.reward_models.values()]
        if not specs:
            yield "rewards and reward_models are both empty; name at least one"
        if not any(spec.weight for spec in specs):
            yield "every reward has weight 0, so nothing is learned; give one a weight"
        for name in self.rewards.keys() & self.reward_models.keys():
            yield f"a reward and a reward model are both named {name!r}; rename one"
        if self.domain_weights and not any(self.domain_weights.values()):
            yield "domain_weights are all 0; give one of them a weight"
        if self.overlong_buffer_length is not None and "overlong" in (*self.rewards, *self.reward_models):
            yield "a reward is named overlong, as the one of overlong_buffer_length is; rename it"
        if self.overlong_buffer_length is None and self.changed(["overlong_penalty"]):
            yield "overlong_penalty needs overlong_buffer_length: without it nothing is punished"

    def _length_problems(self) -> Iterator[str]:
        longest, part = self.max_completion_length, self.partial_rollout_length
        if self.max_prompt_length + longest >= self.max_tokens_per_microbatch:
            yield (
                f"max_prompt_length + max_completion_length = {self.max_prompt_length + longest} does not fit into "
                f"max_tokens_per_microbatch = {self.max_tokens_per_microbatch}; raise the latter"
            )
        if part is not None and (part >= longest or longest % part):
            yield (
                f"partial_rollout_length = {part} does not cut max_completion_length = {longest} into equal parts; "
                "choose a divisor"
            )
        if part is not None and self.steps_per_generation > self.num_generations:
            yield (
                f"steps_per_generation = {self.steps_per_generation} is more than num_generations = "
                f"{self.num_generations}: with partial_rollout_length a step may have no more samples than one group"
            )
        if self.overlong_buffer_length is not None and self.overlong_buffer_length > longest:
            yield (
                f"overlong_buffer_length = {self.overlong_buffer_length} is more than max_completion_length = {longest}"
            )


class FewShotOptions(Strict):
    """Cold-start samples by prompting with worked examples (Problem, Solution, Summary)."""

    model: ModelRef | None = None  # None: the stage's model
    examples_files: Files[Prompts]  # {prompt, reasoning, answer, language}; shown are those in the prompt's language
    num_examples: Positive = 2
    num_prompts: Positive | None = None
    num_samples: Positive = 4


class CollectStage(SampleOptions):
    """Cold-start data: readable, correct samples of the zero model, and of few-shot prompts, in the cold-start form."""

    makes = ("data",)
    kind: Literal["collect"]
    train_files: Files[Prompts]
    output_format: ResponseFormatName = "special_token"
    few_shot: FewShotOptions | None = None
    limit: Positive | None = None  # rows kept

    def most_samples(self) -> int:
        return max(self.num_samples, self.few_shot.num_samples if self.few_shot else 0)


class RejectStage(SampleOptions):
    """Rejection sampling: many candidates per prompt, only the correct, complete and readable ones kept."""

    makes = ("data",)
    kind: Literal["reject"]
    train_files: Files[Prompts]
    prompt_template: PromptTemplate = "chat"
    response_format: ResponseFormatName = "special_token"


def _preference_rows(stage: "RewardModelStage") -> RowKind:
    return "pairs" if stage.loss == "pairwise" else "labels"


class RewardModelStage(EpochOptions, GenerateOptions):
    """A scalar head on the model, trained on preference pairs (pairwise) or labels (pointwise)."""

    makes = ("reward model",)
    kind: Literal["reward_model"]
    train_files: Files[Annotated[Ref, Reads("data", _preference_rows)]]
    loss: Literal["pairwise", "pointwise"]
    score_on: ScoredPart = "response"
    batch_size: Positive = 256
    num_train_epochs: Positive = 1
    max_length: Positive = 8192
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    center_rewards_coefficient: NonNegative = 0.01  # keeps pairwise scores around 0
    learning_rate: LearningRate = 6e-6
    prompt_template: PromptTemplate = "chat"
    response_format: ResponseFormatName = "special_token"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.unused_lengths("a reward model samples nothing")
        if self.prefill_think:
            yield "prefill_think does not apply: a reward model reads prompts that do not end so; drop it"
        if self.loss == "pointwise" and self.changed(["center_rewards_coefficient"]):
            yield "center_rewards_coefficient applies to loss pairwise, got pointwise: drop it"


def _lesson_rows(stage: "DistillStage") -> RowKind:
    return "sft" if stage.teacher is None else "prompts"


class DistillStage(SFTStage, SampleOptions):
    """SFT of a student on a teacher's samples: those of train_files, or fresh ones when `teacher` is given."""

    kind: Literal["distill"]  # type: ignore[assignment]
    train_files: Files[Annotated[Ref, Reads("data", _lesson_rows)]]
    teacher: ModelRef | None = None  # then train_files are prompts
    response_format: ResponseFormatName = "special_token"

    @property
    def makes(self) -> tuple[Made, ...]:  # type: ignore[override]
        return ("model",) if self.teacher is None else ("model", "data")

    def samples(self) -> bool:
        return self.teacher is not None or super().samples()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name in self.changed(SampleOptions.__annotations__) if self.teacher is None else ():
            yield f"{name} applies to a teacher's samples: name a teacher, or drop it"
        longest, room = self.max_prompt_length + self.max_completion_length, self.max_length
        if self.teacher is not None and longest > min(room, self.max_tokens_per_microbatch):
            yield (
                f"max_prompt_length + max_completion_length = {longest} does not fit into max_length = {room} and "
                f"max_tokens_per_microbatch = {self.max_tokens_per_microbatch}: a sample might not be learned from"
            )


class EvaluateStage(EvalOptions):
    """pass@1 over k samples with a confidence interval, cons@k, greedy, and the means of eval_rewards."""

    kind: Literal["evaluate"]
    eval_files: Files[Prompts]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.changed(["eval_before"]):
            yield "eval_before does not apply: an evaluation changes nothing; drop it"


Stage = Annotated[
    PretrainStage | SFTStage | GRPOStage | CollectStage | RejectStage | RewardModelStage | DistillStage | EvaluateStage,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[StageBase]] = {
    get_args(stage.model_fields["kind"].annotation)[0]: stage for stage in get_args(get_args(Stage)[0])
}


class Recipe(Strict):
    name: FolderName = "recipe"  # of the folder under runs/
    seed: Seed = 0
    model: ModelSection = ModelSection()
    trainer: TrainerSection = TrainerSection()
    kernels: KernelsSection = KernelsSection()
    rollout: RolloutSection = RolloutSection()
    reward_workers: RewardWorkers = RewardWorkers()
    report_to: list[Literal["wandb", "trackio", "tensorboard"]] = []
    stages: list[Stage]

    @field_validator("stages")
    @classmethod
    def _unique(cls, stages: list[StageBase]) -> list[StageBase]:
        # Some file systems take upper and lower case for the same.
        for name, count in Counter(stage.name.lower() for stage in stages).items():
            if count > 1:
                raise ValueError(f"two stages are named {name!r}; names must differ in more than upper and lower case")
        if not stages:
            raise ValueError("no stages; name at least one")
        return stages

    @field_validator("report_to")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError(f"names a tracker twice: {', '.join(names)}")
        return names

    def problems(self) -> Iterator[str]:
        if self.rollout.async_steps and not any(isinstance(stage, GRPOStage) for stage in self.stages):
            yield "rollout.async_steps applies to stages of kind grpo, and there are none: drop it"

    def stage(self, name: str) -> StageBase:
        return next(stage for stage in self.stages if stage.name == name)
