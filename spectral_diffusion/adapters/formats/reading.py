"""LoRA files of other programs, read: kohya's spelling, diffusers' of every age, and PEFT's, with or without a folder.

Embeddings inside a file (``bundle_emb.NAME.clip_l``, of OneTrainer and A1111) are read with its layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from ...core.errors import Fix, UserError, short_repr
from ...core.files import is_folder, parse_json, read_tensors, read_text
from ...linalg import Factors
from .lora import names_of
from .native import is_native

ENDINGS = {  # of a key, after the layer: which factor it is
    "lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up",
}  # fmt: skip
KINDRED = re.compile("hada_|lokr_|lora_|dora_|oft_|diff|on_input|norm|emb")  # in the keys of LoRA's relatives
NAMED = ("adapter_model", "pytorch_lora_weights")  # as PEFT and diffusers call every file of theirs
SUFFIXES = (".safetensors", ".bin")
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(clip_l|clip_g|string_to_param\.\*|emb_params)")
EMBEDDING = re.compile(r"clip_[lg]|emb_params|string_to_param\.\*|<[^<>]+>")  # the keys of textual inversion's files
BARE = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
PEFT = "base_model.model."
COMPONENTS = {
    "UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2",
}  # fmt: skip
SUBTRACTED = ("pissa", "corda", "olora", "mica", "loftq", "lora_ga")  # starts that PEFT takes out of the base's weights
OURS = ("lora_unet_", "lora_te", "unet.", "text_encoder")  # what the names of Stable Diffusion's layers begin with
DIT = "transformer."  # what the names of a transformer's layers begin with
OTHERS = {  # of the names in LoRAs for other networks: whose they are
    r"(lora_unet_|diffusion_model\.)(double|single)_blocks|^transformer\.single_transformer_blocks": "Flux",
    r"(lora_unet_|diffusion_model\.)joint_blocks": "Stable Diffusion 3",
    r"^transformer\.|^lora_transformer_": "Flux or SD3 (transformer.)",
    r"^(lora_unet_|diffusion_model\.)(blocks|layers|transformer_blocks)[._]\d": "a video or diffusion transformer",
}


Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass
class Foreign:
    """The content of another program's LoRA file, in our names.

    Attributes:
        factors: layer to its change, alpha multiplied in; ``kernels`` of convolutions.
        embeddings: a bundled embedding's name to its vectors (n, width) by text encoder.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    kernels: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def lora_file(path: Path) -> Path:
    """The file itself, or the LoRA inside a folder: PEFT's or diffusers', else the only safetensors file.

    Raises:
        UserError: a folder without a LoRA, or with several files.
    """
    path = Path(path)
    if not is_folder(path):
        return path
    named = [file for name in NAMED for suffix in SUFFIXES if (file := path / f"{name}{suffix}").is_file()]
    files = named[:1] or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files) or 'no'} safetensors files; name the LoRA file inside it.")
    return files[0]


def is_foreign(path: Path) -> bool:
    """Whether it is a file that is no adapter of this program, or a folder that PEFT or diffusers made for a LoRA.

    Raises:
        UserError: a file that is no safetensors file at all.
    """
    path = Path(path)
    if is_folder(path):
        return any((path / f"{name}{suffix}").is_file() for name in NAMED for suffix in SUFFIXES)
    return not is_native(path)


def read_lora(path: Path, layers: Iterable[str], convert: Convert | None = None) -> Foreign:
    """The factors of a LoRA file (or of a folder around one), alpha multiplied in, and what it brings along.

    Args:
        layers: the layers of the base, needed to distinguish underscores from dots.
        convert: the reader of the base's family, which gives tensors under diffusers' names.

    Raises:
        UserError: no LoRA file, one of another kind, or one of another base.
    """
    path = lora_file(path)
    tensors, metadata = read_tensors(path)
    if convert:
        tensors = convert(tensors)
    elif other := other_network(tensors, metadata):
        raise UserError(
            f"{path} is a LoRA for {other}, which does not fit this Stable Diffusion base.",
            Fix("base", so="to name one that it fits"),
        )
    lora = Foreign()
    for key in sorted(key for key in tensors if BUNDLED.fullmatch(key)):
        name, which = BUNDLED.fullmatch(key).groups()  # type: ignore[union-attr]
        encoder = "text_encoder_2" if which == "clip_g" else "text_encoder"
        lora.embeddings.setdefault(name, {})[encoder] = torch.atleast_2d(tensors.pop(key).float())
    if any(key.startswith(PEFT) for key in tensors):
        tensors, metadata = from_peft(path, tensors, metadata)
    tensors = renamed(tensors)
    parts = factors_in(path, tensors)
    known, scale = names_of(layers), peft_scale(path, metadata)
    check_layers(path, parts, known, metadata)
    for name, tensors_of_layer in parts.items():
        up, down, alpha = checked(path, name, tensors_of_layer)
        share = scale(name, len(down)) if alpha is None else alpha / len(down)
        up = up * share
        if not math.isfinite(share) or not torch.isfinite(up).all():
            raise UserError(f"{path} is damaged: {name} or its alpha holds NaN or infinity; get it again.")
        if down.dim() == 4:
            lora.kernels[known[name]] = (down.shape[1], down.shape[2], down.shape[3])
        lora.factors[known[name]] = Factors(up.reshape(len(up), -1), down.reshape(len(down), -1))
    return lora


def other_network(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Whose network a LoRA changes if that is none of Stable Diffusion's; else an empty string."""
    for pattern, family in OTHERS.items():
        if any(re.search(pattern, key) for key in keys):
            return metadata.get("modelspec.architecture", "").removesuffix("/lora") or family
    return ""


def from_peft(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """PEFT's own keys and the config beside them, as diffusers' files have both.

    Raises:
        UserError: there is no config, which alone holds alpha, or it is of another method.
    """
    file = path.with_name("adapter_config.json")
    try:
        config = parse_json(read_text(file))
        kind = str(config.get("peft_type", "LORA"))
        network = (config.get("auto_mapping") or {}).get("base_model_class")
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is PEFT's, and its alpha is in adapter_config.json; put that file beside it."
        ) from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read; get it again.") from error
    if kind != "LORA":
        raise UserError(f"{path} is a PEFT adapter of the kind {kind}; only those of the kind LORA can be imported.")
    guess = "text_encoder" if any(".self_attn." in key or ".mlp." in key for key in tensors) else "unet"
    part = COMPONENTS.get(str(network), guess)
    known = {f"{part}.{key}": value for key, value in config.items()}
    renamed = {f"{part}.{key.removeprefix(PEFT)}": value for key, value in tensors.items()}
    return renamed, {**metadata, "lora_adapter_metadata": json.dumps(known)}


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every age of diffusers' spelling as the present one, by its own tables; kohya's stays as it is."""
    whole = {f"unet.{key}" if key.startswith(BARE) else key: value for key, value in tensors.items()}
    texts = {key: value for key, value in whole.items() if key.startswith("text_encoder")}
    first = any(re.search(r"to_(q|k|v|out)_lora\.", key) for key in texts)  # of before diffusers 0.17
    kind = StateDictType.DIFFUSERS_OLD if first else StateDictType.DIFFUSERS
    rest = {key: value for key, value in whole.items() if key not in texts}
    return {**convert_unet_state_dict_to_peft(rest), **convert_state_dict_to_peft(texts, original_type=kind)}


def factors_in(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer, as it is spelled, to its factors and alpha.

    Raises:
        UserError: no LoRA file, or more than that.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    other: list[str] = []
    for key, value in tensors.items():
        ending = next((e for e in ENDINGS if key.endswith(f".{e}")), None)
        if ending is None:
            other.append(key)
            continue
        parts.setdefault(key[: -len(ending) - 1], {})[ENDINGS[ending]] = value
    if not parts and other and all(EMBEDDING.fullmatch(key) for key in other):
        raise UserError(f"{path} is an embedding (textual inversion) and no LoRA; only LoRA files can be imported.")
    if not parts and not any(KINDRED.search(key) for key in other):
        raise UserError(f"{path} is not a LoRA file: it holds neither lora_down nor lora_A tensors.")
    if other:  # norms, biases, embeddings, LyCORIS' other kinds: without them it would not be what it is
        raise UserError(f"{path} is no plain LoRA (it holds {other[0]}); only LoRA and LoCon files can be imported.")
    return parts


def check_layers(path: Path, names: Collection[str], known: Collection[str], metadata: Mapping[str, str]) -> None:
    """Refuse layers that a base does not have.

    Raises:
        UserError: there are some.
    """
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    if not any(name.startswith(OURS) for name in names) or any(name.startswith(DIT) for name in known):
        raise UserError(f"{path} is a LoRA for another kind of network: this base has no layer {unknown[0]}.")
    xl = any(re.match(r"lora_te2_|text_encoder_2\.|lora_unet_input_blocks", name) for name in names)
    says = metadata.get("modelspec.architecture", "Stable Diffusion XL" if xl else "").removesuffix("/lora")
    raise UserError(
        f"{path} is a LoRA for another base{f' ({says})' if says else ''}: {len(unknown)} of its {len(names)} layers "
        f"are not in this one, {unknown[0]} among them.",
        Fix("base", so="to name the right one"),
    )


def checked(path: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float | None]:
    """A layer's up, down and alpha, float32.

    Raises:
        UserError: they are no whole and finite pair of factors.
    """
    if not {"up", "down"} <= set(tensors):
        raise UserError(f"{path} is damaged: {name} lacks one of its two factors; get it again.")
    up, down = tensors["up"].float(), tensors["down"].float()
    if up.dim() not in (2, 4) or down.dim() != up.dim() or up.shape[1] != len(down) or not len(down):
        raise UserError(f"{path} is damaged: the factors of {name} do not fit each other; get it again.")
    alpha = tensors.get("alpha", torch.ones(()))
    if alpha.numel() != 1 or not all(torch.isfinite(t).all() for t in (up, down, alpha)):
        raise UserError(f"{path} is damaged: {name} holds NaN, infinity or no single alpha; get it again.")
    if down.dim() == 4 and tuple(up.shape[2:]) != (1, 1):
        raise UserError(f"{path} is no plain LoRA: the up factor of {name} is no 1×1 convolution.")
    return up, down, float(alpha) if "alpha" in tensors else None


def peft_scale(path: Path, metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """The scale of a layer of a rank: alpha / rank from the configs in diffusers' ``lora_adapter_metadata``, else 1.

    Raises:
        UserError: they cannot be read, name layers by regular expressions (a file from elsewhere may bring one that
            never ends), or name factors that only fit weights without their initialization.
    """
    try:
        config: dict[str, Any] = dict(parse_json(metadata.get("lora_adapter_metadata", "{}")))
        if "lora_alpha" in config:  # of a U-Net saved alone
            config = {f"unet.{key}": value for key, value in config.items()}
        alphas = {key.rpartition(".")[0]: float(value) for key, value in config.items() if key.endswith(".lora_alpha")}
        given = {part: dict(config.get(f"{part}.alpha_pattern") or {}) for part in alphas}
        named = {part: {key: float(alpha) for key, alpha in pattern.items()} for part, pattern in given.items()}
        starts = {str(config.get(f"{part}.init_lora_weights")) for part in alphas}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its lora_adapter_metadata cannot be read; get it again.") from error
    if start := next((text for text in sorted(starts) if text.lower().startswith(SUBTRACTED)), None):
        raise UserError(
            f"{path} fits only a base without its start ({start}); save it as a plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    ends = {part: ends_of_names(path, pattern) for part, pattern in named.items()}

    def scale(name: str, rank: int) -> float:
        part, _, layer = name.partition(".")
        if part not in alphas:
            return 1.0
        parts = layer.split(".")
        tails = ["^" + layer, *(".".join(parts[start:]) for start in range(len(parts)))]
        matches = [ends[part][tail] for tail in tails if tail in ends[part]]
        alpha = min(matches)[1] if matches else alphas[part]  # of several PEFT takes the first
        return alpha / (rank**0.5 if config.get(f"{part}.use_rslora") else rank)

    return scale


def ends_of_names(path: Path, alphas: Mapping[str, float]) -> dict[str, tuple[int, float]]:
    """PEFT's ``alpha_pattern``: the end of a layer's name to its place in the file and its alpha.

    A name with ``^`` before it is whole.

    Raises:
        UserError: a pattern that is more than a name.
    """
    alpha_of = {}
    for position, (key, alpha) in enumerate(alphas.items()):
        name = key.removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"\^?[\w.-]+", name):
            raise UserError(
                f"{path} names layers by a regular expression in its alpha_pattern, {short_repr(key)}, which is not "
                "read here; save it with the layers' names."
            )
        alpha_of[name] = (position, alpha)
    return alpha_of
