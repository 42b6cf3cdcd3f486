"""Every option of a recipe, with its meaning: the typed schema. Names are TRL's or verl's where they exist.

Types are strict: a number in quotes is text, true is no number, 10.0 no integer. An option that changes nothing is
refused, by value, because the recipe that a run saves names every option: one at its default counts as not set.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from r1fast.schema_types import (
    Bytes,
    Count,
    Files,
    FolderName,
    LearningRate,
    NonNegative,
    Plain,
    Positive,
    Ref,
    RewardName,
    Seconds,
    Seed,
    StageName,
    Temperature,
    Weight,
    plain,
)

Dtype = Literal["auto", "float32", "bfloat16"]
PromptTemplate = Literal["r1_zero", "chat", "plain", "few_shot", "tokenizer"]
ResponseFormatName = Literal["think_answer", "special_token", "think_summary"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of the options that have not their default value."""
        options = type(self).model_fields
        return [name for name in names if getattr(self, name) != options[name].get_default(call_default_factory=True)]


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

    @model_validator(mode="after")
    def _check(self) -> "VllmOptions":
        in_process = self.server_base_url is None
        others: tuple[str, ...]
        if in_process:
            others, advice = ("server_timeout", "request_timeout", "weight_transfer"), "needs server_base_url: set that"
        else:
            others, advice = ("gpu_memory_utilization", "max_model_length"), "is a setting of the server: start it so"
        for name in self.changed(others):
            raise ValueError(f"{name} {advice}, or drop it")
        if not in_process and not _is_url(str(self.server_base_url)):
            raise ValueError(f"server_base_url is {self.server_base_url!r}; expected http://host:port")
        return self


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return (
            url.scheme in ("http", "https")
            and bool(url.hostname)
            and url.port != 0
            and re.fullmatch("[!-~]+", text) is not None
        )
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

    @model_validator(mode="after")
    def _check(self) -> "RolloutSection":
        if self.engine != "vllm" and self.vllm != VllmOptions():
            raise ValueError(f"vllm has options, but engine is {self.engine!r}: set engine: vllm, or drop them")
        if self.engine == "vllm" and (self.max_num_batched_tokens != 8192 or self.kv_cache_memory_bytes is not None):
            raise ValueError(
                "max_num_batched_tokens and kv_cache_memory_bytes are of engine: r1fast; vLLM's memory is "
                "vllm.gpu_memory_utilization: drop them"
            )
        if self.engine == "vllm" and self.vllm.server_base_url is not None and self.enforce_eager:
            raise ValueError("enforce_eager is a setting of the server: start it so, or drop it")
        if self.engine == "vllm" and self.vllm.server_base_url is None and self.async_steps:
            raise ValueError(
                f"async_steps = {self.async_steps} does not apply to vLLM in process, which takes turns with training: "
                "name a server in vllm.server_base_url, or drop it"
            )
        return self


class RewardWorkers(Strict):
    num_workers: Annotated[int, Field(gt=0, le=1024)] = 1
    timeout_s: Seconds = 30.0
    memory_limit_gb: Annotated[float, Field(gt=0, le=1e6)] | None = (
        None  # of one worker; None: its part of half the machine's
    )


class RewardSpec(Strict):
    """A reward's weight, the domains it applies to (all when empty), and keyword arguments of the function."""

    model_config = ConfigDict(extra="allow")
    function: Ref | None = None  # registry name or dotted path; None: the name of the reward
    weight: Weight = 1.0
    domains: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> "RewardSpec":
        plain(self.model_extra)
        return self


class RewardModelSpec(Strict):
    """A reward model's part in the reward: sigmoid(score) * weight, on the domains named."""

    model: Ref
    prompt_template: PromptTemplate = "chat"  # that it was trained with
    weight: Weight = 1.0
    domains: list[str] = []
    score_on: Literal["summary", "response"] = "response"


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


EvalRewards = dict[RewardName, Annotated[dict[str, Any], AfterValidator(_measured)]]


class StageBase(Strict):
    name: StageName  # of a folder in the run directory
    model: Ref | None = None  # @stage, folder or Hub id; None: the recipe's model.path
    seed: Seed | None = None  # None: the recipe's seed


class EvalOptions(Strict):
    """What is measured before and after a stage, on samples at `eval_temperature`."""

    eval_files: list[Ref] = []
    eval_rewards: Annotated[EvalRewards, Field(min_length=1)] = {"accuracy": {}, "format": {}}
    eval_num_samples: Positive = 4  # k of pass@1 over k samples, and of cons@k
    eval_temperature: Temperature = 1.0
    eval_greedy: bool = True
    eval_limit: Positive | None = None  # rows of eval_files
    eval_before: bool = True  # of stages that train

    @model_validator(mode="after")
    def _check_evaluation(self) -> "EvalOptions":
        others = [name for name in EvalOptions.model_fields if name != "eval_files"]
        for name in self.changed(others) if not self.eval_files else ():
            raise ValueError(f"{name} applies to eval_files, and there are none: name some, or drop it")
        if self.eval_files and self.eval_temperature == 0 and self.eval_num_samples > 1:
            raise ValueError(
                f"eval_num_samples = {self.eval_num_samples} with eval_temperature 0 are {self.eval_num_samples} equal "
                "samples: set eval_num_samples: 1, or raise eval_temperature"
            )
        return self


class GenerateOptions(Strict):
    prompt_template: PromptTemplate = "r1_zero"
    response_format: ResponseFormatName = "think_answer"
    prefill_think: bool = False  # end the prompt with <think>
    max_prompt_length: Positive = 512
    max_completion_length: Positive = 512

    def refuse_lengths(self, why: str) -> None:
        """Raise ValueError if a length of sampling is set in a stage that does not sample."""
        for name in self.changed(("max_prompt_length", "max_completion_length")):
            raise ValueError(f"{name} = {getattr(self, name)} does not apply: {why}; drop it")


class TrainOptions(Strict):
    learning_rate: LearningRate = 1e-6
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: Count = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0  # of learning_rate, at the end of a decaying schedule
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.4  # share of the steps that decay (wsd)
    weight_decay: NonNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    max_grad_norm: Annotated[float, Field(gt=0, le=1e18)] = 1.0
    max_tokens_per_microbatch: Positive = 16384
    # DeepSeek-V3's balance rule. 0 freezes the bias, as V3's last phase does and RL should: a few hundred prompts load
    # experts unevenly for good reasons, and a bias that moves between sampling and update re-routes the same tokens.
    router_bias_update_rate: NonNegative = 0.0
    router_aux_loss_coef: NonNegative = 0.0  # factor of the balance loss within each sequence (V3: 1e-4)
    save_steps: Positive = 100  # the last step is always saved

    def num_updates(self) -> int | None:
        """Optimizer steps of the stage, or the most that they can be; None where only the data tell."""
        return getattr(self, "max_steps", None)

    @model_validator(mode="after")
    def _check_schedule(self) -> "TrainOptions":
        updates, schedule = self.num_updates(), self.lr_scheduler_type
        if updates is not None and self.warmup_steps > updates:
            raise ValueError(f"warmup_steps = {self.warmup_steps} is longer than the stage's {updates} optimizer steps")
        if schedule != "wsd" and self.changed(["decay_ratio"]):
            raise ValueError(f"decay_ratio applies to lr_scheduler_type wsd, got {schedule}: drop it")
        if schedule == "constant" and self.changed(["min_lr_ratio"]):
            raise ValueError("min_lr_ratio applies to a schedule that decays, and constant does not: drop it")
        return self


class FilterOptions(Strict):
    """What keeps a sampled response out of a data set; the first reason that applies is recorded."""

    min_language: Annotated[float, Field(ge=0, le=1)] = 1.0
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.2  # share of repeated 10-grams of words
    max_paragraph_chars: Positive = 2000
    allow_code: bool = False


class SampleOptions(Strict):
    num_prompts: Positive | None = None  # None: every row of train_files
    num_samples: Positive = 4
    temperature: Temperature = 1.0
    max_per_prompt: Positive | None = None  # kept, of the samples that pass
    filters: FilterOptions = FilterOptions()

    @model_validator(mode="after")
    def _check_samples(self) -> "SampleOptions":
        few_shot = getattr(self, "few_shot", None)
        most = max(self.num_samples, few_shot.num_samples if few_shot else 0)
        if self.temperature == 0 and most > 1:
            raise ValueError(f"num_samples = {most} with temperature 0 are {most} equal samples: set it to 1")
        if self.max_per_prompt is not None and self.max_per_prompt > most:
            raise ValueError(f"max_per_prompt = {self.max_per_prompt} is more than num_samples = {most}: drop it")
        return self


class PretrainStage(StageBase, TrainOptions, EvalOptions, GenerateOptions):
    """Next-token training of a model from scratch; trains its tokenizer too unless it takes one."""

    kind: Literal["pretrain"]
    train_files: Files
    architecture: dict[str, Plain]  # model_type and the fields of the Hugging Face configuration
    tokenizer: Ref | None = None  # @stage or a folder; None: train one of vocab_size on train_files
    # Bytes and special tokens are 265; trainers reserve memory for what is asked.
    vocab_size: Annotated[int, Field(ge=265, le=2**20)] = 1024
    batch_size: Positive = 64  # documents per step
    max_steps: Positive
    max_length: Positive = 1024
    mask_prompt: bool = True
    prompt_template: PromptTemplate = "chat"

    @model_validator(mode="after")
    def _check(self) -> "PretrainStage":
        if self.model is not None:
            raise ValueError(
                f"model = {self.model!r} does not apply: pretrain starts from scratch; drop it, or use sft"
            )
        if self.tokenizer is not None and self.changed(["vocab_size"]):
            raise ValueError(f"vocab_size = {self.vocab_size} does not apply: tokenizer is given; drop one of them")
        if self.changed(["eval_before"]):
            raise ValueError("eval_before does not apply: pretrain starts from scratch; drop it")
        if not self.eval_files:
            self.refuse_lengths("without eval_files nothing is sampled")
        return self


class SFTStage(StageBase, TrainOptions, EvalOptions, GenerateOptions):
    """Supervised fine-tuning on prompts and completions, or messages."""

    kind: Literal["sft"]
    train_files: Files
    batch_size: Positive = 128
    num_train_epochs: Positive = 2
    max_steps: Positive | None = None  # stops earlier than num_train_epochs
    max_length: Positive = 32768
    learning_rate: LearningRate = 5e-5
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    prompt_template: PromptTemplate = "chat"

    @model_validator(mode="after")
    def _check_lengths(self) -> "SFTStage":
        if not self.eval_files and getattr(self, "teacher", None) is None:
            self.refuse_lengths("without eval_files nothing is sampled")
        return self


class GRPOStage(StageBase, TrainOptions, EvalOptions, GenerateOptions):
    """Group relative policy optimization on rule rewards and reward models."""

    kind: Literal["grpo"]
    train_files: Files
    rewards: dict[RewardName, Reward] = {"accuracy": 1.0, "format": 1.0}
    reward_models: dict[RewardName, RewardModelSpec] = {}
    domain_weights: dict[str, NonNegative] = {}  # share of a step's prompts by column `domain`; empty: as they come
    num_generations: Annotated[int, Field(ge=2, lt=2**31)] = 8
    prompts_per_step: Positive = 16  # per rollout
    steps_per_generation: Positive = 1  # optimizer steps (minibatches) per rollout
    num_iterations: Positive = 1  # passes over a rollout
    max_steps: Positive = 200  # rollouts
    temperature: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    beta: NonNegative = 0.001
    epsilon: Annotated[float, Field(gt=0, le=1e18)] = 0.2
    epsilon_high: Annotated[float, Field(gt=0, le=1e18)] | None = None
    delta: Annotated[float, Field(gt=1, le=1e18)] | None = None
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    # A completion that max_completion_length cuts is trained on like any other, or its tokens are left out of the loss.
    mask_truncated_completions: bool = False
    partial_rollout_length: Positive | None = None  # tokens a completion gets per step, the next goes on; None: all
    overlong_buffer_length: Positive | None = None  # DAPO: the last tokens of max_completion_length, each costs reward
    overlong_penalty: Annotated[float, Field(gt=0, le=1e18)] = 1.0  # reward that all of them cost
    dynamic_sampling_refills: Count = 0  # DAPO: rounds per step to replace groups of equal reward
    ref_model_sync_steps: Positive | None = None  # optimizer steps between copies of the policy into the reference
    # Truncated importance sampling; auto: 2.0 where the sampler is not exactly the policy (grpo.py), else None.
    sampling_importance_cap: Literal["auto"] | Annotated[float, Field(gt=0, le=1e18)] | None = "auto"
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

    @model_validator(mode="after")
    def _check(self) -> "GRPOStage":
        if not self.rewards and not self.reward_models:
            raise ValueError("rewards and reward_models are both empty; name at least one")
        weights = [reward if isinstance(reward, float) else reward.weight for reward in self.rewards.values()]
        if not any([*weights, *(spec.weight for spec in self.reward_models.values())]):
            raise ValueError("every reward has weight 0, so nothing is learned; give one a weight")
        for name in self.rewards:
            if name in self.reward_models:
                raise ValueError(f"a reward and a reward model are both named {name!r}; rename one")
        if self.domain_weights and not any(self.domain_weights.values()):
            raise ValueError("domain_weights are all 0; give one of them a weight")
        num_samples = self.prompts_per_step * self.num_generations
        if num_samples >= 2**31:
            raise ValueError(f"prompts_per_step * num_generations = {num_samples}; expected less than {2**31}")
        if num_samples % self.steps_per_generation:
            raise ValueError(
                f"prompts_per_step * num_generations = {num_samples} is not a "
                f"multiple of steps_per_generation = {self.steps_per_generation}"
            )
        longest = self.max_prompt_length + self.max_completion_length
        if longest >= self.max_tokens_per_microbatch:
            raise ValueError(
                f"max_prompt_length + max_completion_length = {longest} does not fit into "
                f"max_tokens_per_microbatch = {self.max_tokens_per_microbatch}; raise the latter"
            )
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.delta is not None):
            raise ValueError("loss_type cispo caps the ratio at epsilon_high itself: set it (5.0, say), and no delta")
        if self.loss_type == "cispo" and self.changed(["epsilon"]):
            raise ValueError(f"epsilon = {self.epsilon} does not apply to loss_type cispo, which has no lower bound")
        if self.log_completions == 0 and self.changed(["log_completions_steps"]):
            raise ValueError("log_completions_steps does not apply: log_completions is 0; drop it")
        if self.ref_model_sync_steps and self.beta == 0:
            raise ValueError("ref_model_sync_steps needs beta above 0: without KL there is no reference to copy into")
        if self.skip_zero_variance_groups and self.beta > 0:
            raise ValueError("skip_zero_variance_groups needs beta 0: such groups still have a KL gradient")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> "GRPOStage":
        longest, part = self.max_completion_length, self.partial_rollout_length
        buffer = self.overlong_buffer_length
        if part is not None and (part >= longest or longest % part):
            raise ValueError(
                f"partial_rollout_length = {part} does not cut max_completion_length = {longest} into equal parts; "
                "choose a divisor"
            )
        if part is not None and self.steps_per_generation > self.num_generations:
            raise ValueError(
                f"steps_per_generation = {self.steps_per_generation} is more than num_generations = "
                f"{self.num_generations}: with partial_rollout_length a step may have no more samples than one group"
            )
        if buffer is not None and buffer > longest:
            raise ValueError(f"overlong_buffer_length = {buffer} is more than max_completion_length = {longest}")
        if buffer is not None and "overlong" in (*self.rewards, *self.reward_models):
            raise ValueError("a reward is named overlong, as the one of overlong_buffer_length is; rename it")
        if buffer is None and self.overlong_penalty != 1.0:
            raise ValueError("overlong_penalty needs overlong_buffer_length: without it nothing is punished")
        return self


class FewShotOptions(Strict):
    """Cold-start samples by prompting with worked examples (Problem, Solution, Summary)."""

    model: Ref | None = None  # None: the stage's model
    examples_files: Files  # rows {prompt, reasoning, answer, language}: examples of the prompt's language are shown
    num_examples: Positive = 2
    num_prompts: Positive | None = None
    num_samples: Positive = 4


class CollectStage(StageBase, GenerateOptions, SampleOptions):
    """Cold-start data: readable, correct samples of the zero model, and of few-shot prompts, in the cold-start form."""

    kind: Literal["collect"]
    train_files: Files
    output_format: ResponseFormatName = "special_token"
    few_shot: FewShotOptions | None = None
    limit: Positive | None = None  # rows kept


class RejectStage(StageBase, GenerateOptions, SampleOptions):
    """Rejection sampling: many candidates per prompt, only the correct, complete and readable ones kept."""

    kind: Literal["reject"]
    train_files: Files
    prompt_template: PromptTemplate = "chat"
    response_format: ResponseFormatName = "special_token"


class RewardModelStage(StageBase, TrainOptions, GenerateOptions):
    """A scalar head on the model, trained on preference pairs (pairwise) or labels (pointwise)."""

    kind: Literal["reward_model"]
    train_files: Files
    loss: Literal["pairwise", "pointwise"]
    score_on: Literal["summary", "response"] = "response"
    batch_size: Positive = 256
    num_train_epochs: Positive = 1
    max_length: Positive = 8192
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    center_rewards_coefficient: NonNegative = 0.01  # keeps pairwise scores around 0
    learning_rate: LearningRate = 6e-6
    prompt_template: PromptTemplate = "chat"
    response_format: ResponseFormatName = "special_token"

    @model_validator(mode="after")
    def _check(self) -> "RewardModelStage":
        self.refuse_lengths("a reward model samples nothing")
        if self.prefill_think:
            raise ValueError("prefill_think does not apply: a reward model reads prompts that do not end so; drop it")
        if self.loss == "pointwise" and self.changed(["center_rewards_coefficient"]):
            raise ValueError("center_rewards_coefficient applies to loss pairwise, got pointwise: drop it")
        return self


class DistillStage(SFTStage, SampleOptions):
    """SFT of a student on a teacher's samples: those of train_files, or fresh ones when `teacher` is given."""

    kind: Literal["distill"]  # type: ignore[assignment]
    teacher: Ref | None = None  # then train_files are prompts
    response_format: ResponseFormatName = "special_token"

    @model_validator(mode="after")
    def _samples_need_a_teacher(self) -> "DistillStage":
        for name in self.changed(SampleOptions.model_fields) if self.teacher is None else ():
            raise ValueError(f"{name} applies to a teacher's samples: name a teacher, or drop it")
        longest, room = self.max_prompt_length + self.max_completion_length, self.max_length
        if self.teacher is not None and longest > min(room, self.max_tokens_per_microbatch):
            raise ValueError(
                f"max_prompt_length + max_completion_length = {longest} does not fit into max_length = {room} and "
                f"max_tokens_per_microbatch = {self.max_tokens_per_microbatch}: a sample might not be learned from"
            )
        return self


class EvaluateStage(StageBase, EvalOptions, GenerateOptions):
    """pass@1 over k samples with a confidence interval, cons@k, greedy, and the means of eval_rewards."""

    kind: Literal["evaluate"]
    eval_files: Files

    @model_validator(mode="after")
    def _check(self) -> "EvaluateStage":
        if self.changed(["eval_before"]):
            raise ValueError("eval_before does not apply: an evaluation changes nothing; drop it")
        return self


Stage = Annotated[
    Annotated[PretrainStage, Tag("pretrain")]
    | Annotated[SFTStage, Tag("sft")]
    | Annotated[GRPOStage, Tag("grpo")]
    | Annotated[CollectStage, Tag("collect")]
    | Annotated[RejectStage, Tag("reject")]
    | Annotated[RewardModelStage, Tag("reward_model")]
    | Annotated[DistillStage, Tag("distill")]
    | Annotated[EvaluateStage, Tag("evaluate")],
    Discriminator("kind"),
]
KINDS: dict[str, type[StageBase]] = {get_args(arg)[1].tag: get_args(arg)[0] for arg in get_args(get_args(Stage)[0])}


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
    def _unique(cls, stages: list[Any]) -> list[Any]:
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

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.rollout.async_steps and not any(isinstance(stage, GRPOStage) for stage in self.stages):
            raise ValueError("rollout.async_steps applies to stages of kind grpo, and there are none: drop it")
        return self

    def stage(self, name: str) -> Any:
        return next(stage for stage in self.stages if stage.name == name)
