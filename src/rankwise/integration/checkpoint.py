"""Reading models from disk or hub, and writing result folders whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from rankwise import launcher
from rankwise.errors import RankwiseError, is_out_of_memory, reason
from rankwise.integration.files import (
    judge_config,
    no_safetensors,
    read_json,
    refuse_foreign_weights,
    refuse_odd_files,
)
from rankwise.integration.quantizer import METHOD, RankwiseConfig, RankwiseQuantizer
from rankwise.layers.precision import is_finite
from rankwise.run_folder import flush, set_rights

logger = logging.getLogger(__name__)
TOKENIZERS = ("token*", "vocab*", "merges.txt", "spiece*", "sentencepiece*", "*.model")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = {None, "eager", "sdpa", "flex_attention"}  # what torch itself brings; others may be code from the hub


def load_config(path: str | Path) -> Any:
    """The model's config. Raises `RankwiseError` where there is no such model, or none that transformers itself knows."""
    refuse_odd_files(path)
    generation = Path(path, "generation_config.json")
    if os.path.isfile(generation) and not isinstance(read_json(generation), dict):  # transformers would go on without it
        raise RankwiseError(f"{generation} is not an object")
    settings: Any = {}
    try:
        with _quiet():
            settings, _ = PreTrainedConfig.get_config_dict(path)
            judge_config(path, settings)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except RankwiseError:
        raise
    except Exception as error:  # a broken config fails in as many ways as there are models
        if isinstance(settings, dict) and "auto_map" in settings:
            raise _own_code(path) from None
        if os.path.isfile(os.path.join(path, "config.json")):
            raise RankwiseError(f"cannot load {path}: its config.json: {reason(error)}") from None
        message = f"no such model: {str(path)!r} is neither a model folder nor a model's name ({reason(error)})"
        raise RankwiseError(message) from None
    dtype = getattr(config, "dtype", None)
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise RankwiseError(f"{path}: in its config.json, dtype={dtype!r} is no dtype of weights")
    if getattr(config, "architectures", None) and class_of(config) is None:
        if "auto_map" in settings:
            raise _own_code(path)
        raise RankwiseError(
            f"{path} is a {config.architectures[0]}, which transformers {transformers.__version__} does not have for the "
            f"model_type {config.model_type!r}"
        )
    others = {part._attn_implementation for part in _parts(config)} - ATTENTION
    if others:
        logger.warning("%s asks for the attention %s: torch's own is taken", path, ", ".join(sorted(map(str, others))))
        config._attn_implementation = None
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0  # RWKV divides its weights as it first runs, and would again once these are loaded
    if hasattr(config, "auto_map"):
        del config.auto_map  # transformers' own class serves, and the result has no other
    return config


def _own_code(path: str | Path) -> RankwiseError:
    return RankwiseError(
        f"{path} brings code of its own (auto_map in its config.json), which is never run: take a model whose class is in "
        "transformers, or load it yourself and give compress() the model in memory"
    )


def quantization_of(config: Any) -> dict[str, Any]:
    """The quantization config of a config as a dict, empty for a dense model."""
    quantization = getattr(config, "quantization_config", None) or {}
    return quantization if isinstance(quantization, dict) else quantization.to_dict()


def refuse_elsewhere(model: object) -> None:
    """Raises `RankwiseError` for what cannot be compressed in place of a model: a wrapper, a compiled one, weights elsewhere."""
    if model is None or isinstance(model, str | Path):
        return
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise RankwiseError(
            f"{name} is not a transformers model: give the one inside it (of a compiled model "
            "`_orig_mod`, of a parallel one `module`, of PEFT's `merge_and_unload()`)",
        )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise RankwiseError(
            f"the {name} is compiled, which hides what is inside: give the model from before compiling",
        )
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RankwiseError(
                f"the weight {path} is not in memory (offloaded?): give compress() the model's path, and --memory"
            )
        if parameter.is_inference():
            raise RankwiseError(f"the weight {path} takes no gradients: load the model outside of torch.inference_mode()")


def method_of(config: Any) -> str | None:
    """The quantization method of a config, or None for a dense model."""
    quantization = quantization_of(config)
    return str(quantization.get("quant_method")) if quantization else None


def refuse_compressed(path: str | Path, config: Any) -> None:
    """Raises `RankwiseError` for a model that is compressed or quantized already."""
    method = method_of(config)
    if method == METHOD:
        raise RankwiseError(f"{path} is already compressed by rankwise: compress the original, or densify it first")
    if method is not None:
        loads: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method, object)
        ways = ["compress the original model, then quantize the result"]
        if "dequantize" in inspect.signature(loads).parameters:  # some are published so and no other way
            ways.append(f"load it with quantization_config={loads.__name__}(dequantize=True) and compress() it in memory")
        raise RankwiseError(f"{path} is quantized ({method}): {', or '.join(ways)}")


def class_of(config: Any) -> Any:
    """The class that the config names. Where transformers has none of that name for the config's type, it is the
    one for that type with the same head; None where there is none either."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if not name:
        return None
    cls = getattr(transformers, name, None)
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and isinstance(config, cls.config_class or ()):
        return cls
    head = name[max(name.rfind("For"), 0) :]
    mappings = (getattr(auto, "_model_mapping", None) for auto in vars(modeling_auto).values() if isinstance(auto, type))
    found = (mapping.get(type(config), None) for mapping in mappings if mapping is not None)
    return next((cls for cls in found if isinstance(cls, type) and cls.__name__.endswith(head)), None)


def _parts(config: Any) -> Iterator[Any]:
    """The config and those within it."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _parts(part)


def skeleton(config: Any, cls: Any = None) -> PreTrainedModel:
    """The dense model of `config` without its weights, by default of the class that it names.

    Raises `RankwiseError` where it makes no model.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls = cls or class_of(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config) if cls is None else cls(config)
    except Exception as error:  # as many ways as there are models
        raise RankwiseError(f"the config.json makes no model: {reason(error)}") from None


def refuse_other_than_its_config(model: PreTrainedModel) -> None:
    """Raises `RankwiseError` where a model in memory is not what its config makes: its folder would load as
    something else."""
    made, own = (
        {name: list(parameter.shape) for name, parameter in m.named_parameters(remove_duplicate=False)}
        for m in (skeleton(model.config, type(model)), model)
    )
    name = next((name for name in (*made, *own) if made.get(name) != own.get(name)), None)
    if name is None:
        return
    found, said = (shapes.get(name, "not there") for shapes in (own, made))
    way = "give its config the sizes that it has"
    if any(".base_layer." in name for name in own):
        way = "merge the adapter first (merge_and_unload)"
    elif "not there" in (found, said) and re.search(r"\.\d+\.", name):
        way += f" (config.num_hidden_layers says {model.config.get_text_config().num_hidden_layers})"
    raise RankwiseError(
        f"the model is not the one its config describes: {name} is {found} in the model and "
        f"{said} by the config. To go on, {way}",
    )


def refuse_foreign(folder: Path, config: Any) -> None:
    """Raises `RankwiseError` where a local folder's weights cannot be those that its config describes. Reads no tensor."""
    model = skeleton(config)
    if method_of(config) == METHOD:
        try:
            quantization = RankwiseConfig.from_dict(quantization_of(config))
            RankwiseQuantizer(quantization)._process_model_before_weight_loading(model)
        except ValueError as error:
            raise RankwiseError(f"cannot load {folder}: {reason(error)}") from None
    refuse_foreign_weights(folder, model)


def load_model(path: str | Path, config: Any, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """The model with the head its config names, on `device` ("auto": the GPU where there is one), in eval mode.

    Raises `RankwiseError` for weights that are missing, left over, not finite or unreadable.
    """
    if dtype not in DTYPES:
        raise RankwiseError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    target = resolve_device(device)
    cls: Any = class_of(config) or AutoModelForCausalLM
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if os.path.isdir(path):
        refuse_foreign(Path(path), config)
    safely = {"use_safetensors": True, "trust_remote_code": False}
    try:
        with _quiet():
            model, info = cls.from_pretrained(path, config=config, dtype=torch_dtype, output_loading_info=True, **safely)
    except Exception as error:  # a broken file fails in as many ways as there are readers
        if is_out_of_memory(error):
            raise
        if "use_safetensors" in str(error):  # a name on the hub, whose other files are not here
            raise no_safetensors(path) from None
        raise RankwiseError(f"cannot load {path}: {reason(error)}") from None
    info["unexpected_keys"] = left_over_of(path, model, info["unexpected_keys"])
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            keys = sorted(map(str, info[kind]))
            raise RankwiseError(f"{path} is not a whole {cls.__name__}: {kind.replace('_', ' ')}: {', '.join(keys[:3])}")
    refuse_not_finite(model)
    return model.to(target).eval()


def left_over_of(path: str | Path, model: nn.Module, names: Collection[str]) -> list[str]:
    """Of tensors that the model has no place for, those that look like its own: in a module that has others, or in
    one block too many. The other ones are left out, and a line says so."""

    def module_of(name: str) -> str:
        return re.sub(r"\d+", "#", name.rpartition(".")[0])

    own = {module_of(name) for name, _ in model.named_parameters()}
    out = sorted(name for name in names if module_of(name) not in own)
    if out:
        some = ", ".join(out[:3]) + (f" and {len(out) - 3:,} more" if len(out) > 3 else "")
        logger.warning("%s: left out, as a %s does not have it: %s", path, type(model).__name__, some)
    return sorted(set(names) - set(out))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of keys that do not fit and the hub's of its retries: what is wrong becomes an error's
    message."""
    loggers = (transformers.logging, huggingface_hub.logging)
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def load_compressed(path: str | Path, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """A folder that rankwise wrote. Raises `RankwiseError` for any other."""
    config = load_config(path)
    if method_of(config) != METHOD:
        raise RankwiseError(f"{path} was not written by rankwise: its config.json has no {METHOD!r} quantization_config")
    return load_model(path, config, dtype, device)


def refuse_not_finite(model: nn.Module) -> None:
    """Raises `RankwiseError` naming the first parameter with NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise RankwiseError(f"the model's weight {name} has values that are NaN or infinite")


def resolve_device(device: str) -> torch.device:
    """Raises `RankwiseError` for a device that torch does not have, and for "meta", which holds no values."""
    if device.startswith("meta"):
        raise RankwiseError(
            f"device {device!r} cannot be used, because it computes nothing: name cpu or cuda",
        )
    if device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if device == "auto":
        device = f"cuda:{launcher.local_rank()}" if launcher.size() > 1 else "cuda"
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise RankwiseError(f"device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None where it has none. Raises `RankwiseError` for one that cannot be read."""
    local = os.path.isdir(path)
    if local and not any(any(Path(path).glob(pattern)) for pattern in TOKENIZERS):
        return None
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain exceptions
        if not local and isinstance(error, OSError | ValueError | KeyError | TypeError):
            return None
        why = reason(error)
        if re.search("sentencepiece|tiktoken", why, re.IGNORECASE) and importlib.util.find_spec("sentencepiece") is None:
            why = "it is one of SentencePiece: pip install sentencepiece protobuf"
        raise RankwiseError(f"the tokenizer of {path} cannot be read: {why}") from None


def refuse_taken(folder: Path, overwrite: bool) -> None:
    """Raises `RankwiseError` where the result may not or cannot be written to `folder`."""
    try:
        folder.with_name(f".{folder.resolve().name}.temporary").exists()  # the longest name of those beside it
    except (OSError, RuntimeError, ValueError) as error:  # too long, or a link to itself
        text = getattr(error, "strerror", None) or reason(error)
        raise RankwiseError(f"the output folder {str(folder)!r} cannot be written: {text}") from None
    if folder.exists() and not folder.is_dir():
        raise RankwiseError(f"the output {folder} is a file: name a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise RankwiseError(f"the output folder {folder} is not empty: name another, or overwrite it (--overwrite)")
    above = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not above.is_dir():
        raise RankwiseError(
            f"the output folder {folder} cannot be written, because {above} is a file: name another",
        )
    if not os.access(above, os.W_OK):
        raise RankwiseError(
            f"the output folder {folder} cannot be written, because {above} is read-only: name another",
        )


def refuse_output(folder: Path, overwrite: bool, source: object = None) -> None:
    """As `refuse_taken`; and where overwriting would delete the model `source`, or anything else than a model."""
    refuse_taken(folder, overwrite)
    above = next(p for p in folder.resolve().parents if p.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{folder.resolve().name}.", dir=above))  # the result is made beside its place
    except OSError as error:
        raise RankwiseError(f"the output folder {folder} cannot be written: {above}: {error.strerror}") from None
    if os.path.ismount(folder.resolve()):
        raise RankwiseError(f"the output folder {folder} is a mount point, which nothing can replace: name one within it")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise RankwiseError(
            f"the output folder {folder} does not hold a model: name another, or empty it yourself",
        )
    if isinstance(source, str | Path) and os.path.isdir(source):
        inside = Path(source).resolve()
        if folder.resolve() in (inside, *inside.parents):
            raise RankwiseError(f"the output folder {folder} holds the model {source} itself: name another")


@contextmanager
def written_whole(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place on leaving without an error, and is removed otherwise; one that a killed
    process has left there too."""
    refuse_output(folder, overwrite)
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                set_rights(path)
            flush(path)
        _replace(folder, temporary)
    except (OSError, SafetensorError) as error:
        raise RankwiseError(f"cannot write {folder}: {getattr(error, 'strerror', None) or reason(error)}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)


def _replace(folder: Path, new: Path) -> None:
    """Put the folder `new` in the place of `folder`, whose content is deleted only once it is there."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.replace(old, folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
