"""What every entry point does: composing the config that a command line names, and answering a mistake in a line or two."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from tdpo.utils import CONFIG_DIR, PeerError, RunError, Stopped, UserError, flat_keys, nearest, plural

GROUPS = ("model", "datasets", "loss")


def run_command(config_name: str, job: Callable[[DictConfig, Sequence[str]], Any]) -> None:
    """Compose config/<config_name>.yaml with the command line's overrides, and do the job; errors end the process.

    Args:
        job: is given the config, not checked yet, and the overrides; of a sweep (--multirun) once for each of its jobs.
    """

    failed, began = [], []

    def in_hydra(config: DictConfig) -> None:
        began.append(True)
        overrides = list(HydraConfig.get().overrides.task)
        several = HydraConfig.get().mode == RunMode.MULTIRUN
        with reported_errors(config_name):  # within the job too: Hydra would add lines of its own to an error that it sees
            try:
                job(config, overrides)
            except (UserError, RunError, torch.OutOfMemoryError) as error:
                if not several:
                    raise
                failed.append(overrides)  # the other jobs of a sweep go on
                print(f"error: {' '.join(overrides)}: {error}", file=sys.stderr, flush=True)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors itself and exits with 1
    with reported_errors(config_name):
        try:
            hydra.main(version_base=None, config_path=CONFIG_DIR, config_name=config_name)(in_hydra)()
        except ValueError as error:  # what Hydra raises for loss=null; one of the job's own is no user's mistake
            if began:
                raise
            raise UserError(str(error)) from None
        if failed:
            raise RunError(f"{plural(len(failed), 'job')} of the sweep failed; with resume=auto the same command tries them again")


@contextmanager
def reported_errors(config_name: str) -> Iterator[None]:
    """A mistake is answered in a line or two with exit code 2, a run that cannot go on with 1, without a traceback."""
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
        sys.exit(0 if is_supervised() else 128 + stopped.signum)
    except torch.OutOfMemoryError as error:
        exit_with_error(f"out of memory: {str(error).splitlines()[0]}", 1)
    except KeyboardInterrupt:
        exit_with_error("interrupted; what was saved is kept", 130)


def exit_quietly(code: int) -> NoReturn:
    """Exit after a delay: launchers kill all ranks when the first one exits, and the failing rank must get to print its error."""
    time.sleep(5)
    exit_rank(code)


def known_keys(config_name: str) -> list[str]:
    """The keys of the config that the command line's groups make, or of the default one where they make none."""
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
    sys.stdout.flush()
    if not torch.distributed.is_initialized() and own_rank() > 0:
        exit_quietly(code)  # before the ranks meet, all make the same mistake
    print("\n".join(line if line.startswith(" ") else f"error: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)
    exit_rank(code)


def exit_rank(code: int) -> NoReturn:
    """One of several ranks must not wait for the others at the interpreter's end, which PyTorch's communication may do."""
    if is_supervised() and torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


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
