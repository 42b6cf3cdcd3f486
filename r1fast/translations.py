"""What other trainers call things, and what a recipe says for them.

An unknown key is answered with its row here, a value that an option of ours does not have with one of `values`, and the
documentation prints both tables. A name that means the same
in a recipe has no row; one that means something else there has a note (its unit, or what is counted).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

TRL, OPEN_R1, VERL = "TRL", "open-r1", "verl"  # TRL's configurations are transformers' TrainingArguments, and more


@dataclass(frozen=True)
class Translation:
    """A name of another trainer. One that ends in `*` stands for all that begin so."""

    peer: str
    theirs: str
    ours: tuple[str, ...]  # options of a stage, section.option, or --option of the command line; empty: none
    note: str  # where unit, meaning or default differ, or why there is none; may be empty

    def __str__(self) -> str:
        said = f"of {self.peer}; here {' and '.join(self.ours)}" if self.ours else f"of {self.peer}; nothing here"
        return f"{said}: {self.note}" if self.note else said


@cache
def translations() -> tuple[Translation, ...]:
    """The table, trainer by trainer, in the order of their own documentation."""
    tables = ((TRL, _TRL), (OPEN_R1, _OPEN_R1), (VERL, _VERL))
    return tuple(
        Translation(peer, theirs, tuple(ours.split()), note) for peer, rows in tables for theirs, ours, note in rows
    )


def translate(key: str) -> Translation | None:
    """The row of another trainer's name, dots and all for verl's; None where none of them has such a name."""
    for row in translations():
        if row.theirs == key:
            return row
    fit = [row for row in translations() if row.theirs.endswith("*") and key.startswith(row.theirs[:-1])]
    return max(fit, key=lambda row: len(row.theirs), default=None)


def translate_last(name: str) -> Translation | None:
    """The row of the last part of a name of verl's, where all that end so mean the same."""
    rows = [row for row in translations() if row.theirs.endswith(f".{name}")]
    return rows[0] if len({row.ours for row in rows}) == 1 else None


@cache
def values() -> tuple[tuple[str, str, str], ...]:
    """Option of ours, what other trainers say there as YAML has it, and what a recipe says for it."""
    return tuple((key, theirs, ours) for key, rows in _VALUES.items() for theirs, ours in rows.items())


def translate_value(key: str, value: Any) -> str:
    """What a recipe says for this value of an option (by its last part); "" where no trainer has it."""
    word = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return next((ours for option, theirs, ours in values() if (option.split(".")[-1], theirs) == (key, word)), "")


_PACKED = "tokens are always packed, none is padded"
_BATCH = "samples of an optimizer step are prompts_per_step * num_generations / steps_per_generation, over all ranks"
_MICRO = "a micro-batch is so many tokens; it changes speed and memory, no number"
_SAMPLED = "training samples from the policy's whole distribution: any other would bias the ratio (eval_top_p is free)"
_NO_CRITIC = "there is no critic: advantages are those of a group"
_UPLOAD = "nothing is uploaded: RUN/STAGE/model is a folder for the Hub"
_LAUNCH = "torchrun says how many processes there are; weights are sharded over all of them (FSDP2)"

_OWN = "a function of your own: file.py:name"
_VALUES: dict[str, dict[str, str]] = {
    "lr_scheduler_type": {
        "constant_with_warmup": "constant, with warmup_steps",
        "cosine_with_min_lr": "cosine, with min_lr_ratio",
        "cosine_warmup_with_min_lr": "cosine, with min_lr_ratio and warmup_steps",
        "warmup_stable_decay": "wsd, with warmup_steps and decay_ratio",
    },
    "loss_type": {
        "sapo": "r1fast.losses.sapo",
        "gspo": "grpo, with importance_sampling_level: sequence",
        "vespo": _OWN,
        "vanilla": "grpo, dapo or dr_grpo, as loss_agg_mode says",
        "token-mean": "dapo",
        "seq-mean-token-mean": "grpo",
        "seq-mean-token-sum-norm": "dr_grpo",
    },
    "importance_sampling_level": {"sequence_token": "token, with loss_type: r1fast.losses.gspo_token"},
    "scale_rewards": {"true": "group", "false": "none"},
    "kl_estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
    "sampling_importance_mode": {"token": "token_truncate", "sequence": "sequence_truncate"},
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"},
    "max_steps": {"-1": "null, with num_train_epochs"},
    "save_steps": {"-1": "as many as max_steps: the last step is always saved"},
    "eval_steps": {"-1": "null", "0": "null"},
    "model.dtype": {
        "bf16": "bfloat16",
        "torch.bfloat16": "bfloat16",
        "fp32": "float32",
        "torch.float32": "float32",
        "fp16": "bfloat16 or float32",
        "float16": "bfloat16 or float32",
    },
    "rollout.engine": {"hf": "r1fast", "sglang": "r1fast or vllm"},
    "report_to": {"console": "the trackers alone: the console and metrics.jsonl are always written"},
}
_TRL = [
    ("model_name_or_path", "model.path", ""),
    ("model_revision", "model.revision", ""),
    ("model_init_kwargs", "model.dtype", "nothing else is set at load"),
    ("torch_dtype", "model.dtype", ""),
    ("bf16", "model.dtype", "bfloat16 on a GPU without being asked; master weights are float32"),
    ("fp16", "model.dtype", "bfloat16 or float32; no float16, hence no loss scaling"),
    ("tf32", "", "torch's own setting"),
    ("attn_implementation", "", "attention is the package's own, for packed tokens"),
    ("trust_remote_code", "", "no code of a model is run: families are rows of models/families.py"),
    ("use_peft", "lora", "naming lora is enough"),
    ("lora_r", "lora.r", ""),
    ("lora_alpha", "lora.alpha", ""),
    ("lora_dropout", "lora.dropout", ""),
    ("lora_target_modules", "lora.target_modules", ""),
    ("lora_target_parameters", "lora.target_modules", "stacked experts are named there too"),
    ("lora_modules_to_save", "", "beside adapters nothing is trained"),
    ("lora_task_type", "", "the kind of the stage says it"),
    ("use_rslora", "lora.alpha", "an adapter counts alpha / r; set alpha to lora_alpha * sqrt(r)"),
    ("use_dora", "", "not built"),
    ("load_in_*", "", "no quantized training"),
    ("bnb_*", "", "no quantized training"),
    ("use_bnb_nested_quant", "", "no quantized training"),
    ("dataset_name", "train_files", "org/name or org/name:split, beside files and folders"),
    ("dataset_config", "train_files", "download the configuration, and name its files"),
    ("dataset_train_split", "train_files", "org/name:split"),
    ("dataset_test_split", "eval_files", "org/name:split"),
    ("dataset_mixture", "train_files", "a list; domain_weights says what a GRPO step holds of each"),
    ("reward_funcs", "rewards", "a mapping of names to weights"),
    ("reward_weights", "rewards", "the values of that mapping"),
    ("reward_model_path", "reward_models", ""),
    ("output_dir", "--output-dir", "of the command line; default: a new folder under runs"),
    ("overwrite_output_dir", "--resume", "a run is never written over"),
    ("resume_from_checkpoint", "--resume", "of the command line, with --output-dir"),
    ("run_name", "tracking.name", "for trackers; name is that of the recipe"),
    ("data_seed", "seed", ""),
    ("per_device_train_batch_size", "prompts_per_step num_generations max_tokens_per_microbatch",
     f"{_BATCH}; sft and reward_model: batch_size rows; {_MICRO}"),
    ("gradient_accumulation_steps", "max_tokens_per_microbatch", f"steps are cut by that; {_BATCH}"),
    ("generation_batch_size", "prompts_per_step num_generations", "their product"),
    ("auto_find_batch_size", "max_tokens_per_microbatch", "--dry-run says what it takes of memory"),
    ("num_generations_eval", "eval_num_samples", ""),
    ("max_seq_length", "max_length", "a longer row is an error, none is cut"),
    ("truncation_mode", "max_length", "a longer row is an error, none is cut"),
    ("generation_kwargs", "", _SAMPLED),
    ("top_p", "", _SAMPLED),
    ("top_k", "", _SAMPLED),
    ("min_p", "", _SAMPLED),
    ("min_tokens", "", _SAMPLED),
    ("repetition_penalty", "", _SAMPLED),
    ("cache_implementation", "", "the engine has one cache"),
    ("transformers_continuous_batching_config", "rollout.engine", "r1fast batches continuously by itself"),
    ("use_transformers_*", "rollout.engine", "r1fast batches continuously by itself"),
    ("use_vllm", "rollout.engine", "vllm"),
    ("vllm_mode", "rollout.vllm.server_base_url", "server: set it; colocate: leave it null"),
    ("vllm_server_base_url", "rollout.vllm.server_base_url", ""),
    ("vllm_server_host", "rollout.vllm.server_base_url", "http://host:port"),
    ("vllm_server_port", "rollout.vllm.server_base_url", "http://host:port"),
    ("vllm_server_timeout", "rollout.vllm.server_timeout", ""),
    ("vllm_group_port", "rollout.vllm.weight_transfer", "nccl finds a port itself"),
    ("vllm_gpu_memory_utilization", "rollout.vllm.gpu_memory_utilization", ""),
    ("vllm_max_model_length", "rollout.vllm.max_model_length", ""),
    ("vllm_importance_sampling_correction", "sampling_importance_cap",
     "null: off; auto: 2.0 where the sampler is not just the policy"),
    ("vllm_importance_sampling_mode", "sampling_importance_mode", ""),
    ("vllm_importance_sampling_cap", "sampling_importance_cap", ""),
    ("vllm_importance_sampling_clip_max", "sampling_importance_cap", ""),
    ("vllm_importance_sampling_clip_min", "sampling_importance_min", ""),
    ("vllm_*", "rollout.vllm", "that is not set here: start a server as it should be, and name it"),
    ("epsilon_low", "epsilon", ""),
    ("kl_coef", "beta", ""),
    ("use_bias_correction_kl", "kl_estimator", "k3_unbiased"),
    ("sapo_temperature_*", "loss_type", "r1fast.losses.sapo, a function to copy with temperatures of your own"),
    ("vespo_*", "loss_type", "a loss of your own: file.py:name"),
    ("multi_objective_aggregation", "rewards", "the weighted sum, before advantages"),
    ("sync_ref_model", "ref_model_sync_steps", "naming it is enough"),
    ("ref_model_mixup_alpha", "ref_model_sync_steps", "the whole policy is copied (1.0)"),
    ("disable_dropout", "", "models have no dropout; adapters have lora.dropout"),
    ("cast_lm_head_to_fp32", "lm_head_fp32", ""),
    ("entropy_coef_*", "entropy_coef", "it stays as it is"),
    ("use_adaptive_entropy", "entropy_coef", "it stays as it is"),
    ("entropy_target", "entropy_coef", "it stays as it is"),
    ("max_tool_calling_iterations", "", "no tools are called while sampling"),
    ("num_completions_to_print", "log_completions", "rows of samples/*.parquet, and of the page"),
    ("log_completions_hub_repo", "", _UPLOAD),
    ("log_unique_prompts", "log_completions", ""),
    ("log_multimodal", "", "text alone"),
    ("shuffle_dataset", "seed", "rows are always shuffled, in an order that the seed gives"),
    ("pad_to_multiple_of", "", _PACKED),
    ("packing", "max_tokens_per_microbatch", _PACKED),
    ("packing_strategy", "max_tokens_per_microbatch", _PACKED),
    ("eval_packing", "", _PACKED),
    ("padding_free", "", _PACKED),
    ("group_by_length", "", _PACKED),
    ("train_sampling_strategy", "", _PACKED),
    ("dataset_text_field", "train_files", "the column is called text"),
    ("dataset_kwargs", "train_files", "columns are read under the names of data/rows.py"),
    ("completion_only_loss", "mask_prompt", "of pretrain; sft learns from completions alone, where there are any"),
    ("assistant_only_loss", "train_files", "of messages the last turn is learned from"),
    ("chat_template_path", "prompt_template", "tokenizer: the template that the model comes with"),
    ("eos_token", "", "the tokenizer's"),
    ("pad_token", "", _PACKED),
    ("activation_offloading", "trainer.activation_checkpointing", "full; what stays is not offloaded"),
    ("gradient_checkpointing", "trainer.activation_checkpointing", "full; selective computes less again"),
    ("gradient_checkpointing_kwargs", "trainer.activation_checkpointing", ""),
    ("activation_checkpointing", "trainer.activation_checkpointing", "of the section trainer: none, selective or full"),
    ("activation_checkpointing_kwargs", "trainer.activation_checkpointing", ""),
    ("optim", "optimizer", "adamw or muon"),
    ("optim_args", "optimizer", "adamw or muon"),
    ("optim_target_modules", "optimizer", "muon takes the matrices of layers"),
    ("warmup_ratio", "warmup_steps", "in optimizer steps"),
    ("lr_scheduler_kwargs", "min_lr_ratio decay_ratio", ""),
    ("adam_epsilon", "", "1e-8"),
    ("label_smoothing*", "", "not built"),
    ("neftune_noise_alpha", "", "not built"),
    ("torch_compile*", "trainer.compile", ""),
    ("use_liger_kernel", "kernels.impl", "fused kernels are always used; reference: none of them"),
    ("liger_kernel_config", "kernels.impl", "fused kernels are always used"),
    ("logging_first_step", "", "each step is a line of metrics.jsonl"),
    ("logging_strategy", "", "each step is a line of metrics.jsonl"),
    ("eval_strategy", "eval_steps", "null: before and after the stage alone"),
    ("evaluation_strategy", "eval_steps", "null: before and after the stage alone"),
    ("eval_on_start", "eval_before", "true without being asked"),
    ("per_device_eval_batch_size", "rollout.max_num_seqs", "samples that are decoded at the same time"),
    ("greater_is_better", "metric_for_best_model", "more is always better"),
    ("save_strategy", "save_steps", "the last step is always saved"),
    ("save_only_model", "save_steps", "a checkpoint holds all that a resume needs"),
    ("push_to_hub*", "", _UPLOAD),
    ("hub_*", "", _UPLOAD),
    ("deepspeed", "trainer.offload", _LAUNCH),
    ("fsdp*", "trainer.offload", _LAUNCH),
    ("parallelism_config", "", _LAUNCH),
    ("accelerator_config", "", _LAUNCH),
    ("local_rank", "", _LAUNCH),
    ("use_cpu", "", "CUDA_VISIBLE_DEVICES= makes it a run on CPUs"),
    ("ddp_*", "", _LAUNCH),
    ("ds3_gather_for_generation", "", "generation reads whole weights on each rank"),
    ("dataloader_*", "", "rows are tokenized once, and held in memory"),
    ("remove_unused_columns", "", "every column of a row goes to the rewards"),
    ("dataset_num_proc", "", "rows are tokenized once, and held in memory"),
    ("full_determinism", "trainer.deterministic", "on by default"),
    ("do_train", "--stages", "of the command line: which stages are run"),
    ("do_eval", "eval_files", "a stage of kind evaluate measures a model alone"),
    ("precompute_ref_log_probs", "", "reference log-probs are computed with each rollout"),
    ("loss_weights", "", "of DPO, which is no stage"),
    ("f_divergence_type", "", "of DPO, which is no stage"),
    ("ld_alpha", "", "of DPO, which is no stage"),
]  # fmt: skip

_OPEN_R1 = [
    ("dataset_prompt_column", "train_files", "prompt, problem or question; others are renamed in the file"),
    ("system_prompt", "train_files prompt_template", "column system of a row; r1_zero has the paper's"),
    ("chat_template", "prompt_template", "tokenizer: the template that the model comes with"),
    ("max_new_tokens", "max_completion_length", ""),
    ("benchmarks", "eval_files", "measured before, after and every eval_steps"),
    ("callbacks", "", "a run is watched by its page, and by trackers"),
    ("cosine_*", "rewards.cosine", "options of the reward, without the first word of their names"),
    ("repetition_n_grams", "rewards.repetition", "its option ngram"),
    ("repetition_max_penalty", "rewards.repetition", "its option max_penalty"),
    ("hub_model_revision", "", _UPLOAD),
    ("overwrite_hub_revision", "", _UPLOAD),
    ("wandb_log_unique_prompts", "log_completions", ""),
    ("wandb_project", "tracking.project", ""),
    ("wandb_run_group", "tracking.group", ""),
    ("wandb_entity", "", "set WANDB_ENTITY"),
    ("wandb_run_name", "tracking.name", ""),
    ("wandb_*", "report_to", "wandb; its variables WANDB_* are honoured"),
    ("code_provider", "rewards", "programs run on this machine, in a process of their own"),
    ("e2b_router_url", "rewards", "programs run on this machine, in a process of their own"),
    ("morph_router_url", "rewards", "programs run on this machine, in a process of their own"),
    ("parallel_code_exec_per_proc", "reward_workers.num_workers", ""),
]  # fmt: skip

_A, _R = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
_VERL = [
    ("data.train_files", "train_files", ""),
    ("data.val_files", "eval_files", ""),
    ("data.train_batch_size", "prompts_per_step", "prompts of a rollout"),
    ("data.gen_batch_size", "prompts_per_step", "dynamic_sampling_refills samples more where groups are equal"),
    ("data.max_prompt_length", "max_prompt_length", "a longer prompt is an error"),
    ("data.max_response_length", "max_completion_length", ""),
    ("data.filter_overlong_prompts", "max_prompt_length", "a longer prompt is an error: leave it out of the file"),
    ("data.truncation", "max_prompt_length", "a longer prompt is an error, none is cut"),
    ("data.prompt_key", "train_files", "columns are read under the names of data/rows.py"),
    ("data.reward_fn_key", "rewards", "domains of a reward: rows whose column domain is one of them"),
    ("data.shuffle", "seed", "rows are always shuffled, in an order that the seed gives"),
    ("data.apply_chat_template_kwargs", "chat_template_kwargs", ""),
    ("data.tokenizer", "model.path", "the tokenizer is the model's"),
    ("data.val_batch_size", "rollout.max_num_seqs", "samples that are decoded at the same time"),
    ("data.*", "train_files", "columns are read under the names of data/rows.py"),
    ("actor_rollout_ref.model.path", "model.path", ""),
    ("actor_rollout_ref.model.enable_gradient_checkpointing", "trainer.activation_checkpointing", "full"),
    ("actor_rollout_ref.model.enable_activation_offload", "trainer.activation_checkpointing", "not offloaded"),
    ("actor_rollout_ref.model.use_remove_padding", "", _PACKED),
    ("actor_rollout_ref.model.use_fused_kernels", "kernels.impl", "fused kernels are always used"),
    ("actor_rollout_ref.model.use_liger", "kernels.impl", "fused kernels are always used"),
    ("actor_rollout_ref.model.lora_rank", "lora.r", "naming lora is enough"),
    ("actor_rollout_ref.model.lora_alpha", "lora.alpha", ""),
    ("actor_rollout_ref.model.target_modules", "lora.target_modules", ""),
    ("actor_rollout_ref.model.custom_chat_template", "prompt_template", "tokenizer: the model's own"),
    ("actor_rollout_ref.model.trust_remote_code", "", "no code of a model is run"),
    (f"{_A}ppo_mini_batch_size", "steps_per_generation",
     "it counts prompts: steps_per_generation = train_batch_size / ppo_mini_batch_size"),
    (f"{_A}ppo_micro_batch_size*", "max_tokens_per_microbatch", _MICRO),
    (f"{_A}ppo_max_token_len_per_gpu", "max_tokens_per_microbatch", ""),
    (f"{_A}use_dynamic_bsz", "max_tokens_per_microbatch", "always"),
    (f"{_A}ppo_epochs", "num_iterations", ""),
    (f"{_A}clip_ratio", "epsilon", ""),
    (f"{_A}clip_ratio_low", "epsilon", ""),
    (f"{_A}clip_ratio_high", "epsilon_high", "null: as epsilon"),
    (f"{_A}clip_ratio_c", "delta", "null: no dual clip; verl's default is 3.0"),
    (f"{_A}loss_agg_mode", "loss_type",
     "token-mean: dapo; seq-mean-token-mean: grpo; seq-mean-token-sum-norm: dr_grpo"),
    (f"{_A}loss_scale_factor", "loss_type", "dr_grpo divides by max_completion_length"),
    (f"{_A}policy_loss.loss_mode", "loss_type importance_sampling_level", "gspo: importance_sampling_level sequence"),
    (f"{_A}policy_loss.*", "loss_type", "a loss of your own: file.py:name"),
    (f"{_A}entropy_coeff", "entropy_coef", ""),
    (f"{_A}use_kl_loss", "beta", "0: no KL; beta is 0.001 without being asked"),
    (f"{_A}kl_loss_coef", "beta", ""),
    (f"{_A}kl_loss_type", "kl_estimator", "kl: k1, mse: k2, low_var_kl: k3"),
    (f"{_A}grad_clip", "max_grad_norm", ""),
    (f"{_A}shuffle", "seed", "samples of a rollout are shared out in the order that the seed gives"),
    (f"{_A}use_torch_compile", "trainer.compile", ""),
    (f"{_A}optim.lr", "learning_rate", ""),
    (f"{_A}optim.lr_warmup_steps", "warmup_steps", ""),
    (f"{_A}optim.lr_warmup_steps_ratio", "warmup_steps", "in optimizer steps"),
    (f"{_A}optim.warmup_style", "lr_scheduler_type", ""),
    (f"{_A}optim.lr_scheduler_type", "lr_scheduler_type", ""),
    (f"{_A}optim.min_lr_ratio", "min_lr_ratio", ""),
    (f"{_A}optim.weight_decay", "weight_decay", "0.0 without being asked; verl's default is 0.01"),
    (f"{_A}optim.betas", "adam_beta1 adam_beta2", "0.9 and 0.95 without being asked"),
    (f"{_A}optim.total_training_steps", "max_steps", ""),
    (f"{_A}fsdp_config.param_offload", "trainer.offload", "optimizer and reference; parameters stay"),
    (f"{_A}fsdp_config.optimizer_offload", "trainer.offload", "optimizer"),
    (f"{_A}fsdp_config.*", "trainer.offload", _LAUNCH),
    (f"{_A}strategy", "", _LAUNCH),
    (f"{_A}checkpoint.*", "save_steps", "a checkpoint holds all that a resume needs"),
    (f"{_A}ulysses_sequence_parallel_size", "", "a sequence is on one rank"),
    (f"{_A}router_replay*", "router_replay", ""),
    ("actor_rollout_ref.ref.fsdp_config.param_offload", "trainer.offload", "reference"),
    ("actor_rollout_ref.ref.log_prob_*", "max_tokens_per_microbatch", _MICRO),
    ("actor_rollout_ref.ref.model*", "ref_model", ""),
    ("actor_rollout_ref.ref.*", "ref_model", "as the policy"),
    (f"{_R}name", "rollout.engine", "r1fast or vllm"),
    (f"{_R}mode", "rollout.vllm.server_base_url", "a server, or null: in every process"),
    (f"{_R}n", "num_generations", ""),
    (f"{_R}temperature", "temperature", ""),
    (f"{_R}top_k", "", _SAMPLED),
    (f"{_R}top_p", "", _SAMPLED),
    (f"{_R}prompt_length", "max_prompt_length", ""),
    (f"{_R}response_length", "max_completion_length", ""),
    (f"{_R}dtype", "model.dtype", "the sampler has the policy's"),
    (f"{_R}gpu_memory_utilization", "rollout.vllm.gpu_memory_utilization", ""),
    (f"{_R}enforce_eager", "rollout.enforce_eager", ""),
    (f"{_R}max_num_seqs", "rollout.max_num_seqs", ""),
    (f"{_R}max_num_batched_tokens", "rollout.max_num_batched_tokens", "prompt tokens of one prefill"),
    (f"{_R}max_model_len", "rollout.vllm.max_model_length", ""),
    (f"{_R}tensor_model_parallel_size", "", "each rank samples with the whole model, or a server does"),
    (f"{_R}log_prob_*", "max_tokens_per_microbatch", _MICRO),
    (f"{_R}calculate_log_probs", "sampling_importance_cap", "sampler's log-probs are always kept"),
    (f"{_R}val_kwargs.n", "eval_num_samples", ""),
    (f"{_R}val_kwargs.temperature", "eval_temperature", ""),
    (f"{_R}val_kwargs.top_p", "eval_top_p", ""),
    (f"{_R}val_kwargs.do_sample", "eval_greedy", "one greedy completion beside the samples"),
    (f"{_R}multi_turn.*", "", "no tools are called while sampling"),
    (f"{_R}*", "rollout.engine", "the engine needs no such setting"),
    ("actor_rollout_ref.*", "--help", "of the command line: --help grpo lists what there is"),
    ("algorithm.adv_estimator", "scale_rewards", f"grpo; {_NO_CRITIC}"),
    ("algorithm.norm_adv_by_std_in_grpo", "scale_rewards", "true: group; false: none"),
    ("algorithm.use_kl_in_reward", "beta", "the KL is a term of the loss"),
    ("algorithm.kl_ctrl.*", "beta", "the KL is a term of the loss, with a fixed factor"),
    ("algorithm.kl_penalty", "kl_estimator", "the KL is a term of the loss"),
    ("algorithm.filter_groups.enable", "dynamic_sampling_refills", "rounds of a step; 0: none"),
    ("algorithm.filter_groups.max_num_gen_batches", "dynamic_sampling_refills", "rounds after the first"),
    ("algorithm.filter_groups.metric", "dynamic_sampling_refills", "of equal reward"),
    ("algorithm.rollout_correction.rollout_is_threshold", "sampling_importance_cap", ""),
    ("algorithm.rollout_correction.*", "sampling_importance_mode", ""),
    ("algorithm.*", "", _NO_CRITIC),
    ("critic.*", "", _NO_CRITIC),
    ("reward_model.enable", "reward_models", "a stage of kind reward_model trains one"),
    ("reward_model.model.path", "reward_models", "reward_models.NAME.model"),
    ("reward_model.overlong_buffer.len", "overlong_buffer_length", ""),
    ("reward_model.overlong_buffer.penalty_factor", "overlong_penalty", ""),
    ("reward_model.overlong_buffer.enable", "overlong_buffer_length", "null: off"),
    ("reward_model.sandbox_fusion.*", "rewards", "programs run on this machine, in a process of their own"),
    ("reward_model.*", "reward_models", ""),
    ("custom_reward_function.*", "rewards", "{NAME: {function: file.py:compute_score}}"),
    ("reward.custom_reward_function.*", "rewards", "{NAME: {function: file.py:compute_score}}"),
    ("reward.num_workers", "reward_workers.num_workers", ""),
    ("trainer.total_epochs", "num_train_epochs", "of a stage"),
    ("trainer.total_training_steps", "max_steps", "of a stage; rollouts, as in verl"),
    ("trainer.project_name", "tracking.project", "for trackers"),
    ("trainer.experiment_name", "tracking.name", "for trackers; name is that of the recipe"),
    ("trainer.logger", "report_to", "metrics.jsonl and the page are always written"),
    ("trainer.log_val_generations", "log_completions", ""),
    ("trainer.nnodes", "", _LAUNCH),
    ("trainer.n_gpus_per_node", "", _LAUNCH),
    ("trainer.save_freq", "save_steps", "of a stage"),
    ("trainer.test_freq", "eval_steps", "of a stage"),
    ("trainer.resume_mode", "--resume", "of the command line"),
    ("trainer.resume_from_path", "--resume", "of the command line, with --output-dir"),
    ("trainer.val_before_train", "eval_before", "of a stage"),
    ("trainer.val_only", "--stages", "a stage of kind evaluate measures a model alone"),
    ("trainer.default_local_dir", "--output-dir", "of the command line"),
    ("trainer.max_actor_ckpt_to_keep", "save_total_limit", "of a stage"),
    ("trainer.rollout_data_dir", "log_completions", "RUN/STAGE/samples/*.parquet"),
    ("trainer.balance_batch", "", "samples are shared out by tokens"),
    ("trainer.critic_warmup", "", _NO_CRITIC),
    ("trainer.device", "", "a GPU where there is one"),
    ("trainer.ray_*", "", "no Ray: torchrun starts the processes"),
    ("ray_kwargs.*", "", "no Ray: torchrun starts the processes"),
    ("ray_init.*", "", "no Ray: torchrun starts the processes"),
    ("global_profiler.*", "", "metrics.jsonl has the time of each phase"),
]  # fmt: skip
