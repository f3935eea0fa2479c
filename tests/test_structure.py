"""The structure of the project: which file may import which, its size, and code that it must not contain."""

import ast

from helpers import ROOT

from tdpo.losses import OBJECTIVES

# Layers: a component imports only from components of earlier lines, or its own. A component ("room") is a folder of tdpo/, or a file of the
# root; tdpo/losses.py and tdpo/utils.py are the first.
ORDER = [
    {"tdpo"},
    {"tdpo.scoring", "tdpo.data", "tdpo.distributed", "utils"},
    {"tdpo.cli", "tdpo.checkpointing"},
    {"tdpo.models", "preference_datasets"},
    {"tdpo.training"},
    {"tdpo.analysis", "trainers"},
    {"train", "sample", "eval", "export", "token_report", "plot"},
]


def room_of(module: str) -> str:
    """Return a module's component: 'tdpo.data' for 'tdpo.data.rows', 'tdpo' for 'tdpo.losses', 'trainers' for 'trainers'."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "tdpo" and len(parts) > 2 else parts[0]


def imports_of(file) -> set[str]:
    """Return the modules of this repository that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(node.module)
    return {name for name in names if name in MODULES}


MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in [*ROOT.glob("*.py"), *(ROOT / "tdpo").rglob("*.py")]}
MODULES = {name: file for name, file in MODULES.items() if not name.endswith("__init__")}


def test_imports_go_one_way():
    assert {room_of(name) for name in MODULES} == set().union(*ORDER), "a new component needs a place in ORDER"
    for i, row in enumerate(ORDER):
        below = set().union(*ORDER[:i])
        for name, file in MODULES.items():
            if room_of(name) in row:
                own = {room_of(other) for other in imports_of(file)} - {room_of(name)}
                assert own <= below, f"{name} imports {own - below}"


def test_the_project_stays_small():
    """There are few files at the root, and the training loop stays short enough to be read in one sitting."""
    assert len(list(ROOT.glob("*.py"))) <= 10 and len(set().union(*ORDER)) <= 22 and len(ORDER) <= 7
    between = {(room_of(name), room_of(other)) for name, file in MODULES.items() for other in imports_of(file)}
    assert sum(a != b for a, b in between) <= 95
    text = (ROOT / "trainers.py").read_text()
    assert len(text.splitlines()) <= 380
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(text)) if hasattr(node, "name")}
    assert lengths.pop("BasicTrainer") <= 330 and max(lengths.values()) <= 60, lengths


def test_only_losses_reads_loss_names_and_hyperparameters():
    for name, file in MODULES.items():
        if name == "tdpo.losses":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                compared = [x.value for x in (node.left, *node.comparators) if isinstance(x, ast.Constant)]
                assert not set(compared) & set(OBJECTIVES), f"{name}:{node.lineno} {compared}"
            if isinstance(node, ast.Attribute) and node.attr == "hyperparameters":
                assert name == "train", f"{name}:{node.lineno}"  # train.py prints them all


def test_no_file_hides_a_package():
    names = {file.stem for file in ROOT.glob("*.py")} | {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    assert not names & {"datasets", "types", "tokenize", "logging", "profile", "evaluate", "tokenizers", "transformers", "wandb"}


def test_loaded_files_are_never_executed():
    """torch.load reads only tensors, Transformers runs no code from a model repository, and no module starts a shell."""
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            call, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if call == "torch.load":
                assert keywords.get("weights_only") == "True", f"{file.name}:{node.lineno}"
            if call.startswith("transformers.Auto") and call.endswith(("from_pretrained", "from_config")):
                assert keywords.get("trust_remote_code") == "False", f"{file.name}:{node.lineno}"
            assert not call.startswith(("os.system", "subprocess.", "pickle."))
