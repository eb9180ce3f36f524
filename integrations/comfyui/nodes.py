"""ComfyUI nodes, thin over the library: use adapters without exporting them, bind them to places, fuse them.

``comfy`` and ``folder_paths`` are ComfyUI's own modules.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.sd
import comfy.utils
import folder_paths

import spectral_diffusion as sd
from spectral_diffusion.adapters.adapter import shared_columns
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.merging.export import export
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.merges.registry import all_merges
from spectral_diffusion.models.families import family_named

log = logging.getLogger(__name__)
CATEGORY = "spectral_diffusion"
KIND = "spectral_adapters"  # models/spectral_adapters
LOADED = "spectral_adapters"  # in a model's options: which adapters act on it

folder_paths.add_model_folder_path(KIND, str(Path(folder_paths.models_dir) / KIND))
WORDS = Path(folder_paths.get_temp_directory()) / "spectral_words"  # embeddings of the adapters' words
folder_paths.add_model_folder_path("embeddings", str(WORDS))

_converted: dict[tuple[str, int], tuple[sd.Adapter, dict[str, Any]]] = {}


def word_of(stem: str, token: str) -> str:
    """The name of the embedding of a word: that of the adapter's file, and the word if it is another."""
    word = token.strip("<>")
    return f"spectral_{stem}" if word == stem else f"spectral_{stem}_{word}"


def opened(name: str) -> tuple[sd.Adapter, dict[str, Any]]:
    """An adapter and its change as the tensors of a LoRA file; converted once as long as the file stays the same.

    Its words go into a folder of embeddings, where prompts find them: see :func:`word_of`.

    Raises:
        UserError: no adapter, or its base is needed and not here.
    """
    path = Path(folder_paths.get_full_path_or_raise(KIND, name))
    key = (str(path), path.stat().st_mtime_ns)
    if key not in _converted:
        adapter = sd.Adapter.from_pretrained(path)
        WORDS.mkdir(parents=True, exist_ok=True)
        file = WORDS.parent / f"spectral-{path.stem}-{key[1]}.safetensors"
        for written in adapter.export(file, format="comfyui"):
            for token in adapter.vectors and adapter.tokens:
                if written.name == f"{file.stem}.{token.strip('<>')}.safetensors":
                    written.replace(WORDS / f"{word_of(path.stem, token)}.safetensors")
        _converted[key] = adapter, comfy.utils.load_torch_file(str(file), safe_load=True)
    return _converted[key]


def worded(text: str, adapter: sd.Adapter, name: str) -> str:
    """A prompt in which the concept's token is what ComfyUI knows it by: an embedding, or a trigger of plain words."""
    for token in adapter.tokens:
        known = f"embedding:{word_of(Path(name).stem, token)}" if adapter.vectors else adapter.trigger
        text = text.replace(token, known or token)
    return text


def check_slots(model: Any, adapter: sd.Adapter) -> None:
    """Warn where an adapter that acts on the model already has columns of this one's slot."""
    for other in model.model_options.get(LOADED, ()):
        if shared_columns(adapter, other):
            log.warning(
                "'%s' (%s) and '%s' (%s) share columns; they will disturb each other.",
                other.name, other.slot, adapter.name, adapter.slot,
            )  # fmt: skip


def number(text: str) -> float:
    """A strength; 1 where none is given.

    Raises:
        UserError: no number.
    """
    try:
        return float(text.strip() or 1)
    except ValueError:
        raise sd.UserError(f"'{text.strip()}' is no strength; write a line such as rex.safetensors = 0.8.") from None


class SpectralAdapter:
    """Let an adapter act on a model, each in the slot it was trained in."""

    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "word")
    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        strength = {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL",), "clip": ("CLIP",), "adapter": (folder_paths.get_filename_list(KIND),),
                "strength": ("FLOAT", strength),
            }
        }  # fmt: skip

    def load(self, model: Any, clip: Any, adapter: str, strength: float) -> tuple[Any, Any, str]:
        """The model and the text encoder with the adapter, and the concept's word for prompts."""
        opened_adapter, lora = opened(adapter)
        check_slots(model, opened_adapter)
        model_with, clip_with = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)
        model_with.model_options[LOADED] = (*model.model_options.get(LOADED, ()), opened_adapter)
        return model_with, clip_with, worded(opened_adapter.token, opened_adapter, adapter)


class SpectralRegion:
    """A prompt for one place of the picture, where one adapter acts and nowhere else."""

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "encode"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        return {
            "required": {
                "clip": ("CLIP",), "adapter": (folder_paths.get_filename_list(KIND),), "mask": ("MASK",),
                "prompt": ("STRING", {"multiline": True, "default": "a photo of <token>"}),
                "negative": ("STRING", {"multiline": True, "default": ""}),
                "strength": ("FLOAT", {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05}),
            },
            "optional": {"positive_before": ("CONDITIONING",), "negative_before": ("CONDITIONING",)},
        }  # fmt: skip

    def encode(
        self, clip: Any, adapter: str, mask: Any, prompt: str, negative: str, strength: float,
        positive_before: Any = None, negative_before: Any = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Both prompts under the mask, with the adapter's change as a hook; those of other regions before them."""
        opened_adapter, lora = opened(adapter)
        _, encoder = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, strength)
        texts = [text.replace("<token>", opened_adapter.token) for text in (prompt, negative)]
        texts = [worded(text, opened_adapter, adapter) for text in texts]
        encoded = [encoder.encode_from_tokens_scheduled(encoder.tokenize(text)) for text in texts]
        hooks = comfy.hooks.create_hook_lora(lora, strength, 0.0)
        placed = comfy.hooks.set_mask_conds(
            conds=encoded, strength=1.0, set_cond_area="default", opt_mask=mask, opt_hooks=hooks
        )
        before = (positive_before or [], negative_before or [])
        return tuple([*earlier, *own] for earlier, own in zip(before, placed, strict=True))  # type: ignore[return-value]


class SpectralFuse:
    """Fuse adapters into one checkpoint or one LoRA, which every loader opens."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    FUNCTION = "fuse"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        example = "rex.safetensors = 1.0\nmug.safetensors = 0.8"
        return {
            "required": {
                "adapters": ("STRING", {"multiline": True, "default": example}),
                "base": ("STRING", {"default": "", "tooltip": "Empty: the base that the adapters name."}),
                "merge": (sorted(all_merges()), {"default": "gradient"}),
                "distill_steps": ("INT", {"default": 0, "min": 0, "max": 10000}),
                "kind": (["checkpoint", "lora"],),
                "name": ("STRING", {"default": "fused"}),
            }
        }

    def fuse(self, adapters: str, base: str, merge: str, distill_steps: int, kind: str, name: str) -> tuple[str]:
        """Write NAME.safetensors into ``models/checkpoints`` or ``models/loras``; returns its name for a loader.

        Raises:
            UserError: the file is there already, or the adapters cannot be fused.
        """
        folder = Path(folder_paths.get_folder_paths("checkpoints" if kind == "checkpoint" else "loras")[0])
        output = folder / f"{Path(name).name}.safetensors"
        if output.exists():
            raise sd.UserError(f"There is a file {output.name} already; choose another name.")
        files: list[Path] = []
        scales: dict[str, float] = {}
        for line in filter(None, map(str.strip, adapters.splitlines())):
            file, _, scale = line.partition("=")
            files.append(Path(folder_paths.get_full_path_or_raise(KIND, file.strip())))
            opened_adapter = sd.Adapter.from_pretrained(files[-1])
            scales[opened_adapter.name] = number(scale)
            family = family_named(opened_adapter.family)
            if kind == "checkpoint" and family and not family.supports_checkpoint:
                raise sd.UserError(f"{family.title} has no single checkpoint to write; choose lora.")
        if not files:
            raise sd.UserError("Name the adapters to fuse, one per line.")
        # A LoRA of a distilled fusion needs corrections of low rank.
        distill = {"steps": distill_steps, **({"rank": 16, "learning_rate": 1e-3} if kind == "lora" else {})}
        fused = Path(folder_paths.models_dir) / "spectral_fused" / Path(name).name
        config = FuseConfig(
            adapters=files, output=fused, base=base or None, merge=merge, scales=scales, distill=distill
        )
        fuse_to_folder(config, sd.Hooks(notify=log.info))
        try:
            written = export(fused, output, "checkpoint" if kind == "checkpoint" else "comfyui")
        except sd.UserError as error:
            raise sd.UserError(
                f"{error.message} The fusion itself is kept as a diffusers folder in {fused}."
            ) from error
        shutil.rmtree(fused)
        words = Path(folder_paths.get_folder_paths("embeddings")[0])
        for file in written:  # the concepts' words are embeddings beside it: <output>.<word>.safetensors
            word = words / f"{output.stem}_{file.name.removeprefix(f'{output.stem}.')}"
            if file != output and file.suffix == ".safetensors":
                words.mkdir(parents=True, exist_ok=True)
                shutil.move(file, word)
        return (output.name,)


NODE_CLASS_MAPPINGS = {
    "SpectralAdapter": SpectralAdapter,
    "SpectralRegion": SpectralRegion,
    "SpectralFuse": SpectralFuse,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SpectralAdapter": "Load Spectral Adapter",
    "SpectralRegion": "Spectral Adapter in a Region",
    "SpectralFuse": "Fuse Spectral Adapters",
}
