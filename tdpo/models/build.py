"""Construction of policy and reference from the config's `model`."""

import glob
import os
import re
from collections.abc import Mapping
from typing import Optional

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from tdpo.gpu import prepare_gpu
from tdpo.models.adapters import attach, base_of, check_peft, is_adapter, merge_folder
from tdpo.models.archive import LEGACY_BUFFERS, check_archive, find_archive, read_archive
from tdpo.models.generation import own_settings, source_of
from tdpo.models.places import find_file, place_of
from tdpo.models.positions import hold_scaling, most_positions
from tdpo.models.quantized import loading_options, quantized, quantized_layers, settled, without_traces
from tdpo.utils import DTYPES, UserError, disable_dropout, get_logger, not_finite, reason_of, some_of

log = get_logger(__name__)

# Names of tensors that only quantised weights have, without those of ordinary models, such as logit_scale.
SCALES = re.compile(
    r"((weight|input|activation)_scale(_inv)?|[._]scales|qweight|qzeros|g_idx|weight_packed|absmax|quant_map|quant_state)(\.[^.]*)?$"
)
WIDE = ("F16", "BF16", "F32", "F64")  # dtypes of weights in safetensors
NO_ADAPTER = OmegaConf.create({"rank": None})


def load_model_config(model: DictConfig, tokenizer, cache_dir: Optional[str]):
    """Return the Transformers config of a pretrained model, or of the new model that `model.from_config` describes.

    Raises:
        UserError: it cannot be loaded, or the fields of from_config are invalid.
    """
    try:
        if model.from_config is None:
            place, gguf = place_of(model.name_or_path)
            config = transformers.AutoConfig.from_pretrained(place, cache_dir=cache_dir, trust_remote_code=False, **gguf)
        else:
            fields = OmegaConf.to_container(model.from_config)
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), vocab_size=len(tokenizer), **ids, **fields)
        if model.attn_implementation is not None:
            config._attn_implementation = model.attn_implementation
        inner = config.get_text_config()
        quantised = getattr(config, "quantization_config", None) or getattr(inner, "quantization_config", None)
        quantised = quantised or getattr(config, "compression_config", None)
        if quantised is not None:
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else getattr(quantised, "quant_method", None)
            raise UserError(
                f"model '{model.name_or_path}' is quantised ({method or 'in some way'}): such weights cannot be trained; "
                "give the model that it was made from"
            )
        return config
    except UserError:
        raise
    except Exception as error:  # configs of Transformers raise errors of many types
        raise UserError(f"model {model.name_or_path or 'from_config'} cannot be loaded: {reason_of(error)}") from None


def check_model(model: DictConfig, model_config, tokenizer, max_length: int) -> Optional[Mapping[str, torch.Tensor]]:
    """Check everything about the model that can be checked before its weights are loaded.

    Args:
        model: the config's `model`.
        model_config: see `load_model_config`.
        tokenizer: see `load_tokenizer`.
        max_length: tokens of prompt and response.

    Returns:
        the state dict of a `model.archive` that is not a Hugging Face folder (see `read_archive`); else None.

    Raises:
        UserError: max_length exceeds the model's positions, the tokenizer has more entries than the model, or the archive does not fit.
    """
    positions = most_positions(model_config)
    if positions is not None and max_length > positions:
        raise UserError(f"max_length={max_length} exceeds the model's {positions} positions; use a smaller max_length")
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise UserError(f"the tokenizer has {len(tokenizer)} entries, the model only {vocabulary}: give the model's own tokenizer")
    empty = empty_model(model_config)
    if model.archive is None:
        return None
    if is_hugging_face(model.archive):
        return None
    if is_adapter(model.archive):
        check_peft()
        base_archive(model)
        return None
    if os.path.isdir(model.archive) and find_archive(model.archive) is None:
        raise UserError(
            f"model.archive={model.archive} is no folder of weights: it has no config.json, policy.pt or checkpoint; give a folder that has"
        )
    state = read_archive(model.archive)
    check_archive(model.archive, state, empty)
    return state


def is_hugging_face(path: str) -> bool:
    """Whether a path is a local folder of Transformers' save_pretrained."""
    return os.path.isfile(os.path.join(path, "config.json"))


def empty_model(model_config, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return the model on the meta device, so without memory for weights; without dropout.

    Raises:
        UserError: no model can be built from the config.
    """
    try:
        prepare_gpu()
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # models reject inconsistent sizes in their own ways
        raise UserError(
            f"the model's config (model.from_config or config.json) gives no causal language model: {reason_of(error)}"
        ) from None
    disable_dropout(model)
    return model


def build_model(
    model: DictConfig,
    model_config,
    dtype: torch.dtype,
    cache_dir: Optional[str],
    archive: Optional[Mapping[str, torch.Tensor]],
    quantize: Optional[str] = None,
) -> torch.nn.Module:
    """Build a causal language model with its weights, on the CPU, without dropout.

    The weights are taken from `archive`, else from the folder `model.archive`, else from `model.name_or_path`. With `model.from_config`
    and no archive they are random, so seed torch first.

    Args:
        model: the config's `model`.
        model_config: see `load_model_config`.
        dtype: of the weights.
        cache_dir: of Transformers' downloads; None: its default.
        archive: state dict, name -> tensor of the parameter's shape, see `check_model`; None if model.archive is not a file.
        quantize: nf4 or int8, in which linear layers are kept; None: they are not quantised.

    Raises:
        UserError: the weights cannot be loaded, or do not fit the model.
    """
    prepare_gpu()
    folder = model.archive if archive is None else None
    files = folder or model.name_or_path
    if archive is not None:
        # Copies: Transformers would use the tensors themselves, but policy and reference must share neither memory nor the mapped file.
        state = {name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True) for name, tensor in archive.items()}
        plain = empty_model(model_config)  # whose config is that of the text, if its class has no images
        built = type(plain).from_pretrained(None, config=plain.config, state_dict=state, dtype=dtype)
        built.generation_config = own_settings(built, source_of(model, False), cache_dir)
        _take_weights(built, archive)
        built._weight_conversions = None  # the archive has the names of the model in memory; an export has those of the model's own files
    elif folder is None and model.from_config is not None:
        built = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
    elif folder is not None and is_adapter(folder):
        whole = OmegaConf.merge(model, {"archive": base_archive(model)})
        built = merge_folder(build_model(whole, model_config, torch.float32, cache_dir, None), folder).to(dtype)  # rounded once, at the end
    else:
        at_once = None if files.endswith(".gguf") else quantize
        built = _from_pretrained(files, model_config, dtype, cache_dir, strict=folder is not None, quantize=at_once)
    if quantize and not quantized_layers(built):
        built = quantized(built, quantize, dtype)
    if wrong := not_finite(dict(built.named_parameters())):
        where = model.archive or model.name_or_path or "from_config"
        remedy = "they exceed its range: use bfloat16" if dtype == torch.float16 else "give other weights, or an earlier checkpoint"
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"the weights of '{where}' are not finite in {kind} ({some_of(wrong, 3)}): {remedy}")
    disable_dropout(built)
    return built


def _quantised_tensors(name: str, cache_dir: Optional[str]) -> list[str]:
    """Return the weights in a model's safetensors files that are of another dtype than a model computes with. Buffers may be integers."""
    config = find_file(name, "config.json", cache_dir)
    found = []
    for path in glob.glob(os.path.join(glob.escape(os.path.dirname(config)), "*.safetensors")) if config else []:
        with safe_open(path, "pt") as file:
            weights = [key for key in file.keys() if key.endswith("weight")]  # noqa: SIM118
            found += [key for key in weights if file.get_slice(key).get_dtype() not in WIDE]
    return found


def _remedy(error: Exception) -> str:
    """Return advice on an error of loading, as the end of a sentence."""
    text = str(error)
    if "eneration" in text:
        return "; remove or mend its generation_config.json"
    if "weights_only" in text or "HeaderTooLarge" in text or "header too large" in text or "ncomplete metadata" in text:
        return "; its files are damaged or not yet downloaded (git lfs pull)"
    return ""


def base_archive(model: DictConfig) -> Optional[str]:
    """Return the folder of weights to which the adapters in `model.archive` belong; None if they belong to `model.name_or_path`.

    Raises:
        UserError: they belong to another model.
    """
    base = base_of(model.archive)
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(model.archive))), "base")  # in the folder of their run
    own = model.name_or_path
    if base is None or base == own or (own and os.path.realpath(base) == os.path.realpath(own)):
        return None
    found = next((path for path in (base, beside) if is_hugging_face(path)), None)
    if found is None:
        raise UserError(
            f"model.archive={model.archive} is an adapter of {base}, not of {own}: give model.name_or_path={base}; if it was trained on "
            f"another form of {own}, write that name into its adapter_config.json"
        )
    return found


def _take_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a model, once more and in place, the weights from which Transformers has made it. Some classes set a part of them anew, such as
    the embedding of the padding token, and then leave tied weights untied."""
    model.load_state_dict(state, strict=False)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if all(torch.equal(state[target], state[source]) for target, source in tied.items() if target in state and source in state):
        model.tie_weights()
        model.all_tied_weights_keys = tied


def compute_dtype(model: DictConfig) -> torch.dtype:
    """Return the dtype in which the policy of a config's `model` computes."""
    return DTYPES[model.fsdp_policy_mp or model.policy_dtype]


def reference_dtype(model: DictConfig) -> torch.dtype:
    """Return the dtype of the reference: `reference_dtype` of a config's `model`, or by default the dtype in which the policy computes."""
    return DTYPES[model.reference_dtype] if model.reference_dtype else compute_dtype(model)


class Models:
    """Policy and reference of a run, built on demand from the same weights.

    Args:
        model: the config's `model`.
        model_config: see `load_model_config`.
        cache_dir: of Transformers' downloads; None: its default.
        archive: what `check_model` returned.
        needs_reference: if false, there is no reference.
        max_length: tokens of prompt and response, for which rotary positions are scaled.
        adapter: the config's `adapter`. With adapters there is no reference: it is the policy with its adapters off.
        seed: of the adapters' random matrices.
        moves_reference: whether the reference follows the policy; with adapters it then has one of its own.
    """

    def __init__(
        self,
        model: DictConfig,
        model_config,
        cache_dir: Optional[str],
        archive: Optional[Mapping[str, torch.Tensor]],
        needs_reference: bool,
        max_length: int,
        adapter: DictConfig = NO_ADAPTER,
        seed: int = 0,
        moves_reference: bool = False,
    ):
        self.model, self.model_config, self.cache_dir = model, model_config, cache_dir
        self.needs_reference = needs_reference and adapter.rank is None
        self.max_length = max_length
        self._weights = archive
        self.adapter, self.seed, self.moves_reference = adapter, seed, moves_reference
        frozen = compute_dtype(model) if adapter.rank is not None else DTYPES[model.policy_dtype]
        self.quantize = model.quantize
        self.dtypes = {"policy": frozen, "reference": reference_dtype(model)}

    def policy(self) -> torch.nn.Module:
        """Return the policy with its weights, on the CPU. Must be called before `reference`."""
        policy = self._built("policy")
        self._attach(policy)
        if self._weights is None and self.model.archive is None and self.model.from_config is not None and self.needs_reference:
            self._weights = policy.state_dict()  # random weights are drawn once, for both models
        return policy

    def reference(self) -> Optional[torch.nn.Module]:
        """Return the reference with its weights, on the CPU; None if none is needed. Call it once: it releases the shared weights."""
        if not self.needs_reference:
            return None
        reference = self._built("reference")
        self._weights = None
        return reference

    def empty(self) -> tuple[torch.nn.Module, Optional[torch.nn.Module]]:
        """Return (policy, reference or None) on the meta device, so without memory for weights."""
        policy, reference = models = [empty_model(self.model_config, dtype) for dtype in self.dtypes.values()]
        for model in models:
            hold_scaling(model, self.max_length)
        self._attach(policy)
        return policy, reference if self.needs_reference else None

    def _attach(self, policy: torch.nn.Module) -> None:
        if self.adapter.rank is not None:
            attach(policy, self.adapter, DTYPES[self.model.policy_dtype], self.seed, self.moves_reference)

    def _built(self, role: str) -> torch.nn.Module:
        model = build_model(self.model, self.model_config, self.dtypes[role], self.cache_dir, self._weights, self.quantize)
        hold_scaling(model, self.max_length)
        return model


def _from_pretrained(
    name: str, model_config, dtype: torch.dtype, cache_dir: Optional[str], strict: bool, quantize: Optional[str]
) -> torch.nn.Module:
    """Load a pretrained model. `strict`: weights that the model lacks are an error too; models on the hub may have additional heads.
    `quantize`: how its files are quantised while they are read, which needs less memory than to do so afterwards; None: they are not."""
    try:
        place, gguf = place_of(name)
        if gguf:
            log.info(f"'{name}' is a GGUF file: its weights are dequantised to {str(dtype).removeprefix('torch.')}")
        built, info = transformers.AutoModelForCausalLM.from_pretrained(
            place,
            config=model_config,
            dtype=dtype,
            cache_dir=cache_dir,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with their names
            trust_remote_code=False,
            **gguf,
            **(loading_options(empty_model(model_config), quantize, dtype) if quantize else {}),
        )
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError
        raise UserError(f"the weights of '{name}' cannot be loaded: {reason_of(error)}{_remedy(error)}") from None
    dropped = [str(key) for key in info["unexpected_keys"] if not str(key).endswith(LEGACY_BUFFERS)]
    scales = [key for key in dropped if SCALES.search(key)]
    if scales or (scales := _quantised_tensors(name, cache_dir)):
        raise UserError(
            f"the weights of '{name}' are quantised ({some_of(sorted(scales), 3)}), though its config does not say how: such weights "
            "cannot be trained; give the model that it was made from"
        )
    if dropped and not strict:
        log.warning(f"{len(dropped)} tensors of '{name}' are not in {type(built).__name__}, and left out: {some_of(sorted(dropped), 3)}")
    unexpected = dropped if strict else []
    problems = [("missing", info["missing_keys"]), ("not in the model", unexpected), ("other shape", info["mismatched_keys"])]
    found = "; ".join(f"{what}: {some_of(sorted(map(str, keys)), 4)}" for what, keys in problems if keys)
    if found:
        raise UserError(f"the weights of '{name}' do not fit the model: {found}")
    return settled(built) if quantize else without_traces(built) if gguf else built
