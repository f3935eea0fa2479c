"""What a config must be: types, ranges and closed sets of every key, and which values go together. Everything wrong is said at once."""

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Optional, Union

import pydantic
import torch
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StrictBool

from tdpo import losses
from tdpo.utils import DTYPES, UserError, nearest

Dtype = Literal[tuple(DTYPES)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy takes no larger one
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
TRAINERS = ("BasicTrainer", "FSDPTrainer", "TensorParallelTrainer")
# torch.optim optimizers that need more than the gradient of any parameter: a closure, sparse gradients, matrices alone
UNSUITABLE_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in UNSUITABLE_OPTIMIZERS
)

# Ranges of the losses' hyperparameters, whichever loss has them.
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
    "sft_weight": (NonNegativeFloat, ...),
    "desirable_weight": (NonNegativeFloat, ...),
    "undesirable_weight": (NonNegativeFloat, ...),
    "z0": (Literal["batch", 0], ...),
    "parts": (Annotated[int, Field(ge=2)], ...),
    "order": (Literal["given", "easy_to_hard"], ...),
}


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
    archive: Optional[str]
    block_name: Optional[str]
    attn_implementation: Optional[Literal["sdpa", "eager", "flex_attention"]]
    add_bos: StrictBool
    policy_dtype: Dtype
    fsdp_policy_mp: Optional[Dtype]
    reference_dtype: Optional[Dtype]


class Parallel(Node):
    replicas: PositiveInt
    reduce_once_a_step: StrictBool
    timeout_secs: PositiveInt


class Reference(Node):
    update_every: Optional[PositiveInt]
    mixup: Annotated[float, Field(gt=0, le=1)]


class Corpus(Node):
    """Keys of every dataset."""

    invalid_rows: Literal["error", "skip", "keep"]
    truncation_mode: Literal["keep_start", "keep_end"]
    unpair: StrictBool = False


class Published(Corpus):
    loader: Literal["hh", "shp", "se"]
    path: str
    escape_special_tokens: StrictBool


class Columns(Node):
    """Of rows=labelled and scored."""

    prompt: str
    completion: str
    score: str
    label: str


class Jsonl(Corpus):
    loader: Literal["jsonl"]
    path: str
    subset: Optional[str]
    train_split: str
    eval_split: Optional[str]
    eval_path: Optional[str]
    eval_fraction: Annotated[float, Field(gt=0, lt=1)]
    escape_special_tokens: StrictBool
    rows: Literal["pairs", "labelled", "scored", "segments"]
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
    fsdp_port: Optional[Annotated[int, Field(ge=1, lt=2**16)]]
    nproc_per_node: Optional[PositiveInt]
    parallel: Parallel
    wandb: Wandb
    local_dirs: Annotated[list[str], Field(min_length=1)]
    local_run_dir: Optional[str]
    resume: Optional[str]
    keep_checkpoints: Optional[PositiveInt]
    sample_during_eval: StrictBool
    n_eval_model_samples: PositiveInt
    do_first_eval: StrictBool
    lr: PositiveFloat
    gradient_accumulation_steps: PositiveInt
    tokens_per_microbatch: Optional[PositiveInt]
    scoring: Literal["auto", "fast", "plain"]
    compile: StrictBool
    reference: Reference
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
    optimizer: Literal[tuple(OPTIMIZERS)]
    warmup_steps: NonNegativeInt
    activation_checkpointing: StrictBool
    eval_every: PositiveInt
    save_every: Optional[PositiveInt]
    minimum_log_interval_secs: NonNegativeFloat
    max_skipped_steps: NonNegativeInt
    deterministic: StrictBool
    model: Model
    datasets: Annotated[Datasets, Field(min_length=1)]
    loss: dict


Runs = Union[str, Annotated[list[str], Field(min_length=1)]]


class Sample(Node):
    """config/sample.yaml"""

    run: str
    out: str
    datasets: Optional[Datasets] = None
    split: Literal["train", "test"]
    prompts: Optional[str]
    n_prompts: Optional[PositiveInt]
    n: PositiveInt
    temperature: PositiveFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: NonNegativeInt
    num_beams: PositiveInt
    max_length: Optional[PositiveInt]
    max_prompt_length: Optional[PositiveInt]
    max_new_tokens: Optional[PositiveInt]
    batch_size: PositiveInt
    seed: Seed


class TokenReport(Node):
    """config/token_report.yaml"""

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
    """config/eval.yaml"""

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


def check_tool_config(config: DictConfig, schema: type[Node]) -> None:
    """Check the config of a tool against its schema. In place it is resolved, and its values get their types.

    Raises:
        UserError: something is wrong; it names everything that is.
    """
    problems = _schema_problems(_resolved(config), config, schema)
    if not problems and 1 < config.get("num_beams", 1) < config.n:
        problems = [f"n={config.n} is more than num_beams={config.num_beams}, which has no more texts"]
    if problems:
        raise UserError("\n".join(problems))


def check_config(config: DictConfig, overrides: Iterable[str] = ()) -> list[str]:
    """Check a config. In place it is resolved, its values get their types (4.0 becomes 4), and eval_every and save_every are rounded
    down to multiples of batch_size.

    Args:
        config: as Hydra composed it.
        overrides: the command line's, to tell a value that was given from a default.

    Returns:
        lines to print: what was adjusted, what will have no effect.

    Raises:
        UserError: something is wrong; it names everything that is.
    """
    values = _resolved(config)
    problems = _schema_problems(values, config, Config) + _loss_problems(values.get("loss"), config)
    if problems:
        raise UserError("\n".join(problems))
    problems = _joint_problems(config)
    notes = _round_down(config, problems)
    if problems:
        raise UserError("\n".join(problems))
    return notes + _warnings(config, list(overrides))


def _resolved(config: DictConfig) -> dict:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"missing: {', '.join(f'{key}=...' for key in missing)}")
    OmegaConf.resolve(config)
    return OmegaConf.to_container(config)


def _schema_problems(values: Mapping, config: DictConfig, schema: type[Node]) -> list[str]:
    try:
        config.merge_with(schema.model_validate(values).model_dump(exclude={"loss"}, exclude_unset=True))
    except pydantic.ValidationError as error:
        return [_line(problem, values) for problem in error.errors()]
    return []


def _line(problem: Mapping, values: Mapping) -> str:
    """One line for one problem that pydantic found."""
    place = [str(part) for part in problem["loc"]]
    if len(place) > 2 and place[0] == "datasets":  # the discriminator's value is no part of the key
        place.pop(2)
    key = ".".join(place)
    if problem["type"] == "missing":
        return f"missing: {key}=..."
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(key, set(flat_keys(values)) - {key})}"
    if key == "exp_name":
        return f"exp_name={problem['input']!r}: letters, digits, '.', '_' and '-' alone, because it names a folder"
    if key == "optimizer":
        hint = nearest(str(problem["input"]), OPTIMIZERS)
        return f"optimizer={problem['input']}: not in torch.optim{hint}; it has {', '.join(OPTIMIZERS)}"
    message = problem["msg"].removeprefix("Input should be ")
    return f"{key}={problem['input']}: must be {message}"


def flat_keys(values: Mapping, prefix: str = "") -> list[str]:
    """'a.b.c' for every leaf of a nested mapping."""
    keys = []
    for key, value in values.items():
        keys += flat_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return keys


def _loss_problems(loss: Optional[Mapping], config: DictConfig) -> list[str]:
    """The loss's name, and its hyperparameters by the signature of its function."""
    if not isinstance(loss, Mapping) or "name" not in loss:
        return [f"missing: loss=... ({', '.join(losses.OBJECTIVES)})"]
    values = dict(loss)
    switches = [key for key in ("if_tdpo2", "reference_free") if not isinstance(values.get(key, False), bool)]
    if switches:
        return [f"loss.{key}={values[key]}: must be true or false" for key in switches]
    try:
        name, values = losses.resolve(values.pop("name", None), values)
    except KeyError as error:
        return [f"loss.name={error.args[0]}: not a loss{nearest(str(error.args[0]), losses.OBJECTIVES)}"]
    except ValueError as error:
        return [str(error)]
    known = list(inspect.signature(losses.OBJECTIVES[name].function).parameters)[1:]
    schema = pydantic.create_model(name, __base__=Node, **{key: HYPERPARAMETERS.get(key, (Any, ...)) for key in known})
    try:
        config.loss.merge_with(schema.model_validate(values).model_dump())
    except pydantic.ValidationError as error:
        return [_line({**problem, "loc": ("loss", *problem["loc"])}, {"loss": {key: 0 for key in known}}) for problem in error.errors()]
    return []


def _joint_problems(config: DictConfig) -> list[str]:
    """Values that are right one by one, but cannot go together."""
    problems = []
    if config.trainer == "BasicTrainer" and (config.nproc_per_node or 1) > 1:
        problems.append(f"nproc_per_node={config.nproc_per_node}: trainer=BasicTrainer is one process; several are trainer=FSDPTrainer")
    if config.trainer != "FSDPTrainer" and config.parallel.replicas > 1:
        problems.append(f"parallel.replicas={config.parallel.replicas} needs trainer=FSDPTrainer")
    if config.exp_name.strip(".") == "" or ".." in config.exp_name:
        problems.append(f"exp_name={config.exp_name!r}: '..' is no part of a name")
    if config.tokens_per_microbatch is None and config.batch_size % config.gradient_accumulation_steps:
        problems.append(
            f"batch_size={config.batch_size} does not divide by gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    if config.max_prompt_length >= config.max_length:
        problems.append(
            f"max_prompt_length={config.max_prompt_length} leaves no room for a response: it must be below max_length={config.max_length}"
        )
    if config.n_epochs is None and config.n_examples is None:
        problems.append("n_epochs and n_examples are both null: give one of them")
    problems += _reference_problems(config)
    if config.model.name_or_path is None and config.model.from_config is None:
        problems.append("model.name_or_path is null: name a model on the hub or a local folder")
    if config.model.name_or_path is not None and config.model.from_config is not None:
        problems.append(
            f"model.name_or_path={config.model.name_or_path} and model.from_config exclude each other: "
            "a model of the hub or a folder is model=blank_model model.name_or_path=..."
        )
    if config.model.from_config is not None and not config.model.tokenizer_name_or_path:
        problems.append("model.from_config needs model.tokenizer_name_or_path")
    return problems


def _reference_problems(config: DictConfig) -> list[str]:
    """What a loss asks of the reference, and what is asked of it beside."""
    problems = []
    objective = losses.objective_of(OmegaConf.to_container(config.loss), config.log_kl)
    if config.reference_cache and config.scoring == "plain":
        problems.append("reference_cache=true needs fast scoring: scoring=auto, or reference_cache=false")
    if config.reference_cache and objective.needs_baseline:
        problems.append("reference_cache=true: loss=kto asks the reference for other responses too; loss.z0=0, or reference_cache=false")
    if objective.needs_baseline and config.batch_size < 2:
        problems.append("batch_size=1: loss=kto takes z0 over the batch's other examples; batch_size of 2 at least, or loss.z0=0")
    moves = config.reference.update_every is not None
    if moves and not objective.needs_reference:
        problems.append(f"reference.update_every={config.reference.update_every}: loss={objective.name} has no reference")
    if config.reference_cache and (moves or objective.in_parts):
        problems.append("reference_cache=true is for a reference that stays as it is: set reference_cache=false")
    if objective.in_parts and (moves or config.n_epochs is None):
        problems.append(
            f"loss={objective.name} replaces the reference after n_epochs of each part: set n_epochs, and reference.update_every=null"
        )
    return problems


def _round_down(config: DictConfig, problems: list[str]) -> list[str]:
    notes = []
    for key in ("eval_every", "save_every"):
        value = config[key]
        if value is None or value % config.batch_size == 0:
            continue
        if value < config.batch_size:
            problems.append(f"{key}={value} is less than batch_size={config.batch_size}")
            continue
        config[key] = value - value % config.batch_size
        notes.append(f"{key}={value} rounded down to {config[key]}, a multiple of batch_size={config.batch_size}")
    return notes


def _warnings(config: DictConfig, overrides: list[str]) -> list[str]:
    notes = []
    objective = losses.objective_of(OmegaConf.to_container(config.loss), config.log_kl)
    name = objective.name
    if name == "tdpo1" and any(re.match(r"\+*loss\.alpha=", override) for override in overrides):
        notes.append("warning: TDPO1 has no alpha; loss.alpha is ignored")
    if config.tokens_per_microbatch is not None and config.gradient_accumulation_steps > 1:
        notes.append("tokens_per_microbatch is set; gradient_accumulation_steps is ignored")
    if config.reference_cache and not objective.needs_reference:
        notes.append(f"warning: {name} has no reference; reference_cache is ignored")
    if name == "tdpo2" and objective.hyperparameters["alpha"] == 0:
        notes.append("loss=tdpo2 with loss.alpha=0 is DPO")
    if objective.needs_reference and config.model.archive is None:
        notes.append(f"warning: {name} without model.archive: policy and reference start from the model as it is, without SFT")
    return notes


def explain_composition_error(error: Exception, config_dir: str, known_keys: list[str]) -> str:
    """A command line that Hydra cannot compose, as one line with a remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.removesuffix(".yaml").partition("/")
        folder = os.path.join(config_dir, group)
        options = sorted(file.removesuffix(".yaml") for file in os.listdir(folder)) if os.path.isdir(folder) else []
        return f"{group}={name}: there is no config/{group}/{name}.yaml{nearest(name, options)}; there are {', '.join(options)}"
    if found := re.search(r"Could not override '([^'@]+)", text):
        return f"unknown key {found.group(1)}{nearest(found.group(1), known_keys)}"
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{found.group(1)} exists already: leave the + out"
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"missing: {found.group(1)}=..."
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value ({text})"
    return text
