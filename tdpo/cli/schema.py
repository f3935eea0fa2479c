"""Schemas of the configs: type, range and allowed values of every key. check_config.py checks which values go together."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, Union

import pydantic
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StrictBool

from tdpo import losses
from tdpo.optimizers import EIGHT_BIT, OPTIMIZERS
from tdpo.utils import DTYPES, UserError, flat_keys, nearest

Dtype = Literal[tuple(DTYPES)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy accepts no larger seed
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]


def _whole_or_share(value: float) -> Union[int, float]:
    if value >= 1 and value != int(value):
        raise ValueError("a whole number of steps, or, below 1, a share of the run's steps")
    return int(value) if value >= 1 or value == 0 else value


Steps = Annotated[NonNegativeFloat, AfterValidator(_whole_or_share)]
TRAINERS = ("BasicTrainer", "FSDPTrainer", "TensorParallelTrainer")

# Types and ranges of hyperparameters, the same for every loss that has them; <loss>.<key> is for one loss.
HYPERPARAMETERS = {
    "beta": (PositiveFloat, ...),
    "alpha": (NonNegativeFloat, ...),
    "label_smoothing": (Annotated[float, Field(ge=0, lt=0.5)], ...),
    "reference_free": (StrictBool, ...),
    "average_log_prob": (StrictBool, ...),
    "dpop_lambda": (NonNegativeFloat, ...),
    "gamma": (NonNegativeFloat, ...),
    "kl_weight": (NonNegativeFloat, ...),
    "delta": (PositiveFloat, ...),
    "sft_weight": (NonNegativeFloat, 0.0),
    "desirable_weight": (NonNegativeFloat, ...),
    "undesirable_weight": (NonNegativeFloat, ...),
    "z0": (Literal["batch", 0], ...),
    "parts": (Annotated[int, Field(ge=2)], ...),
    "order": (Literal["given", "easy_to_hard"], ...),
    "divergence": (Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"], ...),
    "f_dpo.alpha": (Annotated[float, Field(gt=0, lt=1)], ...),
}


# Keys with free names within them, which the command line may set without a +: a config in the defaults list of config.yaml.
FREE = OmegaConf.create({"optimizer_options": {}, "stop_when": {}})
for _node in FREE.values():
    OmegaConf.set_struct(_node, False)
ConfigStore.instance().store("free_names", FREE)


class Node(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class Wandb(Node):
    enabled: StrictBool
    entity: Optional[str]
    project: str


class Model(Node):
    name_or_path: Optional[str]
    from_config: Optional[dict]
    tokenizer_name_or_path: Optional[str]
    chat_template: Optional[str]
    chat_template_kwargs: Optional[dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Any]]
    archive: Optional[str]
    block_name: Optional[str]
    attn_implementation: Optional[Literal["sdpa", "eager", "flex_attention"]]
    add_bos: StrictBool
    policy_dtype: Dtype
    fsdp_policy_mp: Optional[Dtype]
    reference_dtype: Optional[Dtype]
    quantize: Optional[Literal["nf4", "int8"]]


class Parallel(Node):
    replicas: PositiveInt
    reduce_once_a_step: StrictBool
    timeout_secs: PositiveInt


class Adapter(Node):
    rank: Optional[PositiveInt]
    alpha: PositiveFloat
    targets: Union[Literal["all-linear"], Annotated[list[str], Field(min_length=1)]]
    rslora: StrictBool
    init: Literal["uniform", "gaussian"]


class ReferenceConfig(Node):
    update_every: Optional[PositiveInt]
    mixup: Annotated[float, Field(gt=0, le=1)]


class KeepBest(Node):
    metric: Optional[str]
    mode: Optional[Literal["min", "max"]]


class Corpus(Node):
    """Keys that every dataset has."""

    invalid_rows: Literal["error", "skip", "keep"]
    truncation_mode: Literal["keep_start", "keep_end"]
    unpair: StrictBool = False
    share: Optional[Annotated[float, Field(gt=0, le=1)]] = None
    n_examples: Optional[PositiveInt] = None


class Published(Corpus):
    loader: Literal["hh", "shp", "se"]
    path: str
    escape_special_tokens: StrictBool


class Columns(Node):
    """Names of the fields of data rows; null for those that may have several names, or none."""

    prompt: str
    chosen: str
    rejected: str
    completion: str
    messages: str
    score: str
    label: str
    chosen_score: Optional[str]
    rejected_score: Optional[str]
    system: Optional[str]
    tools: str


class Jsonl(Corpus):
    loader: Literal["jsonl"]
    path: str
    subset: Optional[str]
    revision: Optional[str]
    train_split: str
    eval_split: Optional[str]
    eval_path: Optional[str]
    eval_fraction: Annotated[float, Field(gt=0, lt=1)]
    escape_special_tokens: StrictBool
    rendered: StrictBool
    rows: Literal["pairs", "labelled", "scored", "segments"]
    assistant_turns: Literal["last", "all"]
    columns: Columns
    separator: str
    pairs_by: Literal["all", "extremes"]
    min_margin: NonNegativeFloat
    segments: Literal["refuse", "cut"]


class Imdb(Corpus):
    loader: Literal["imdb"]
    path: str
    prefix_words: PositiveInt
    escape_special_tokens: StrictBool


class Reviews(Corpus):
    loader: Literal["reviews"]
    n_train: Annotated[int, Field(gt=0, le=2856)]
    n_test: Annotated[int, Field(gt=0, le=408)]
    seed: int
    min_margin: Annotated[float, Field(gt=0, le=0.4)]


Datasets = dict[Name, Annotated[Union[Published, Jsonl, Imdb, Reviews], Field(discriminator="loader")]]


class Config(Node):
    seed: Seed
    exp_name: Name
    batch_size: PositiveInt
    eval_batch_size: PositiveInt
    debug: StrictBool
    dry_run: StrictBool
    fsdp_port: Optional[Annotated[int, Field(ge=1, lt=2**16)]]
    nproc_per_node: Optional[PositiveInt]
    parallel: Parallel
    wandb: Wandb
    sinks: list[Literal["wandb", "tensorboard", "trackio"]]
    console: Literal["auto", "full"]
    local_dirs: Annotated[list[str], Field(min_length=1)]
    local_run_dir: Optional[str]
    resume: Optional[str]
    save_policy: Optional[Literal["always", "final", "never"]]
    keep_checkpoints: Optional[PositiveInt]
    keep_best: KeepBest
    stop_when: dict[str, Any]
    sample_during_eval: StrictBool
    n_eval_model_samples: PositiveInt
    do_first_eval: StrictBool
    lr: PositiveFloat
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"]
    min_lr: NonNegativeFloat
    decay_steps: Steps
    gradient_accumulation_steps: PositiveInt
    tokens_per_microbatch: Optional[PositiveInt]
    scoring: Literal["auto", "fast", "plain"]
    compile: StrictBool
    reference: ReferenceConfig
    log_kl: StrictBool
    reference_cache: StrictBool
    max_grad_norm: PositiveFloat
    max_length: PositiveInt
    max_prompt_length: PositiveInt
    n_epochs: Optional[PositiveInt]
    n_examples: Optional[PositiveInt]
    drop_last: StrictBool
    n_eval_examples: Optional[PositiveInt]
    trainer: Literal[TRAINERS]
    optimizer: Literal[(*OPTIMIZERS, *EIGHT_BIT)]
    optimizer_options: dict[str, Any]
    decay_norms_and_biases: StrictBool
    warmup_steps: Steps
    activation_checkpointing: StrictBool
    eval_every: PositiveInt
    save_every: Optional[PositiveInt]
    minimum_log_interval_secs: NonNegativeFloat
    max_skipped_steps: NonNegativeInt
    deterministic: StrictBool
    model: Model
    adapter: Adapter
    datasets: Annotated[Datasets, Field(min_length=1)]
    loss: dict


Runs = Union[str, Annotated[list[str], Field(min_length=1)]]


class Sample(Node):
    """Keys of config/sample.yaml."""

    run: str
    out: str
    datasets: Optional[Datasets] = None
    split: Literal["train", "test"]
    prompts: Optional[str]
    form: Optional[Literal["alpaca_eval", "mt_bench", "arena_hard"]]
    n_prompts: Optional[PositiveInt]
    n: PositiveInt
    engine: Literal["transformers", "vllm"]
    temperature: Optional[NonNegativeFloat]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: NonNegativeInt
    num_beams: PositiveInt
    max_length: Optional[PositiveInt]
    max_prompt_length: Optional[PositiveInt]
    max_new_tokens: Optional[PositiveInt]
    batch_size: PositiveInt
    seed: Seed


class TokenReport(Node):
    """Keys of config/token_report.yaml."""

    run: Runs
    reference: Optional[str]
    out: str
    datasets: Optional[Datasets] = None
    split: Literal["train", "test"]
    n_pairs: PositiveInt
    beta: Optional[PositiveFloat]
    max_length: Optional[PositiveInt]
    max_prompt_length: Optional[PositiveInt]
    batch_size: PositiveInt


class Evaluation(Node):
    """Keys of config/eval.yaml."""

    run: Runs
    reference: Optional[str]
    out: Optional[str]
    datasets: Optional[Datasets] = None
    split: Literal["train", "test"]
    n_pairs: Optional[NonNegativeInt]
    n_prompts: NonNegativeInt
    n: PositiveInt
    reward: Optional[str]
    max_length: Optional[PositiveInt]
    max_prompt_length: Optional[PositiveInt]
    batch_size: PositiveInt
    seed: Seed


class Export(Node):
    """Keys of config/export.yaml."""

    run: str
    out: str
    dtype: Optional[Dtype]
    push: Optional[Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")]]


def resolved(config: DictConfig) -> dict:
    """Resolve a config's references, and ~ at the beginning of paths, in place, and return it as a dict.

    Raises:
        UserError: a value is missing.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"missing: {', '.join(f'{key}=...' for key in missing)}")
    OmegaConf.resolve(config)
    _expand_home(config)
    return OmegaConf.to_container(config)


def _expand_home(node: Union[DictConfig, ListConfig]) -> None:
    """Replace ~ at the beginning of paths by the home folder, in place, as a shell does only before a whole argument."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if isinstance(node[key], (DictConfig, ListConfig)):
            _expand_home(node[key])
        elif isinstance(node[key], str) and node[key].startswith("~/"):
            node[key] = os.path.expanduser(node[key])


def schema_problems(values: Mapping, config: DictConfig, schema: type[Node]) -> list[str]:
    """Return a line for each value that breaks the schema; if there is none, give the config's values their types in place."""
    try:
        config.merge_with(schema.model_validate(values).model_dump(exclude={"loss"}, exclude_unset=True))
    except pydantic.ValidationError as error:
        return _lines(error, values)
    return []


def _lines(error: pydantic.ValidationError, values: Mapping) -> list[str]:
    """Return one line for each value that pydantic refuses, which of a union reports a problem for each of its types."""
    found: dict[str, dict[str, None]] = {}
    for problem in error.errors():
        given, _, wanted = _line(problem, values).partition(": must be ")
        found.setdefault(given, {})[wanted] = None
    return [given + (f": must be {' or '.join(wanted)}" if any(wanted) else "") for given, wanted in found.items()]


def _line(problem: Mapping, values: Mapping) -> str:
    """Return one line for one problem that pydantic found."""
    place = [str(part) for part in problem["loc"]]
    if len(place) > 2 and place[0] == "datasets":  # the discriminator's value is not part of the key
        place.pop(2)
    key = ".".join(place)
    if problem["type"] not in ("missing", "extra_forbidden"):
        key = _known_part(place, values)
    if problem["type"] == "missing":
        return f"missing: {key}=..."
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(key, set(flat_keys(values)) - {key})}"
    if key == "exp_name":
        return f"exp_name={problem['input']!r}: must have only letters, digits, '.', '_' and '-', because it names a folder"
    if key == "optimizer":
        hint, known = nearest(str(problem["input"]), (*OPTIMIZERS, *EIGHT_BIT)), ", ".join(OPTIMIZERS)
        what = f"optimizer={problem['input']}: not a supported optimizer of torch.optim{hint}"
        return f"{what}; use one of {known}, or of bitsandbytes {', '.join(EIGHT_BIT)}"
    given = f"{key}={problem['input']}"
    if problem["type"] == "model_type":
        node = next(node for node in Node.__subclasses__() if node.__name__ == problem["ctx"]["class_name"])
        return f"{given}: {key} has keys of its own; set {' or '.join(f'{key}.{name}=...' for name in node.model_fields)}"
    if problem["type"] == "dict_type":
        return f"{given}: must be a mapping, such as '{key}={{name: value}}'"
    if problem["type"] == "list_type":
        return f"{given}: must be a list, such as {key}=[{problem['input']}]"
    return f"{given}: must be {problem['msg'].removeprefix('Input should be ').removeprefix('Value error, ')}"


def _known_part(place: list[str], values: Mapping) -> str:
    """Return the key of the config that a place names; what follows it there names one of a union's types."""
    parts: list[str] = []
    for part in place:
        index = int(part) if isinstance(values, list) and part.isdigit() else part
        if not (index in values if isinstance(values, Mapping) else isinstance(index, int)):
            break
        parts.append(part)
        values = values[index]
    return ".".join(parts)


def loss_problems(loss: Optional[Mapping], config: DictConfig) -> list[str]:
    """Return a line for each problem with the loss's name or hyperparameters; if there is none, give the values their types in place.

    Args:
        loss: the config's `loss`, as a dict; which hyperparameters it has follows from the signature of the loss function.
        config: the config, whose `loss` is adjusted.
    """
    if not isinstance(loss, Mapping) or "name" not in loss:
        return [f"missing: loss=... ({', '.join(losses.OBJECTIVES)})"]
    values = dict(loss)
    switches = [key for key in ("if_tdpo2", "reference_free") if not isinstance(values.get(key, False), bool)]
    if switches:
        return [f"loss.{key}={values[key]}: must be true or false" for key in switches]
    try:
        name, values, _ = losses.resolve(values.pop("name", None), values)
    except KeyError as error:
        return [f"loss.name={error.args[0]}: not a loss{nearest(str(error.args[0]), losses.OBJECTIVES)}"]
    except ValueError as error:
        return [str(error)]
    known = losses.OBJECTIVES[name].parameters
    ranges = {key: HYPERPARAMETERS.get(f"{name}.{key}", HYPERPARAMETERS.get(key, (Any, ...))) for key in known}
    schema = pydantic.create_model(name, __base__=Node, **ranges)
    try:
        config.loss.merge_with(schema.model_validate(values).model_dump(exclude_unset=True))
    except pydantic.ValidationError as error:
        places = ({**problem, "loc": ("loss", *problem["loc"])} for problem in error.errors())
        return [_line(problem, {"loss": {**dict.fromkeys(known), **values}}) for problem in places]
    return []
