"""What every entry point does: composing the config that a command line names, and answering a mistake in a line or two."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

import hydra
import torch
import transformers
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdpo.cli.schema import explain_composition_error, flat_keys
from tdpo.distributed.launch import is_supervised, own_rank
from tdpo.utils import CONFIG_DIR, PeerError, RunError, Stopped, UserError, plural

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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
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
        fail(explain_composition_error(error, CONFIG_DIR, known_keys(config_name)), 2)
    except UserError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except PeerError:
        leave_silently(1)
    except Stopped as stopped:
        sys.exit(0 if is_supervised() else 128 + stopped.signum)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory: {str(error).splitlines()[0]}", 1)
    except KeyboardInterrupt:
        fail("interrupted; what was saved is kept", 130)


@contextmanager
def silence_unless(is_first: bool) -> Iterator[None]:
    """What all ranks would print alike, one prints; errors go to standard error."""
    if is_first:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def leave_silently(code: int) -> NoReturn:
    """Another rank says what is wrong; a launcher, which ends all ranks when one has ended, must not keep it from that."""
    time.sleep(5)
    leave(code)


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


def fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    if not torch.distributed.is_initialized() and own_rank() > 0:
        leave_silently(code)  # before the ranks meet, all make the same mistake
    print("\n".join(line if line.startswith(" ") else f"error: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """One of several ranks must not wait for the others at the interpreter's end, which PyTorch's communication may do."""
    if is_supervised() and torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
