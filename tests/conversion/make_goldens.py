"""What `transformers` computes for small random models: stored as goldens, or on demand.

Runs under a Python with torch and transformers (`make test-parity` makes one; it needs nothing of
this project) and takes one of

    make_goldens.py goldens             rewrite goldens.npz beside this file
    make_goldens.py save DIRECTORY SEED a checkpoint of every configuration, each with logits.npy
    make_goldens.py logits DIRECTORY... load these checkpoints and write logits.npy into each

The goldens hold configurations, tensor names and shapes, and logits; the tensors themselves come
from a seed. Ordinary tests import the constants and `tensors`, which need numpy alone.
"""

# pyright: reportMissingImports=false

import json
import sys
import warnings
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).with_name("goldens.npz")
VOCAB, LENGTH = 41, 24
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
_SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
          "num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 64}  # fmt: skip

LLAMA = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 12, "num_key_value_heads": 2},
    "narrow-heads": {"head_dim": 4, "num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_theta": 500_000.0},
    "llama3-rope": {"rope_scaling": _LLAMA3},
    "llama3-all": {"rope_scaling": {**_LLAMA3, "factor": 32.0}, "rope_theta": 500_000.0,
                   "num_key_value_heads": 2, "tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 1e-2},
    "one-layer": {"num_hidden_layers": 1},
    "five-layers": {"num_hidden_layers": 5, "intermediate_size": 37},
    "six-heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
                  "hidden_size": 48},
}  # fmt: skip
GPT_NEOX = {
    "plain": {},
    "sequential": {"use_parallel_residual": False},
    "rotary-all": {"rotary_pct": 1.0},
    "rotary-half": {"rotary_pct": 0.5},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rotary_emb_base": 500_000.0, "rotary_pct": 1.0},
    "epsilon": {"layer_norm_eps": 1e-2},
    "one-head": {"num_attention_heads": 1},
    "eight-heads": {"num_attention_heads": 8, "rotary_pct": 1.0},
    "one-layer": {"num_hidden_layers": 1, "use_parallel_residual": False},
    "five-layers": {"num_hidden_layers": 5, "intermediate_size": 37},
    "sequential-all": {"use_parallel_residual": False, "rotary_pct": 1.0,
                       "tie_word_embeddings": True, "layer_norm_eps": 1e-3},
    "llama3-rope": {"rotary_pct": 1.0, "rope_scaling": _LLAMA3},
}  # fmt: skip


def tokens(vocab_size=VOCAB):
    """The input `[1, LENGTH]` of every comparison."""
    return np.random.RandomState(7).randint(0, vocab_size, (1, LENGTH))


def tensors(shapes, seed=0):
    """Random float32 tensors by name; `RandomState` draws the same in every version of numpy."""
    random, made = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        values = random.standard_normal(shapes[name]).astype(np.float32)
        if len(shapes[name]) == 1:
            values = 0.2 * values + ("norm" in name and name.endswith("weight"))
        elif "embed_tokens" not in name and "embed_in" not in name:
            values = values / np.sqrt(shapes[name][1])
        made[name] = values.astype(np.float32)
    return made


def _models(seed):
    """Name and model of every configuration."""
    import torch
    import transformers

    families = (
        ("llama", transformers.LlamaConfig, LLAMA),
        ("gpt_neox", transformers.GPTNeoXConfig, GPT_NEOX),
    )
    for family, config_class, variants in families:
        for variant, changes in variants.items():
            config = config_class(**{**_SIZES, **changes})
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager"
            )
            # Some versions call the output projection otherwise in memory than in files.
            disk = {"gpt_neox": "embed_out.weight"}.get(family, "lm_head.weight")
            names = {k: disk if k in _OUTPUTS else k for k in model.state_dict()}
            shapes = {names[k]: tuple(v.shape) for k, v in model.state_dict().items()}
            if config.tie_word_embeddings:
                del shapes[disk]
            values = tensors(shapes, seed)
            state = {k: torch.from_numpy(values[n]) for k, n in names.items() if n in values}
            missing, unexpected = model.load_state_dict(state, strict=False)
            assert set(missing) <= set(_OUTPUTS), missing
            assert not unexpected, unexpected
            yield f"{family}/{variant}", model, shapes


_OUTPUTS = ("lm_head.weight", "embed_out.weight")


def _logits(model):
    import torch

    model.eval()
    with torch.no_grad():
        ids = torch.from_numpy(tokens(model.config.vocab_size))
        return model(ids).logits.numpy().astype(np.float32)


def _goldens():
    stored = {}
    for name, model, shapes in _models(seed=0):
        stored[f"{name}/config"] = np.array(model.config.to_json_string())
        stored[f"{name}/shapes"] = np.array(json.dumps(shapes))
        stored[f"{name}/logits"] = _logits(model)
    np.savez_compressed(GOLDENS, **stored)
    print(f"{GOLDENS}: {len(stored) // 3} models, {GOLDENS.stat().st_size} bytes")


def _save(directory, seed):
    for name, model, _ in _models(seed):
        # Shards of a few tensors each, so that the index is read too.
        model.save_pretrained(directory / name, max_shard_size="12KB")
        np.save(directory / name / "logits.npy", _logits(model))


def _load(directories):
    import transformers

    for directory in directories:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", dtype="float32", output_loading_info=True
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[problem], info
        np.save(directory / "logits.npy", _logits(model))


def main():
    warnings.simplefilter("ignore")
    command, *arguments = sys.argv[1:] or ["?"]
    if command == "goldens" and not arguments:
        _goldens()
    elif command == "save" and len(arguments) == 2:
        _save(Path(arguments[0]), int(arguments[1]))
    elif command == "logits" and arguments:
        _load([Path(argument) for argument in arguments])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
