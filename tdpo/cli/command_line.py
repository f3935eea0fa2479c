"""What every command shares: compose the config that the command line asks for, and report errors in one or two lines."""

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdpo.distributed.launch import is_supervised, own_rank
from tdpo.files import reason_of
from tdpo.gpu import allocate_in_segments
from tdpo.utils import CONFIG_DIR, PeerError, RunError, Stopped, UserError, flat_keys, lenient_console, nearest, plural

GROUPS = ("model", "datasets", "loss")


def run_command(config_name: str, job: Callable[[DictConfig, Sequence[str]], Any]) -> None:
    """Compose config/<config_name>.yaml with the command line's overrides, and run the job. Errors end the process.

    Args:
        config_name: a file of config/, without its ending.
        job: called with the unchecked config and the overrides; in a sweep (--multirun), once for each of its jobs.
    """

    failed, began = [], []

    def in_hydra(config: DictConfig) -> None:
        began.append(True)
        overrides = list(HydraConfig.get().overrides.task)
        several = HydraConfig.get().mode == RunMode.MULTIRUN
        with reported_errors(config_name):  # here too, because Hydra would add lines to an error that reaches it
            try:
                job(config, overrides)
            except (UserError, RunError, torch.OutOfMemoryError) as error:
                if not several:
                    raise
                failed.append(overrides)  # the other jobs of a sweep continue
                print(f"error: {' '.join(overrides)}: {error}", file=sys.stderr, flush=True)

    allocate_in_segments()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its errors itself and exits with code 1
    with lenient_console(), reported_errors(config_name):
        try:
            hydra.main(version_base=None, config_path=CONFIG_DIR, config_name=config_name)(in_hydra)()
        except ValueError as error:  # Hydra raises it for loss=null; raised by the job, it is a bug and not invalid input
            if began:
                raise
            raise UserError(str(error)) from None
        if failed:
            raise RunError(f"{plural(len(failed), 'job')} of the sweep failed; the same command with resume=auto retries them")


def override(key: str, value: str) -> str:
    """Return the override key='value' that gives a key any text, such as a path with quotes, for the command line of another process."""
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)  # else OmegaConf would see a reference
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"{key}='{text}'"


@contextmanager
def reported_errors(config_name: str) -> Iterator[None]:
    """Report an error in one or two lines without a traceback, and exit: code 2 for invalid input, 1 for a failed run, 128 + signal for a
    stopped one."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        exit_with_error(explain_composition_error(error, CONFIG_DIR, known_keys(config_name)), 2)
    except UserError as error:
        exit_with_error(str(error), 2)
    except RunError as error:
        exit_with_error(str(error), 1)
    except PeerError:
        exit_quietly(1)
    except Stopped as stopped:
        sys.exit(128 + stopped.signum)
    except torch.OutOfMemoryError as error:
        exit_with_error(f"out of memory: {str(error).splitlines()[0]}", 1)
    except OSError as error:  # of the disk, most likely; what can be expected is reported where it happens
        where = f"{error.filename}: " if error.filename else ""
        exit_with_error(f"{where}{reason_of(error)}; what was saved so far is kept", 1)
    except KeyboardInterrupt:
        exit_with_error("interrupted; what was saved so far is kept", 130)


def exit_quietly(code: int) -> NoReturn:
    """Exit after a delay: launchers kill all ranks when the first one exits, and the failing rank must get to print its error."""
    _ignore_interrupts()
    time.sleep(5)
    exit_rank(code)


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C from now on: this process ends anyway, and another one would end it with a traceback."""
    with suppress(ValueError):  # outside the main thread, which gets no signals
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def known_keys(config_name: str) -> list[str]:
    """Return the keys of the config with the command line's groups, or with the default groups if those do not compose."""
    groups = [argument for argument in sys.argv[1:] if re.match(rf"({'|'.join(GROUPS)})=", argument)]
    for overrides in (groups, []):
        try:
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(CONFIG_DIR, version_base=None):
                return [*GROUPS, *flat_keys(OmegaConf.to_container(hydra.compose(config_name, overrides)))]
        except (HydraException, OmegaConfBaseException):
            continue
    return []


def exit_with_error(message: str, code: int) -> NoReturn:
    """Print a message on standard error and exit."""
    _ignore_interrupts()
    sys.stdout.flush()
    if not torch.distributed.is_initialized() and own_rank() > 0:
        exit_quietly(code)  # before the ranks have met, all fail alike, and rank 0 reports it
    print("\n".join(line if line.startswith(" ") else f"error: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)
    exit_rank(code)


def exit_rank(code: int) -> NoReturn:
    """Exit without waiting for other ranks, which PyTorch's communication may do when the interpreter shuts down."""
    if is_supervised() and torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def explain_composition_error(error: Exception, config_dir: str, known_keys: list[str]) -> str:
    """Return one line that says why Hydra cannot compose a command line, and what to type instead.

    Args:
        error: raised by Hydra or OmegaConf.
        config_dir: path of config/.
        known_keys: dotted keys to suggest in place of an unknown one.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.removesuffix(".yaml").partition("/")
        folder = os.path.join(config_dir, group)
        options = sorted(file.removesuffix(".yaml") for file in os.listdir(folder)) if os.path.isdir(folder) else []
        return f"{group}={name}: there is no config/{group}/{name}.yaml{nearest(name, options)}; available: {', '.join(options)}"
    if found := re.search(r"Could not override '([^'@]+)", text):
        if re.match(r"model\.(chat_template_kwargs|from_config)\.", found.group(1)):
            return f"{found.group(1)}: a new entry needs a +, as in +{found.group(1)}=..."
        return f"unknown key {found.group(1)}{nearest(found.group(1), known_keys)}"
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{found.group(1)} already exists: leave out the +"
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"missing: {found.group(1)}=..."
    if found := re.search(r"Error merging override (.+)", text):
        return f"{found.group(1)}: the config has another kind of value there (text or number, list, or mapping), see config/"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value ({text}){_quoted(error.override)}"
    if found := re.search(r"Ambiguous value for argument '(.+?)' 1\. ", text):
        key, _, value = found.group(1).partition("=")
        what = f"{found.group(1)}: a comma separates the values of a sweep (--multirun); a list is written {key}=[{value}]"
        return what + _quoted(found.group(1))
    return text


def _quoted(argument: str) -> str:
    """Return how to type an argument whose value Hydra does not take as it is, as a line to add; '' if quotes do not help."""
    key, _, value = argument.partition("=")
    if not value or key in GROUPS:
        return ""
    if value[0] + value[-1] in ("{}", "[]"):
        return "\n  within {} and [], text with special characters needs quotes of its own, such as '<0.5'"
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return f"\n  a value with special characters needs quotes within quotes: {shlex.quote(override(key, value))}"
