"""SAELens: ``cfg.json`` beside ``sae_weights.safetensors``, of version 6 (``metadata``) and before (flat keys)."""

from __future__ import annotations

from pathlib import Path

from steer_compile.errors import SAEError
from steer_compile.runtime.vectors import SiteKey
from steer_compile.sae.activation import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from steer_compile.sae.layouts.base import (
    Config,
    Layout,
    Tensors,
    Wanted,
    check_size,
    file_site,
    read_json,
    read_safetensors,
    unit_decoder,
)
from steer_compile.sae.model import SAE
from steer_compile.sae.normalise import FactorNorm, LayerNorm, NoNorm, Normalisation

_HARMLESS = frozenset(
    """dtype device model_name model_class_name model_from_pretrained_kwargs model_kwargs hook_layer hook_point_layer
    context_size prepend_bos exclude_special_tokens neuronpedia_id dataset_path dataset_trust_remote_code seqpos_slice
    sae_lens_version sae_lens_training_version hf_hook_name release sae_id
    is_dataset_tokenized streaming use_cached_activations cached_activations_path from_pretrained_path expansion_factor
    b_dec_init_method decoder_init_norm decoder_orthogonal_init decoder_heuristic_init init_encoder_as_decoder_transpose
    normalize_sae_decoder noise_scale l1_coefficient l1_warm_up_steps l0_coefficient l0_warm_up_steps lp_norm
    mse_loss_normalization use_ghost_grads scale_sparsity_penalty_by_decoder_norm jumprelu_init_threshold
    jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale pre_act_loss_coefficient aux_loss_coefficient
    topk_threshold_lr use_sparse_activations tokens_per_buffer n_batches_in_buffer training_tokens finetuning_tokens
    store_batch_size store_batch_size_prompts train_batch_size train_batch_size_tokens autocast autocast_lm compile_llm
    llm_compilation_mode compile_sae sae_compilation_mode seed adam_beta1 adam_beta2 lr lr_scheduler_name
    lr_warm_up_steps lr_end lr_decay_steps n_restart_cycles finetuning_method feature_sampling_window
    dead_feature_window dead_feature_threshold dead_feature_estimation_method n_eval_batches eval_batch_size_prompts
    log_to_wandb log_activations_store_to_wandb log_optimizer_state_to_wandb wandb_project wandb_id run_name
    wandb_entity wandb_log_frequency eval_every_n_wandb_logs resume n_checkpoints checkpoint_path output_path verbose
    act_store_device tokens_per_buffer hook_head_index_out d_head""".split()
)
_ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk")


def _read(path: Path, folder: Path, wanted: Wanted) -> SAE:
    config, tensors = read_json(folder / "cfg.json"), read_safetensors(path)
    w_enc = tensors.matrix("W_enc")
    width, count = w_enc.shape
    check_size(path, w_enc, wanted, config.whole("d_in", width), config.whole("d_sae", count))
    architecture = _architecture(config)
    b_enc = tensors.take("b_gate" if architecture == "gated" else "b_enc", (count,))
    w_dec, b_dec = tensors.take("W_dec", (count, width)), tensors.take("b_dec", (width,))
    activation = _activation(architecture, config, tensors, count, wanted.ignore)
    if config.flag("rescale_acts_by_decoder_norm", False):
        _refuse_thresholds(config, activation)
        w_enc, b_enc, w_dec = unit_decoder(path, w_enc, b_enc, w_dec)
    tensors.ones("scaling_factor", "finetuning_scaling_factor")
    normalisation, site = _normalisation(config, wanted), _site(config, wanted)
    config.only("finetuning_scaling_factor", False)
    config.only("reshape_activations", "none")
    subtract = config.flag("apply_b_dec_to_input", True)
    config.done(_HARMLESS, wanted.ignore)
    tensors.done(wanted.ignore)
    return SAE(
        W_enc=w_enc, b_enc=b_enc, W_dec=w_dec, b_dec=b_dec, activation=activation, normalisation=normalisation,
        subtract_b_dec=subtract, site=site, name=wanted.name or folder.name, source=str(path),
    )  # fmt: skip


def _architecture(config: Config) -> str:
    architecture = config.get("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        raise SAEError(f"{config.path}: 'architecture' is {architecture!r}; supported are {', '.join(_ARCHITECTURES)}")
    name = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    config.get("activation_fn")
    if architecture == "standard" and name == "topk":  # before version 6 it was an activation of its own
        return "topk"
    if name != "relu" and (architecture, name) not in (("topk", "topk"), ("batchtopk", "batchtopk")):
        raise SAEError(f"{config.path}: the activation {name!r} of {architecture!r} is unknown; supported: relu, topk")
    return str(architecture)


def _activation(architecture: str, config: Config, tensors: Tensors, count: int, ignore: frozenset[str]) -> Activation:
    arguments = config.part("activation_fn_kwargs")
    k = arguments.get("k", config.get("k"))
    arguments.done((), ignore)
    if architecture == "gated":
        return Gated(tensors.take("r_mag", (count,)), tensors.take("b_mag", (count,)))
    if architecture == "jumprelu":
        return JumpReLU(tensors.take("threshold", (count,)))
    if architecture == "standard":
        return ReLU()
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise SAEError(f"{config.path}: 'k' is {k!r}; {architecture} takes a number of features")
    if architecture == "topk":
        return TopK(int(k) if k == int(k) else k)  # type: ignore[arg-type]  # checked by TopK
    return BatchTopK(float(k), tensors.number("topk_threshold") if "topk_threshold" in tensors else None)


def _refuse_thresholds(config: Config, activation: Activation) -> None:
    """Thresholds and gates are not known to be in units of rescaled activations."""
    if not isinstance(activation, TopK | BatchTopK):
        raise SAEError(
            f"{config.path}: 'rescale_acts_by_decoder_norm' with {activation.kind!r} is not supported; "
            "it is with topk and batchtopk"
        )


def _normalisation(config: Config, wanted: Wanted) -> Normalisation:
    kind = config.get("normalize_activations", "none")
    if isinstance(kind, bool):
        kind = "expected_average_only_in" if kind else "none"
    if kind == "none":
        return NoNorm()
    if kind == "layer_norm":
        return LayerNorm()
    if kind != "expected_average_only_in":
        raise SAEError(
            f"{config.path}: 'normalize_activations' is {kind!r}; supported are 'none', 'expected_average_only_in' and "
            "'layer_norm'"
        )
    if wanted.norm_factor is None:
        raise SAEError(
            f"{config.path}: 'normalize_activations' is {kind!r}, and the factor is not in the file; give "
            "norm_factor=sqrt(d_model) / the average norm of the rows it was trained on"
        )
    return FactorNorm(wanted.norm_factor)


def _site(config: Config, wanted: Wanted) -> SiteKey | None:
    """Where it belongs, from ``metadata`` or from the flat keys."""
    metadata, hooks = config.part("metadata"), []
    for each in (metadata, config):
        each.only("hook_head_index")
        hooks += [each.get("hook_name", ""), each.get("hook_point", "")]
        each.only("hook_name_out", *hooks)  # a transcoder writes elsewhere
    return file_site(config.path, next((str(hook) for hook in hooks if hook), ""), wanted)


LAYOUT = Layout("SAELens", ("sae_weights.safetensors",), "cfg.json", _read)
