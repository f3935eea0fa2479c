"""The shape of the project: which file may import which."""

import ast

from conftest import ROOT

# From the bottom up: a file imports files of rows above its own only.
ORDER = [
    {"utils", "losses", "shared_prompt", "reviews", "signals", "findings", "pages"},
    {"chunked_head"},
    {"scoring", "rows", "tokenization", "parallel", "sampling"},
    {"token_cache"},
    {"chat", "batching", "config_schema", "checkpoints", "launch", "watch", "rewards"},
    {"metrics", "models", "preference_datasets", "resume", "training_state", "command_line", "evaluation"},
    {"memory", "reference_cache", "runs"},
    {"feeding"},
    {"trainers"},
    {"tensor_parallel"},
    {"train", "sample", "eval", "token_report", "plot"},
]


def imports_of(file) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way():
    files = {file.stem: file for file in ROOT.glob("*.py")}
    assert set(files) == set().union(*ORDER), "a new file needs a place in ORDER"
    for i, row in enumerate(ORDER):
        below = set().union(*ORDER[:i])
        for name in row:
            own = imports_of(files[name]) & set(files)
            assert own <= below, f"{name}.py imports {own - below}"


def test_no_file_hides_a_package():
    names = {file.stem for file in ROOT.glob("*.py")} | {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    assert not names & {"datasets", "types", "tokenize", "logging", "profile", "evaluate", "tokenizers", "transformers", "wandb"}


def test_what_is_loaded_is_never_run():
    """torch.load reads tensors alone, Transformers runs no code of a repository, and nothing starts a shell."""
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            call, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if call == "torch.load":
                assert keywords.get("weights_only") == "True", f"{file.name}:{node.lineno}"
            if call.startswith("transformers.Auto") and call.endswith(("from_pretrained", "from_config")):
                assert keywords.get("trust_remote_code") == "False", f"{file.name}:{node.lineno}"
            assert not call.startswith(("os.system", "subprocess.", "pickle."))
