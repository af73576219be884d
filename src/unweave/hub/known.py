"""Every format, in the order in which they are tried: first those that a file's name tells, last those of any `.pt`."""

from __future__ import annotations

from unweave.hub import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    hook_z,
    linear_layers,
    llama_scope,
    llamascopium,
    openai,
    overcomplete,
    qwen_scope,
    saelens,
    saelens_legacy,
    saev,
    sparsify,
    temporal,
)
from unweave.hub.reader import Format
from unweave.hub.saelens import SCALE

FORMATS = (
    Format(
        "saelens_legacy", "cfg.json and sae_weights.safetensors of SAELens 3 to 5",
        saelens_legacy.matches, saelens_legacy.read, (SCALE,),
    ),
    Format(
        "saelens", "cfg.json and sae_weights.safetensors",
        saelens.matches, saelens.read, (SCALE,), saelens.write,
    ),
    Format("sparsify", "cfg.json and sae.safetensors", sparsify.matches, sparsify.read, (), sparsify.write),
    Format("gemma_scope", "params.npz", gemma_scope.matches, gemma_scope.read),
    Format(
        "gemma_scope_2", "params.safetensors, or a folder of params_layer_N.safetensors",
        gemma_scope_2.matches, gemma_scope_2.read,
    ),
    Format(
        "llama_scope", "hyperparams.json and checkpoints/final.safetensors",
        llama_scope.matches, llama_scope.read,
    ),
    Format(
        "llamascopium", "config.json with sae_type, and sae_weights.safetensors or .pt",
        llamascopium.matches, llamascopium.read,
    ),
    Format(
        "llama_scope_r1_distill", "config.json and sae_weights.safetensors with encoder.weight",
        llama_scope.matches_distilled, llama_scope.read_distilled, (SCALE,),
    ),
    Format(
        "circuit_tracer", "layer_N.safetensors, or a folder of W_enc_N.safetensors and W_dec_N.safetensors",
        circuit_tracer.matches, circuit_tracer.read, ("layer", "k"), circuit_tracer.write,
    ),
    Format("temporal", "conf.yaml and latest_ckpt.safetensors", temporal.matches, temporal.read, (SCALE,)),
    Format("qwen_scope", "layerN.sae.pt", qwen_scope.matches, qwen_scope.read, ("k",)),
    Format(
        "dictionary_learning", "ae.pt and config.json",
        dictionary_learning.matches, dictionary_learning.read, ("dict_class", "k"), dictionary_learning.write,
    ),
    Format("e2e_sae", "final_config.yaml and a .pt", linear_layers.matches_e2e, linear_layers.read_e2e, ("position",)),
    Format("hook_z", "NAME.pt and NAME_cfg.json", hook_z.matches, hook_z.read),
    Format(
        "saev", "a .pt that begins with a line of JSON",
        saev.matches, saev.read, ("mean", "scale", "normalized"), saev.write,
    ),
    Format("openai", "a .pt with pre_bias and latent_bias", openai.matches, openai.read),
    Format(
        "goodfire", "a .pt or .pth with encoder_linear",
        linear_layers.matches_goodfire, linear_layers.read_goodfire,
    ),
    Format(
        "deepseek_r1", "a .pt with encoder.weight",
        linear_layers.matches_deepseek_r1, linear_layers.read_deepseek_r1,
    ),
    Format(
        "overcomplete", "a .pt with dictionary._weights",
        overcomplete.matches, overcomplete.read,
        ("activation", "normalization"),
    ),
)  # fmt: skip
