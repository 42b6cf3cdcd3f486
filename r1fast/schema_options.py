"""What stages of a recipe have in common: the sections beside them, rewards, and groups of options.

Types are strict: a number in quotes is text, true is no number, 10.0 no integer. An option that changes nothing is
refused, by value, because the recipe that a run saves names every option: one at its default counts as not set.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    model_validator,
)

from r1fast import loss_fields

from r1fast.schema_types import (  # isort: skip
    AboveZero, Bytes, Count, Files, LearningRate, Listed, Made, ModelRef, NonNegative, Plain, Positive, Prompts,
    Reads, Ref, RewardModelRef, RewardName, Seconds, Seed, Share, StageName, Temperature, TopP, Weight,
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

    path: Ref | None = None  # a folder, a .gguf file, package:NAME/PATH, a Hub id (or id@revision), or @stage
    revision: Ref | None = None  # commit, branch or tag of the Hub id; None: main
    dtype: Dtype = "auto"  # of the forward pass; auto: bfloat16 on a GPU, float32 on a CPU. Master weights are float32.

    @property
    def ref(self) -> str | None:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def problems(self) -> Iterator[str]:
        if self.revision is not None and (self.path is None or "@" in self.path):
            yield f"revision is that of a Hub id, but path is {self.path!r}: name a Hub id, or drop it"


def _checkpointing(value: Any) -> Any:
    """Older recipes, such as those that runs have saved, say true or false."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class TrainerSection(Strict):
    """How every stage trains."""

    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradient reduction over ranks
    # Of activations for the backward pass, full keeps the input of each layer and computes the rest again, selective
    # keeps what products and attention gave too (docs/architecture.md, section 5).
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], BeforeValidator(_checkpointing)] = "none"
    # Kept in host memory while a GPU needs them not: the optimizer's state but for a step, the reference model but for
    # its log-probs.
    offload: Listed[Literal["optimizer", "reference"]] = []
    compile: bool = False  # torch.compile of the layers
    # On a GPU a step adds in one order, and has the same bits every time. false: in any order, and the backward pass of
    # attention is up to 1.6 times as fast (docs/numerics.md, section 3).
    deterministic: bool = True

    def problems(self) -> Iterator[str]:
        if len(set(self.offload)) < len(self.offload):
            yield f"offload names something twice: {', '.join(self.offload)}"


class TrackingSection(Strict):
    """What the trackers of report_to call the run."""

    project: Ref | None = None  # None: WANDB_PROJECT or TRACKIO_PROJECT, else r1fast
    name: Ref | None = None  # None: WANDB_NAME, else the recipe's name with seed and time
    group: Ref | None = None  # of runs; None: WANDB_RUN_GROUP


class KernelsSection(Strict):
    """Implementations of the ops."""

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
        try:
            parts = urlsplit(url or "http://localhost")
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number
            is_address = False
        if url is not None and not (is_address and re.fullmatch("[!-~]+", url)):
            yield f"server_base_url is {url!r}; expected http://host:port"


class RolloutSection(Strict):
    """How every stage samples."""

    engine: Literal["r1fast", "vllm"] = "r1fast"  # r1fast decodes with the very weights that are trained
    max_num_seqs: Positive = 512  # samples that are decoded at the same time
    max_num_batched_tokens: Positive = 8192  # of engine r1fast: prompt tokens of one prefill
    # Of engine r1fast: bytes that keys and values may take; None: what max_num_seqs samples need, or what is free. With
    # less, fewer samples are decoded at a time; one that does not fit is an error.
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
            own = "max_num_batched_tokens and kv_cache_memory_bytes are of engine: r1fast"
            yield f"{own}; vLLM's memory is vllm.gpu_memory_utilization: drop them"
        if self.vllm.server_base_url is not None and self.enforce_eager:
            yield "enforce_eager is a setting of the server: start it so, or drop it"
        if self.vllm.server_base_url is None and self.async_steps:
            why = "does not apply to vLLM in process, which takes turns with training"
            yield f"async_steps = {self.async_steps} {why}: name a server in vllm.server_base_url, or drop it"


class RewardWorkers(Strict):
    """The processes that rewards run in."""

    num_workers: Annotated[int, Field(gt=0, le=1024)] = 1  # processes
    timeout_s: Seconds = 30.0  # seconds that a call may take; then its process is killed
    memory_limit_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None  # of one; None: its part of half the machine's


class WeightedSpec(Strict):
    """What a reward counts, and for which rows."""

    weight: Weight = 1.0  # factor; 0: measured only
    domains: Listed[str] = []  # that it applies to; all when empty

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        return not self.domains or row.get("domain") in self.domains


class RewardSpec(WeightedSpec):
    """What a rule pays; other keys are keyword arguments of the function."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain] = Field(init=False)
    function: Ref | None = None  # registry name or dotted path; None: the name of the reward


class RewardModelSpec(WeightedSpec):
    """A reward model's part in the reward: sigmoid(score) * weight."""

    model: RewardModelRef  # of a reward_model stage
    prompt_template: PromptTemplate = "chat"  # that it was trained with
    score_on: ScoredPart = "response"  # as it was trained


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
# Of an evaluation, and of its completions: a reward of such a name would hide it, or be hidden.
_TAKEN = frozenset({
    "pass@1", "pass@k", "cons@k", "greedy", "n", "k", "split", "limit", "temperature", "top_p", "length", "failures",
    "unscorable", "files", "step", "file", "row", "kind", "prompt", "gold", "completion", "finish_reason", "tokens",
    "prompt_template", "response_format", "prefill_think", "chat_template_kwargs", "max_completion_length",
})  # fmt: skip


def _free_names(rewards: dict[str, Any]) -> dict[str, Any]:
    taken = [name for name in rewards if name in _TAKEN or name.endswith("_ci") or name.startswith("greedy/")]
    if taken:
        how = f"choose another name, with function: {taken[0]}"
        raise ValueError(f"{taken[0]!r} is what an evaluation calls something of its own; {how}")
    return rewards


EvalRewards = Annotated[
    dict[RewardName, Annotated[dict[str, Any], AfterValidator(_measured)]], Field(min_length=1),
    AfterValidator(_free_names), Reads("code"),
]  # fmt: skip


def reward_specs(rewards: Mapping[str, float | RewardSpec | dict[str, Any]]) -> dict[str, RewardSpec]:
    """Rewards as a recipe may write them, each with all options and the name of its function."""
    specs = {}
    for name, value in rewards.items():
        spec = RewardSpec(weight=value) if isinstance(value, (int, float)) else RewardSpec.model_validate(value)
        specs[name] = spec.model_copy(update={"function": spec.function or name})
    return specs


class StageBase(Strict):
    """Of every stage."""

    makes: ClassVar[tuple[Made, ...]] = ()  # what other stages may name of it, as @name
    name: StageName  # of a folder in the run directory
    kind: str
    model: ModelRef | None = None  # @stage, folder or Hub id; None: the recipe's model.path
    seed: Seed | None = None  # None: the recipe's seed


class GenerateOptions(StageBase):
    """Prompts, completions, and their lengths."""

    prompt_template: PromptTemplate = "r1_zero"  # how a prompt is written; tokenizer: its own chat template
    response_format: ResponseFormatName = "think_answer"  # layout of a completion, which rewards and filters read
    prefill_think: bool = False  # end the prompt with <think>
    chat_template_kwargs: dict[str, Plain] = {}  # variables of the tokenizer's chat template, as enable_thinking: false
    max_prompt_length: Positive = 512  # tokens; a longer prompt is an error
    max_completion_length: Positive = 512  # tokens; sampling stops there
    _today: date | None = None  # of the recipe

    @property
    def today(self) -> date | None:
        """What a chat template takes for the date of today; None: the clock says it."""
        return self._today

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.chat_template_kwargs and self.prompt_template != "tokenizer":
            why = f"prompt_template {self.prompt_template} has no variables"
            yield f"chat_template_kwargs does not apply: {why}; drop it, or use prompt_template: tokenizer"

    def unused_lengths(self, why: str) -> Iterator[str]:
        """Lengths of sampling that are set in a stage that does not sample."""
        for name in self.changed(("max_prompt_length", "max_completion_length")):
            yield f"{name} = {getattr(self, name)} does not apply: {why}; drop it"


class EvalOptions(GenerateOptions):
    """What is measured before and after a stage, on samples at `eval_temperature`."""

    eval_files: Listed[Prompts] = []  # prompts with gold answers; none: nothing is measured
    eval_rewards: EvalRewards = {"accuracy": {}, "format": {}}  # what is measured, by name, as options of its function
    eval_num_samples: Positive = 4  # k of pass@1 over k samples, of pass@k and cons@k
    eval_temperature: Temperature = 1.0  # R1: 0.6, with eval_top_p 0.95
    eval_top_p: TopP = 1.0  # share of the distribution that is sampled from
    eval_greedy: bool = True  # one greedy completion per prompt too
    eval_limit: Positive | None = None  # rows of eval_files
    eval_before: bool = True  # of stages that train

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        others = [name for name in type(self).model_fields if name.startswith("eval_") and name != "eval_files"]
        for name in self.changed(others) if not self.eval_files else ():
            yield f"{name} applies to eval_files, and there are none: name some, or drop it"
        if self.eval_files and self.eval_temperature == 0 and (k := self.eval_num_samples) > 1:
            what = f"eval_num_samples = {k} with eval_temperature 0 are {k} equal samples"
            yield f"{what}: set eval_num_samples: 1, or raise eval_temperature"
        if self.eval_temperature == 0 and self.changed(["eval_top_p"]):
            yield f"eval_top_p = {self.eval_top_p} does not apply: at eval_temperature 0 the likeliest token is taken"


class ValidationOptions(EvalOptions):
    """Evaluations while a stage trains."""

    eval_steps: Positive | None = None  # steps between two evaluations; None: before and after it alone
    eval_steps_limit: Positive | None = None  # rows of eval_files that those take; None: as eval_limit says
    metric_for_best_model: str = "pass@1"  # of an evaluation; more is better
    load_best_model_at_end: bool = False  # of the steps that were evaluated; the stage hands it on
    early_stopping_patience: Positive | None = None  # evaluations that find no better step, after which it ends

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        best = ["metric_for_best_model", "load_best_model_at_end", "early_stopping_patience"]
        if self.eval_steps is None:
            for name in self.changed(["eval_steps_limit", *best]):
                yield f"{name} needs eval_steps: without them nothing is evaluated under way"
            return
        if "metric_for_best_model" in self.changed(best) and not self.chooses:
            yield "metric_for_best_model needs load_best_model_at_end or early_stopping_patience: set one, or drop it"
        if (most := getattr(self, "max_steps", None)) is not None and self.eval_steps > most:
            yield f"eval_steps = {self.eval_steps} is more than max_steps = {most}: nothing is evaluated under way"
        if self.eval_limit is not None and (self.eval_steps_limit or 0) > self.eval_limit:
            yield f"eval_steps_limit = {self.eval_steps_limit} is more than eval_limit = {self.eval_limit}"
        others = [name for name in self.eval_rewards if name != "accuracy"]
        ways, greedy = ["pass@1", "pass@k", "cons@k"], ["greedy"]
        measured = [*(ways if len(others) < len(self.eval_rewards) else []), *others]
        greedy = [*(greedy if len(others) < len(self.eval_rewards) else []), *(f"greedy/{name}" for name in others)]
        measured += greedy if self.eval_greedy else []
        if self.chooses and (metric := self.metric_for_best_model) not in measured:
            yield f"metric_for_best_model = {metric!r} is not measured; expected one of {', '.join(measured)}"

    @property
    def chooses(self) -> bool:
        """Whether something depends on which evaluation is the best."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def best_step(self, found: Sequence[Mapping[str, Any]]) -> int | None:
        """Of evaluations under way, each with its `step`, the first of the best; None: none has the metric."""
        metric = self.metric_for_best_model
        known = [(result[metric], -result["step"]) for result in found if metric in result]
        return -max(known)[1] if known else None

    def has_patience(self, found: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the stage goes on after these evaluations."""
        patience, best = self.early_stopping_patience, self.best_step(found)
        return patience is None or best is None or sum(result["step"] > best for result in found) < patience


class LoraOptions(Strict):
    """Low-rank adapters are trained, beside weights that stay as they are, in model.dtype. Names: peft's."""

    r: Positive = 16  # rank
    alpha: AboveZero = 32.0  # an adapter counts alpha / r
    # Names of linear layers, or the ends of their names (o_proj, mlp.experts.down_proj); all-linear: all in the blocks,
    # stacked experts too, and not the router.
    target_modules: Literal["all-linear"] | Files[Ref] = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what an adapter reads, in updates
    merge_and_unload: bool = False  # the stage hands on a whole model; false: a LoRA folder, which names its base


class DecontaminateOptions(Strict):
    """Rows of train_files are left out whose prompt has a run of words in common with a prompt of a test."""

    ngram: Positive = 13  # words, or Chinese and Japanese characters; a prompt of fewer has to be the same as a whole
    files: Listed[Prompts] = []  # the tests; none: the stage's eval_files


class DeduplicateOptions(Strict):
    """Rows of train_files are left out that nearly repeat an earlier one."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8  # Jaccard similarity of their runs of 5 words


class TrainFilesOptions(StageBase):
    """Rows of train_files that are left out; <stage>/left_out.jsonl names each with its reason."""

    decontaminate: DecontaminateOptions | None = None  # {}: by 13 words of a prompt of eval_files; None: nothing is
    deduplicate: DeduplicateOptions | None = None  # {}: by a similarity of 0.8; None: nothing is

    @property
    def leaves_out(self) -> bool:
        """Whether rows may be left out."""
        return self.decontaminate is not None or self.deduplicate is not None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.decontaminate is not None and not (self.decontaminate.files or getattr(self, "eval_files", [])):
            yield "decontaminate: the stage has no eval_files to compare with; name some in decontaminate.files"


class TrainOptions(TrainFilesOptions):
    """The update."""

    lora: LoraOptions | None = None  # None: every weight is trained
    learning_rate: LearningRate = 1e-6  # of AdamW; with muon of its matrices too
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices of layers, adamw for all else
    lr_scheduler_type: Schedule = "constant"  # of the learning rate, after the warmup
    warmup_steps: Count = 0  # optimizer steps in which it rises to learning_rate
    min_lr_ratio: Share = 0.0  # of learning_rate, at the end of a decaying schedule
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.4  # share of the steps that decay (wsd)
    weight_decay: NonNegative = 0.0  # decoupled
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of the first moment
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95  # of the second moment
    max_grad_norm: AboveZero = 1.0  # gradients are scaled down to it
    # Packed into one forward pass; more of them cost memory, and change no number.
    max_tokens_per_microbatch: Positive = 16384
    # DeepSeek-V3's balance rule. 0 freezes the bias, as V3's last phase does and RL should: a few hundred prompts load
    # experts unevenly for good reasons, and a bias that moves between sampling and update re-routes the same tokens.
    router_bias_update_rate: NonNegative = 0.0
    router_aux_loss_coef: NonNegative = 0.0  # factor of the balance loss within each sequence (V3: 1e-4)
    save_steps: Positive = 100  # the last step is always saved
    logging_steps: Positive = 1  # console and trackers get the means of so many steps; metrics.jsonl has every step
    save_total_limit: Positive = 2  # checkpoints that are kept, beside the best one

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
        if self.lora is not None and self.router_bias_update_rate:
            yield "router_bias_update_rate does not apply with lora: the router stays as it is; drop it"


class FitOptions(TrainOptions):
    """Of stages that learn from the rows of files."""

    batch_size: Positive  # rows per step
    max_length: Positive  # tokens of a row


class EpochOptions(FitOptions):
    """Of those that take every row as often."""

    num_train_epochs: Positive  # passes over the rows

    def updates_on(self, num_rows: int) -> int:
        """Optimizer steps on so many rows."""
        steps = self.num_train_epochs * -(-num_rows // self.batch_size)
        return min(steps, self.num_updates() or steps)


class FilterOptions(Strict):
    """What keeps a sampled response out of a data set; the first reason that applies is recorded."""

    min_language: Share = 1.0  # share of the reasoning in the language of the prompt
    max_repetition: Share = 0.2  # share of repeated 10-grams of words
    max_paragraph_chars: Positive = 2000  # of the reasoning
    allow_code: bool = False  # in the reasoning


class SampleOptions(TrainFilesOptions, GenerateOptions):
    """Sampling by a model as it is; what passes the filters is kept."""

    num_prompts: Positive | None = None  # None: every row of train_files
    num_samples: Positive = 4  # per prompt
    temperature: Temperature = 1.0  # of sampling
    top_p: TopP = 1.0  # share of the distribution that is sampled from
    rewards: Rewards = {"accuracy": 1.0}  # of which a sample needs min_reward in all, where any applies
    min_reward: Weight = 1.0  # sum of rewards that a sample needs
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
        if self.temperature == 0 and self.changed(["top_p"]):
            yield f"top_p = {self.top_p} does not apply: at temperature 0 the likeliest token is taken; drop it"
        if self.max_per_prompt is not None and self.max_per_prompt > most:
            yield f"max_per_prompt = {self.max_per_prompt} is more than num_samples = {most}: drop it"


if TYPE_CHECKING:  # what is made from a table is read through `loss`, which is typed
    from r1fast_kernels.loss_options import LossOptions as Loss

    class LossFields(StageBase):
        loss_type: str
        sampling_importance_cap: float | Literal["auto"] | None
else:
    LossFields = create_model("LossFields", __base__=StageBase, __doc__="The policy's loss.", **loss_fields.fields())


class LossOptions(LossFields):
    """What the policy's loss reads, beside the options of r1fast_kernels/loss_options.py under their names there."""

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
    def is_own_loss(self) -> bool:
        return self.loss_type not in loss_fields.LOSS_TYPES

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        changed = self.changed(type(self).model_fields)
        loss, weights = self.loss, [name for name in changed if name.startswith("sampling_importance_")]
        if self.loss_type == "cispo" and loss.epsilon_high is None:
            yield "loss_type cispo caps the ratio at epsilon_high itself: set it (5.0, say)"
        if loss.delta is not None and loss.delta <= 1 and not self.is_own_loss:
            yield f"delta = {loss.delta} cuts off the ratio 1, which every update begins with; expected more than 1"
        yield from loss_fields.unused(self.loss_type, {name: getattr(self, name) for name in changed})
        if self.loss_aggregation is not None and not self.is_own_loss:
            yield f"loss_aggregation is of a loss of one's own; {self.loss_type} has its own mean: drop it"
        if loss.beta == 0 and "kl_estimator" in changed:
            yield "kl_estimator needs beta above 0: without it there is no KL in the loss"
        if loss.beta == 0 and self.ref_model is not None and not self.is_own_loss:
            yield "ref_model needs beta above 0, or a loss of one's own that reads ref_logprobs_T"
        if "sampling_importance_mode" in weights and loss.is_cap is None and loss.is_min is None:
            yield "sampling_importance_mode needs bounds: set sampling_importance_cap (3.0, say), or _min"
        if self.old_logprobs == "sampler" and (loss.is_cap is not None or loss.is_min is not None):
            yield f"{weights[0]} does not apply: with old_logprobs: sampler every such weight is 1; drop it"
