"""Construction of tokenizer, policy and reference from the config's `model`."""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import Optional

import datasets
import huggingface_hub
import tokenizers
import torch
import transformers
from omegaconf import DictConfig, OmegaConf

from tdpo.data import reviews
from tdpo.models.archive import LEGACY_BUFFERS, check_archive, find_archive, read_archive
from tdpo.models.chat_template import set_chat_template
from tdpo.utils import DTYPES, UserError, disable_dropout, get_logger, looks_local, not_finite, some_of

log = get_logger(__name__)

transformers.logging.set_verbosity_error()  # this module checks what matters of its advice, and reports it in one line
transformers.logging.disable_progress_bar()

EMBEDDED_TOKENIZER = "reviews"  # model.tokenizer_name_or_path of model=tiny


def prepare_hub(names: Iterable[Optional[str]]) -> None:
    """Use only the local cache if one of these models or datasets is on the hub and the hub cannot be reached.

    Otherwise the hub's client would retry each file for half a minute.

    Args:
        names: local paths, names on the hub, or None.
    """
    remote = [name for name in names if name and name != EMBEDDED_TOKENIZER and not looks_local(name)]
    if not remote or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever HTTP library the hub's client uses
        log.info(f"the Hugging Face hub cannot be reached ({error}): {', '.join(remote)} will be read from the local cache only")
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def check_local(names: Iterable[Optional[str]]) -> None:
    """Check that local paths exist, before anything is downloaded.

    Args:
        names: as for `prepare_hub`.

    Raises:
        UserError: one of them does not exist.
    """
    for name in names:
        if name and looks_local(name) and not os.path.exists(name):
            raise UserError(f"'{name}' does not exist; give a local path, or owner/name for a model or dataset on the hub")


def load_tokenizer(model: DictConfig, cache_dir: Optional[str]):
    """Return the tokenizer of a config's `model`. It has a padding token (end-of-sequence, if it had none).

    Raises:
        UserError: it cannot be loaded, or lacks the end-of-sequence token, a required beginning-of-sequence token, or the chat template
            that `model` names.
    """
    name = model.tokenizer_name_or_path or model.name_or_path
    tokenizer = embedded_tokenizer() if name == EMBEDDED_TOKENIZER else _load_tokenizer(name, model.add_bos, cache_dir)
    set_chat_template(tokenizer, model.get("chat_template"), model.get("chat_template_kwargs") or {})
    return tokenizer


def _load_tokenizer(name: str, add_bos: bool, cache_dir: Optional[str]):
    if looks_local(name) and not os.path.exists(name):
        raise UserError(f"model or tokenizer '{name}' does not exist; give a local path, or owner/name for one on the hub")
    try:
        place, gguf = _place(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, cache_dir=cache_dir, trust_remote_code=False, **gguf)
    except UserError:
        raise
    except Exception as error:  # the Rust library raises plain Exception for a damaged file
        raise UserError(f"tokenizer '{name}' cannot be loaded: {_reason(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer '{name}' has no end-of-sequence token: give another model.tokenizer_name_or_path")
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"model.add_bos=true: tokenizer '{name}' has no beginning-of-sequence token; use model.add_bos=false")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def embedded_tokenizer():
    """Return the tokenizer of the embedded film reviews: one token per word."""
    special = ["<|endoftext|>", "<|padding|>", "<|unknown|>"]
    vocabulary = {word: i for i, word in enumerate(special + reviews.vocabulary())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[2]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0], pad_token=special[1], unk_token=special[2]
    )


def load_model_config(model: DictConfig, tokenizer, cache_dir: Optional[str]):
    """Return the Transformers config of a pretrained model, or of the new model that `model.from_config` describes.

    Raises:
        UserError: it cannot be loaded, or the fields of from_config are invalid.
    """
    try:
        if model.from_config is None:
            place, gguf = _place(model.name_or_path)
            config = transformers.AutoConfig.from_pretrained(place, cache_dir=cache_dir, trust_remote_code=False, **gguf)
        else:
            fields = OmegaConf.to_container(model.from_config)
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), vocab_size=len(tokenizer), **ids, **fields)
        if model.attn_implementation is not None:
            config._attn_implementation = model.attn_implementation
        quantised = getattr(config, "quantization_config", None)
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
        raise UserError(f"model {model.name_or_path or 'from_config'} cannot be loaded: {_reason(error)}") from None


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
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise UserError(f"max_length={max_length} exceeds the model's {positions} positions; use a smaller max_length")
    vocabulary = getattr(model_config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise UserError(f"the tokenizer has {len(tokenizer)} entries, the model only {vocabulary}: give the model's own tokenizer")
    empty = empty_model(model_config)
    if model.archive is None:
        return None
    if is_hugging_face(model.archive):
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
        no_cudnn_attention()
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # models reject inconsistent sizes in their own ways
        raise UserError(f"the model's config (model.from_config or config.json) gives no causal language model: {_reason(error)}") from None
    disable_dropout(model)
    return model


def build_model(
    model: DictConfig, model_config, dtype: torch.dtype, cache_dir: Optional[str], archive: Optional[Mapping[str, torch.Tensor]]
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

    Raises:
        UserError: the weights cannot be loaded, or do not fit the model.
    """
    no_cudnn_attention()
    folder = model.archive if archive is None else None
    if archive is not None:
        # Copies: Transformers would use the tensors themselves, but policy and reference must share neither memory nor the mapped file.
        state = {name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True) for name, tensor in archive.items()}
        built = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)].from_pretrained(
            None, config=model_config, state_dict=state, dtype=dtype
        )
        built._weight_conversions = None  # the archive has the names of the model in memory; an export has those of the model's own files
    elif folder is None and model.from_config is not None:
        built = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
    else:
        built = _from_pretrained(folder or model.name_or_path, model_config, dtype, cache_dir, strict=folder is not None)
    if wrong := not_finite(dict(built.named_parameters())):
        where = model.archive or model.name_or_path or "from_config"
        raise UserError(f"the weights of '{where}' are not finite ({some_of(wrong, 3)}): give other weights, or an earlier checkpoint")
    disable_dropout(built)
    return built


def no_cudnn_attention() -> None:
    """Keep PyTorch from using cuDNN's attention, which gives NaN gradients at some lengths with masks (pytorch#196678), as ours all are."""
    torch.backends.cuda.enable_cudnn_sdp(False)


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
    """

    def __init__(
        self,
        model: DictConfig,
        model_config,
        cache_dir: Optional[str],
        archive: Optional[Mapping[str, torch.Tensor]],
        needs_reference: bool,
    ):
        self.model, self.model_config, self.cache_dir, self.needs_reference = model, model_config, cache_dir, needs_reference
        self._weights = archive
        self.dtypes = {"policy": DTYPES[model.policy_dtype], "reference": reference_dtype(model)}

    def policy(self) -> torch.nn.Module:
        """Return the policy with its weights, on the CPU. Must be called before `reference`."""
        policy = build_model(self.model, self.model_config, self.dtypes["policy"], self.cache_dir, self._weights)
        if self._weights is None and self.model.archive is None and self.model.from_config is not None and self.needs_reference:
            self._weights = policy.state_dict()  # random weights are drawn once, for both models
        return policy

    def reference(self) -> Optional[torch.nn.Module]:
        """Return the reference with its weights, on the CPU; None if none is needed. Call it once: it releases the shared weights."""
        if not self.needs_reference:
            return None
        reference = build_model(self.model, self.model_config, self.dtypes["reference"], self.cache_dir, self._weights)
        self._weights = None
        return reference

    def empty(self) -> tuple[torch.nn.Module, Optional[torch.nn.Module]]:
        """Return (policy, reference or None) on the meta device, so without memory for weights."""
        policy, reference = (empty_model(self.model_config, dtype) for dtype in self.dtypes.values())
        return policy, reference if self.needs_reference else None


def _place(name: str) -> tuple[str, dict[str, str]]:
    """Return what Transformers loads a model from: (folder, {"gguf_file": file}) for a GGUF file, else (name, {}).

    Raises:
        UserError: it is a GGUF file, and the packages that read one are not installed.
    """
    if not name.endswith(".gguf"):
        return name, {}
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"'{name}' is a GGUF file, which needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    folder, file = os.path.split(name)
    return folder or ".", {"gguf_file": file}


def _plain(model: torch.nn.Module) -> torch.nn.Module:
    """Remove the traces of a quantised file from a model whose weights were dequantised, so that it is exported as a plain one."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    return model


def _from_pretrained(name: str, model_config, dtype: torch.dtype, cache_dir: Optional[str], strict: bool) -> torch.nn.Module:
    """Load a pretrained model. `strict`: weights that the model lacks are an error too; models on the hub may have additional heads."""
    try:
        place, gguf = _place(name)
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
        )
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError
        raise UserError(f"the weights of '{name}' cannot be loaded: {_reason(error)}") from None
    unexpected = [key for key in info["unexpected_keys"] if strict and not str(key).endswith(LEGACY_BUFFERS)]
    problems = [("missing", info["missing_keys"]), ("not in the model", unexpected), ("other shape", info["mismatched_keys"])]
    found = "; ".join(f"{what}: {some_of(sorted(map(str, keys)), 4)}" for what, keys in problems if keys)
    if found:
        raise UserError(f"the weights of '{name}' do not fit the model: {found}")
    return _plain(built) if gguf else built


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
