"""Every stage of a recipe with its options, and the recipe. Names are TRL's or verl's where they exist."""

import math
from collections import Counter
from collections.abc import Iterator
from datetime import date
from fractions import Fraction
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from r1fast.schema_options import (  # isort: skip
    EpochOptions, EvalOptions, FitOptions, GenerateOptions, KernelsSection, LossOptions, ModelSection, PromptTemplate,
    ResponseFormatName, RewardModelSpec, Rewards, RewardWorkers, RolloutSection, SampleOptions, Schedule, ScoredPart,
    StageBase, Strict, TrackingSection, TrainerSection, TrainOptions, ValidationOptions, WeightedSpec, reward_specs,
)  # fmt: skip
from r1fast.schema_types import (  # isort: skip
    AboveZero, Count, Day, Files, FolderName, LearningRate, Listed, Made, ModelRef, NonNegative, Plain, Positive,
    Prompts, Reads, Ref, RewardName, RowKind, Seed, SFTRows, Share,
)  # fmt: skip

# Of samples/*.parquet, beside a column for each reward.
_SAMPLE_COLUMNS = frozenset({"step", "prompt", "gold", "completion", "finish_reason", "tokens", "reward", "advantage"})


class PretrainStage(FitOptions, ValidationOptions):
    """Next-token training of a model from scratch; trains its tokenizer too unless it takes one."""

    makes = ("model",)
    kind: Literal["pretrain"]
    train_files: Files[SFTRows]  # text to learn from; the tokenizer too is trained on it
    architecture: dict[str, Plain]  # model_type and the fields of the Hugging Face configuration
    tokenizer: ModelRef | None = None  # @stage or a folder; None: train one of vocab_size on train_files
    # Bytes and special tokens are 265; trainers reserve memory for what is asked.
    vocab_size: Annotated[int, Field(ge=265, le=2**20)] = 1024
    batch_size: Positive = 64
    max_steps: Positive  # optimizer steps
    max_length: Positive = 1024  # tokens of a row; a longer one is an error
    mask_prompt: bool = True  # learn from completions alone
    prompt_template: PromptTemplate = "chat"  # how rows with a prompt are written

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.model is not None:
            yield f"model = {self.model!r} does not apply: pretrain starts from scratch; drop it, or use sft"
        if self.lora is not None:
            yield "lora does not apply: pretrain starts from scratch, without a base; drop it, or use sft"
        if self.tokenizer is not None and self.changed(["vocab_size"]):
            yield f"vocab_size = {self.vocab_size} does not apply: tokenizer is given; drop one of them"
        if self.changed(["eval_before"]):
            yield "eval_before does not apply: pretrain starts from scratch; drop it"
        if not self.eval_files:
            yield from self.unused_lengths("without eval_files nothing is sampled")


class SFTStage(EpochOptions, ValidationOptions):
    """Supervised fine-tuning on prompts and completions, or messages."""

    makes = ("model",)
    kind: Literal["sft"]
    train_files: Files[SFTRows]  # rows of prompt and completion, of messages, or of text
    batch_size: Positive = 128
    num_train_epochs: Positive = 2  # passes over the rows
    max_steps: Positive | None = None  # stops earlier than num_train_epochs
    max_length: Positive = 32768  # tokens of a row; a longer one is an error
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


class GRPOStage(LossOptions, TrainOptions, ValidationOptions):
    """Group relative policy optimization on rule rewards and reward models."""

    makes = ("model",)
    kind: Literal["grpo"]
    train_files: Files[Prompts]  # prompts with what the rewards read of a row, such as its answer
    # What is paid: a weight, or options; built in, dotted path or file.py:function.
    rewards: Rewards = {"accuracy": 1.0, "format": 1.0}
    reward_models: dict[RewardName, RewardModelSpec] = {}  # what models of reward_model stages pay beside them
    domain_weights: dict[str, NonNegative] = {}  # share of a step's prompts by column `domain`; empty: as they come
    num_generations: Annotated[int, Field(ge=2, lt=2**31)] = 8  # samples per prompt, a group
    prompts_per_step: Positive = 16  # per rollout
    steps_per_generation: Positive = 1  # optimizer steps (minibatches) per rollout
    num_iterations: Positive = 1  # passes over a rollout
    max_steps: Positive | None = None  # rollouts; or num_train_epochs says how many
    # Passes over the prompts of train_files, in place of max_steps; half a pass is 0.5. Prompts that
    # dynamic_sampling_refills draws beside are not counted.
    num_train_epochs: AboveZero | None = None
    temperature: Annotated[float, Field(ge=0.001, le=1000)] = 1.0  # of sampling, and of the log-probs in the loss
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
    log_completions_steps: Positive = 10  # steps between those that write them

    def num_updates(self) -> int | None:
        return None if self.max_steps is None else self.max_steps * self.updates_per_step

    @property
    def updates_per_step(self) -> int:
        return self.steps_per_generation * self.num_iterations

    def steps_on(self, num_prompts: int) -> int:
        """Rollouts of a stage with so many prompts in its files; the last of an epoch's may begin the next one."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None, "one of the two is given"
        return math.ceil(Fraction(str(self.num_train_epochs)) * num_prompts / self.prompts_per_step)

    @property
    def has_reference(self) -> bool:
        """Whether there is a second model: with `lora` the policy without its adapter is the reference."""
        return (self.loss.beta > 0 and self.lora is None) or self.ref_model is not None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.max_steps is None and self.num_train_epochs is None:
            yield "neither max_steps (rollouts) nor num_train_epochs (passes over train_files) is given: set one"
        if self.max_steps is not None and self.num_train_epochs is not None:
            both = f"max_steps = {self.max_steps} and num_train_epochs = {self.num_train_epochs:g}"
            yield f"{both} both say how long: drop one, or set it to null"
        yield from self._reward_problems()
        yield from self._length_problems()
        num_samples = self.prompts_per_step * self.num_generations
        if num_samples >= 2**31:
            yield f"prompts_per_step * num_generations = {num_samples}; expected less than {2**31}"
        if num_samples % (parts := self.steps_per_generation):
            divisor = f"steps_per_generation = {parts}"
            yield f"prompts_per_step * num_generations = {num_samples} is not a multiple of {divisor}"
        if self.log_completions == 0 and self.changed(["log_completions_steps"]):
            yield "log_completions_steps does not apply: log_completions is 0; drop it"
        if self.ref_model_sync_steps and self.loss.beta == 0 and self.ref_model is None:
            yield "ref_model_sync_steps needs beta above 0: without KL there is no reference to copy into"
        if self.ref_model_sync_steps and self.lora is not None:
            yield "ref_model_sync_steps does not apply with lora: the reference is the base itself; drop it"
        if self.skip_zero_variance_groups and (self.loss.beta > 0 or self.loss.entropy_coef or self.is_own_loss):
            yield "skip_zero_variance_groups needs beta 0, entropy_coef 0 and a built-in loss: else such groups learn"

    def _reward_problems(self) -> Iterator[str]:
        specs: list[WeightedSpec] = [*reward_specs(self.rewards).values(), *self.reward_models.values()]
        if not specs:
            yield "rewards and reward_models are both empty; name at least one"
        if not any(spec.weight for spec in specs):
            yield "every reward has weight 0, so nothing is learned; give one a weight"
        for name in _SAMPLE_COLUMNS & {*self.rewards, *self.reward_models}:
            yield f"a reward is named {name!r}, as a column of samples/*.parquet is; rename it, with function: {name}"
        for name in self.rewards.keys() & self.reward_models.keys():
            yield f"a reward and a reward model are both named {name!r}; rename one"
        if self.domain_weights and not any(self.domain_weights.values()):
            yield "domain_weights are all 0; give one of them a weight"
        if self.overlong_buffer_length is not None and "overlong" in (*self.rewards, *self.reward_models):
            yield "a reward is named overlong, as the one of overlong_buffer_length is; rename it"
        if self.overlong_buffer_length is None and self.changed(["overlong_penalty"]):
            yield "overlong_penalty needs overlong_buffer_length: without it nothing is punished"

    def _length_problems(self) -> Iterator[str]:
        longest, part, buffer = self.max_completion_length, self.partial_rollout_length, self.overlong_buffer_length
        if (whole := self.max_prompt_length + longest) >= (room := self.max_tokens_per_microbatch):
            into = f"max_tokens_per_microbatch = {room}; raise the latter"
            yield f"max_prompt_length + max_completion_length = {whole} does not fit into {into}"
        if part is not None and (part >= longest or longest % part):
            what = f"partial_rollout_length = {part} does not cut max_completion_length = {longest}"
            yield f"{what} into equal parts; choose a divisor"
        if part is not None and self.steps_per_generation > self.num_generations:
            most = f"num_generations = {self.num_generations}"
            what = f"steps_per_generation = {self.steps_per_generation} is more than {most}"
            yield f"{what}: with partial_rollout_length a step may have no more samples than one group"
        if buffer is not None and buffer > longest:
            yield f"overlong_buffer_length = {buffer} is more than max_completion_length = {longest}"


class FewShotOptions(Strict):
    """Cold-start samples by prompting with worked examples (Problem, Solution, Summary)."""

    model: ModelRef | None = None  # None: the stage's model
    examples_files: Files[Prompts]  # {prompt, reasoning, answer, language}; shown are those in the prompt's language
    num_examples: Positive = 2  # shown in each prompt
    num_prompts: Positive | None = None  # None: every row of train_files
    num_samples: Positive = 4  # per prompt


class CollectStage(SampleOptions):
    """Cold-start data: readable, correct samples of the zero model, and of few-shot prompts, in the cold-start form."""

    makes = ("data",)
    kind: Literal["collect"]
    train_files: Files[Prompts]  # prompts with gold answers
    output_format: ResponseFormatName = "special_token"  # in which the data are written
    few_shot: FewShotOptions | None = None  # samples by worked examples, beside those of the model itself; None: none
    limit: Positive | None = None  # rows kept

    def most_samples(self) -> int:
        return max(self.num_samples, self.few_shot.num_samples if self.few_shot else 0)


class RejectStage(SampleOptions):
    """Rejection sampling: many candidates per prompt, only the correct, complete and readable ones kept."""

    makes = ("data",)
    kind: Literal["reject"]
    train_files: Files[Prompts]  # prompts with gold answers
    prompt_template: PromptTemplate = "chat"
    response_format: ResponseFormatName = "special_token"


def _preference_rows(stage: "RewardModelStage") -> RowKind:
    return "pairs" if stage.loss == "pairwise" else "labels"


class RewardModelStage(EpochOptions, GenerateOptions):
    """A scalar head on the model, trained on preference pairs (pairwise) or labels (pointwise)."""

    makes = ("reward model",)
    kind: Literal["reward_model"]
    # Rows with chosen and rejected (pairwise), or with a label (pointwise).
    train_files: Files[Annotated[Ref, Reads("data", _preference_rows)]]
    loss: Literal["pairwise", "pointwise"]  # what rows hold: pairs, or labels
    score_on: ScoredPart = "response"  # what it reads: the whole response, or its answer part
    batch_size: Positive = 256
    num_train_epochs: Positive = 1  # passes over the rows
    max_length: Positive = 8192  # tokens of a row; a longer one is an error
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the rows that is held out, and measured on
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


def _distill_rows(stage: "DistillStage") -> RowKind:
    return "sft" if stage.teacher is None else "prompts"


class DistillStage(SFTStage, SampleOptions):
    """SFT of a student on a teacher's samples: those of train_files, or fresh ones when `teacher` is given."""

    kind: Literal["distill"]  # type: ignore[assignment]
    # Rows to learn from; prompts where teacher is given.
    train_files: Files[Annotated[Ref, Reads("data", _distill_rows)]]
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
        longest = self.max_prompt_length + self.max_completion_length
        most, room = self.max_length, self.max_tokens_per_microbatch
        if self.teacher is not None and longest > min(most, room):
            into = f"max_length = {most} and max_tokens_per_microbatch = {room}"
            what = f"max_prompt_length + max_completion_length = {longest} does not fit into {into}"
            yield f"{what}: a sample might not be learned from"


class EvaluateStage(EvalOptions):
    """pass@1 over k samples with a confidence interval, cons@k, greedy, and the means of eval_rewards."""

    kind: Literal["evaluate"]
    eval_files: Files[Prompts]  # prompts with gold answers

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


def _none_is_empty(value: Any) -> Any:
    return [] if value in (None, "none", ["none"]) else value


class Recipe(Strict):
    """What a run does: the model to begin with, how it is trained, and the stages."""

    name: FolderName = "recipe"  # of the folder under runs/
    seed: Seed = 0  # of every draw: order, samples, initial weights
    # 2026-01-31: the day that chat templates with a clock write into prompts; None: that on which the run began, which
    # its config.yaml says and a resume keeps.
    date: Day | None = None
    model: ModelSection = ModelSection()
    trainer: TrainerSection = TrainerSection()
    kernels: KernelsSection = KernelsSection()
    rollout: RolloutSection = RolloutSection()
    reward_workers: RewardWorkers = RewardWorkers()
    # Trackers that get the metrics; none: [].
    report_to: Annotated[Listed[Literal["wandb", "trackio", "tensorboard"]], BeforeValidator(_none_is_empty)] = []
    tracking: TrackingSection = TrackingSection()
    stages: list[Stage]  # what is run, in order

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

    @model_validator(mode="after")
    def _pass_date_on(self) -> Self:
        for stage in self.stages:
            if isinstance(stage, GenerateOptions):
                stage._today = None if self.date is None else date.fromisoformat(self.date)
        return self

    def begun_on(self, day: str) -> "Recipe":
        """With the date of its first day, if a chat template may ask for it and the recipe names none."""
        templates = [stage.prompt_template for stage in self.stages if isinstance(stage, GenerateOptions)]
        if self.date is not None or "tokenizer" not in templates:
            return self
        return Recipe.model_validate({**self.model_dump(mode="json"), "date": day})

    @field_validator("report_to")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError(f"names a tracker twice: {', '.join(names)}")
        return names

    def problems(self) -> Iterator[str]:
        if self.rollout.async_steps and not any(isinstance(stage, GRPOStage) for stage in self.stages):
            yield "rollout.async_steps applies to stages of kind grpo, and there are none: drop it"
        kept = {
            "optimizer": any(isinstance(stage, TrainOptions) for stage in self.stages),
            "reference": any(isinstance(stage, GRPOStage) and stage.has_reference for stage in self.stages),
        }
        for name in self.trainer.offload:
            if not kept[name]:
                yield f"trainer.offload: no stage has the {name} in memory, so there is nothing to offload: drop it"

    def stage(self, name: str) -> StageBase:
        return next(stage for stage in self.stages if stage.name == name)
