"""Fast scoring against plain scoring: equal loss, metrics and gradients for every model family; and the test of a model at the start."""

import copy
import math
import weakref

import pytest
import torch
from helpers import EQUAL, FAMILIES, PREFERENCE, SIZES, logs_of, padded, run, token_pairs
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from tdpo.losses import get_objective
from tdpo.models.memory import head_memory
from tdpo.scoring import distributions
from tdpo.scoring.chunked_loss import ReferenceStates, loss_of_rows, score_rows
from tdpo.scoring.head import Head, HeadOnly
from tdpo.scoring.prefix_sharing import attention_masks, shared_prefix_batch
from tdpo.scoring.probes import fast_scoring_problem, packing_problem
from tdpo.scoring.scorer import Scorer
from tdpo.training.metrics import example_metrics
from tdpo.utils import UserError, disable_dropout

GPT_NEO = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "window_size": 16,
    "attention_types": [[["global", "local"], 1]],
}
# Besides the families of config/model: heads with a bias, tied and untied heads, and more kinds of windows and soft caps.
MORE = {
    "phi": SIZES,
    "qwen2": {**SIZES, "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gemma3_text": {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0},
}
CASES = {
    **{family: (family, sizes) for family, sizes in {**FAMILIES, **MORE}.items()},
    "gpt_neox, tied": ("gpt_neox", {**SIZES, "tie_word_embeddings": True}),
    "gpt2, untied": ("gpt2", {**FAMILIES["gpt2"], "tie_word_embeddings": False}),
    "llama, tied": ("llama", {**FAMILIES["llama"], "tie_word_embeddings": True}),
    # Plain scoring of Gemma 2 gives NaN if a row has more padding than the window.
    "gemma2": ("gemma2", {**FAMILIES["gemma2"], "sliding_window": 12, "final_logit_softcapping": 3.0}),
}
# At least one loss for each kind of need; test_family.py trains the other losses both ways.
LOSSES = {"sft": {}, "dpo": {"beta": 0.5}, "ipo": {"beta": 0.5, "average_log_prob": True}, "tdpo1": {"beta": 0.5}, "tdpo2": {"beta": 0.5}}
LOSSES["simpo"] = {}


def build(case: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    family, sizes = CASES[case]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, bos_token_id=0, eos_token_id=0, **sizes), dtype=dtype)
    for parameter in model.parameters():  # also those that are initialised to 0 or 1
        torch.nn.init.normal_(parameter, std=0.2)
    disable_dropout(model)
    return model


class AllInFloat64(TorchFunctionMode):
    """A mode in which float64 tensors stay float64: some families cast to float32 in norms and attention, whatever their dtype."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        first = arguments[0] if arguments else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if function is torch.Tensor.float:
                return first
            arguments = tuple(torch.float64 if x is torch.float32 else x for x in arguments)
            if keywords.get("dtype") is torch.float32:
                keywords["dtype"] = torch.float64
        return function(*arguments, **keywords)


def results(scorer: Scorer, batch) -> tuple[torch.Tensor, dict, dict]:
    """Return the loss, every metric, and every parameter's gradient."""
    scorer.zero_grad()
    scored = scorer(batch)
    (scored.loss / 7).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in scorer.policy.named_parameters()}
    return scored.loss.detach(), example_metrics(scored.scores, scored.output, "train"), gradients


@pytest.mark.parametrize("chunk,per_row", [(512, [3, 1, 2]), (5, None)], ids=["packed rows, one chunk", "examples of several chunks"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_fast_scoring_equals_plain_scoring(case, dtype, tolerance, chunk, per_row, monkeypatch):
    """Gradients are compared relative to their norm, or to 1/1000 of the total norm if they are only rounding, such as a key's bias."""
    monkeypatch.setitem(distributions.CHUNK, "cpu", chunk)
    policy, reference = build(case, 0, dtype), build(case, 1, dtype)
    with AllInFloat64():
        for name, hyperparameters in LOSSES.items():
            objective = get_objective(name, **hyperparameters)
            scorer = Scorer(policy, reference if objective.needs_reference else None, objective)
            rows = [(prompt, responses[: len(objective.roles)]) for prompt, responses in token_pairs()]
            loss, metrics, gradients = results(scorer, padded(token_pairs()))
            fast_loss, fast_metrics, fast_gradients = results(scorer, shared_prefix_batch(rows, per_row=per_row))
            torch.testing.assert_close(fast_loss, loss, rtol=tolerance, atol=0)
            for metric, values in metrics.items():
                if metric.endswith("/accuracies"):  # for the pair with equal responses the sign is rounding
                    values[EQUAL] = fast_metrics[metric][EQUAL]
                torch.testing.assert_close(fast_metrics[metric], values, rtol=tolerance, atol=10 * tolerance)
            whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
            for parameter, gradient in gradients.items():
                difference = (fast_gradients[parameter] - gradient).norm() / max(gradient.norm(), 1e-3 * whole)
                assert difference < tolerance, f"{name} {parameter}: {difference}"


@pytest.mark.parametrize("vocabulary", [64, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reference_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("loss", ["tdpo2", "dpo", "sft"])
def test_the_tables_of_a_gpu_give_the_same(loss, softcap, reference_dtype, dtype, vocabulary, monkeypatch):
    """There log_softmax is not in place and rows are aligned. What is not written before it is read would be NaN."""

    def computed() -> list[torch.Tensor]:
        torch.manual_seed(0)
        objective = get_objective(loss, **LOSSES[loss])
        examples = [([1], [[2] * 4, [3] * 3]), ([1], [[2] * 14, [3] * 12]), ([4], [[2] * 2, [5]])]
        rows = shared_prefix_batch([(prompt, responses[: len(objective.roles)]) for prompt, responses in examples])
        states = torch.randn(len(rows.labels), 16).to(dtype).requires_grad_()
        weights = [torch.randn(vocabulary, 16).to(x).requires_grad_() for x in (dtype, reference_dtype)]
        biases = [torch.randn(vocabulary).to(x).requires_grad_() for x in (dtype, reference_dtype)]
        reference = ReferenceStates(torch.randn(len(rows.labels), 16).to(reference_dtype), Head(weights[1], biases[1], softcap))
        head = Head(weights[0], biases[0], softcap)
        total, _, scores = loss_of_rows(states, head, reference if objective.needs_reference else None, rows, objective, 3)
        total.backward()
        return [total.detach(), states.grad, weights[0].grad, biases[0].grad, scores.logps]

    monkeypatch.setitem(distributions.CHUNK, "cpu", 9)
    expected = computed()
    init, empty = distributions.Workspace.__init__, torch.empty
    monkeypatch.setattr(distributions, "needs_alignment", lambda vocabulary, device: vocabulary % 64 != 0)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))

    def as_on_a_gpu(self, *arguments):
        init(self, *arguments)
        self.on_cpu, self.block = False, self.size
        self.scratch = torch.empty(*self.tables[0].shape, dtype=self.dtype)

    monkeypatch.setattr(distributions.Workspace, "__init__", as_on_a_gpu)
    for found, value in zip(computed(), expected):
        assert (found.double() - value.double()).norm() <= 1e-5 * value.double().norm()


def test_gradients_in_half_precision_are_summed_over_chunks(monkeypatch):
    """The result agrees with plain scoring in the same dtype, up to rounding."""
    scorer = Scorer(build("phi", 0, torch.bfloat16), build("phi", 1, torch.bfloat16), get_objective("tdpo2", beta=0.5))
    _, _, plain = results(scorer, padded(token_pairs()))
    monkeypatch.setitem(distributions.CHUNK, "cpu", 5)
    _, _, fast = results(scorer, shared_prefix_batch(token_pairs()))
    for name in ("lm_head.weight", "lm_head.bias", "model.layers.1.mlp.fc2.weight"):
        difference = (fast[name] - plain[name]).norm() / plain[name].norm()
        assert difference < 0.03, f"{name}: {difference}"


@pytest.mark.parametrize("case", ["phi", "gemma2", "gpt2"])
def test_cached_states_and_the_head_replace_the_reference(case):
    """Cached states and the head replace the reference, also with a bias, a soft cap or tied weights. The model's memory is freed."""
    objective = get_objective("tdpo2", beta=0.5)
    scorer = Scorer(build(case, 0), build(case, 1), objective)
    rows = shared_prefix_batch(token_pairs())
    live = scorer(rows)
    with torch.no_grad():
        known = rows.with_reference(scorer.reference_states(rows).clone())
    reference, scorer.reference = scorer.reference, HeadOnly.instead_of(scorer.reference)
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in reference.parameters())
    cached = scorer(known)
    assert torch.equal(cached.loss, live.loss) and torch.equal(cached.scores["rejected"].kl, live.scores["rejected"].kl)


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_the_scores_are_the_same(name, monkeypatch):
    monkeypatch.setitem(distributions.CHUNK, "cpu", 16)
    objective = get_objective(name, **LOSSES[name])
    scorer = Scorer(build("gpt_neox", 0), build("gpt_neox", 1) if objective.needs_reference else None, objective)
    rows = shared_prefix_batch([(prompt, responses[: len(objective.roles)]) for prompt, responses in token_pairs()])
    trained = scorer(rows, 4)
    with torch.no_grad():
        evaluated = scorer(rows, 4)
    torch.testing.assert_close(evaluated.loss, trained.loss.detach(), rtol=1e-6, atol=0)
    for role, score in trained.scores.items():  # numbers in float32, which chunks of other sizes round by 4e-7
        torch.testing.assert_close(vars(evaluated.scores[role]), vars(score), rtol=1e-5, atol=1e-6)


def test_a_scorer_trains_after_scoring_in_inference_mode_and_after_larger_and_smaller_batches():
    """It keeps memory from one batch to the next."""
    scorer = Scorer(build("llama", 0), build("llama", 1), get_objective("tdpo2", beta=0.5))
    few, all_rows = (shared_prefix_batch(token_pairs()[:n]) for n in (2, None))
    expected = Scorer(scorer.policy, scorer.reference, scorer.objective)(all_rows).loss.detach()
    scorer(few)
    with torch.inference_mode():
        scorer(all_rows)
    for rows in (all_rows, few, all_rows):
        loss = scorer(rows).loss
        loss.backward()
    assert torch.equal(loss.detach(), expected)


@pytest.mark.parametrize("counted", [0, 1, 4])
def test_uncounted_examples_enter_neither_loss_nor_gradient(counted, monkeypatch):
    """Examples that are not counted get scores, but enter neither loss nor gradient, in whichever group of rows they are."""
    monkeypatch.setitem(distributions.CHUNK, "cpu", 16)
    scorer = Scorer(build("llama", 0), build("llama", 1), get_objective("tdpo2", beta=0.5))
    rows = token_pairs()
    some = scorer(shared_prefix_batch(rows), counted)
    some.loss.backward()
    gradient = scorer.policy.lm_head.weight.grad.clone()
    scorer.zero_grad()
    losses = scorer(shared_prefix_batch(rows)).output.losses
    torch.testing.assert_close(some.loss.detach(), losses[:counted].sum())
    if counted == 0:
        assert not gradient.any()
        return
    scorer(shared_prefix_batch(rows[:counted])).loss.backward()
    torch.testing.assert_close(gradient, scorer.policy.lm_head.weight.grad, rtol=1e-5, atol=1e-7)


def test_rows_of_one_prompt_and_two_responses():
    rows = shared_prefix_batch([([5, 6], [[7, 8, 9], [10]]), ([3], [[4], [11, 12]])])
    assert rows.input_ids.tolist() == [[5, 6, 7, 8], [3, 11, 0, 0]]  # nothing is predicted from a response's last token
    assert rows.position_ids[0].tolist() == [0, 1, 2, 3] and rows.position_ids[1, :2].tolist() == [0, 1]
    assert rows.segments.tolist() == [[0, 0, 1, 1], [0, 2, -1, -1]]
    assert rows.states.tolist() == [1, 2, 3, 1, 4, 4, 5] and rows.labels.tolist() == [7, 8, 9, 10, 4, 11, 12]
    assert rows.responses.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert rows.num_tokens.tolist() == [[3, 1], [1, 2]] and rows.counts == (4, 3)


def test_a_response_sees_only_the_prompt_and_itself():
    rows = shared_prefix_batch([([5, 6], [[7, 8, 9], [10, 11, 12]]), ([3], [[4], [11, 12]])])
    yes = [[j for j in range(6) if visible[j]] for visible in rows.visible()[0].tolist()]
    assert yes == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5]]
    near = [[j for j in range(6) if visible[j]] for visible in rows.visible(window=2)[0].tolist()]
    assert near == [[0], [0, 1], [1, 2], [2, 3], [1, 4], [4, 5]]  # distances of positions, not of places in the row
    assert rows.visible(window=1).any(-1).all()  # every position, even padding, sees something: else NaN


def test_an_example_sees_nothing_of_the_others_in_its_row():
    examples = [([3], [[4], [11, 12]]), ([5, 6], [[7, 8, 9], [10, 11, 12]]), ([8, 8], [[1, 1], [2, 2]])]
    rows = shared_prefix_batch(examples, multiple=8, per_row=[2, 1])
    yes = [[j for j in range(8) if visible[j]] for visible in rows.visible()[0].tolist()]
    assert yes == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 3, 6], [2, 3, 6, 7]]
    assert rows.input_ids.shape == (2, 8) and rows.position_ids[0].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert rows.labels.tolist() == [4, 11, 12, 7, 8, 9, 10, 11, 12, 1, 1, 2, 2]
    assert rows.states.tolist() == [0, 0, 1, 3, 4, 5, 3, 6, 7, 9, 10, 9, 11]
    assert rows.responses.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5] and rows.counts == (3, 6, 4)


def test_flex_attention_masks_agree():
    """FlexAttention's block masks define the same visibility."""
    rows = shared_prefix_batch(token_pairs(), per_row=[2, 3, 1])
    config = build("qwen2", 0).config
    config._attn_implementation = "flex_attention"
    blocks = attention_masks(rows, config)
    assert set(blocks) == {"full_attention", "sliding_attention"}
    batch, length = rows.input_ids.shape
    for kind, window in (("full_attention", None), ("sliding_attention", 6)):
        b, q, k = torch.meshgrid(torch.arange(batch), torch.arange(length), torch.arange(length), indexing="ij")
        assert torch.equal(blocks[kind].mask_mod(b, 0, q, k), rows.visible(window))


@pytest.mark.parametrize("case", CASES)
def test_fast_scoring_is_accepted_for_every_family(case):
    objective = get_objective("sft")
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            scorer = Scorer(build(case, 0, dtype), None, objective)
            assert fast_scoring_problem(scorer, max_length=30) is None and packing_problem(scorer, max_length=30) is None


@pytest.mark.parametrize(
    "family,sizes,why",
    [
        ("bloom", {"vocab_size": 31, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "it cannot compute|differ"),  # ALiBi
        ("mamba", {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2}, "layers of"),  # recurrent
        ("granite", {**SIZES, "logits_scaling": 3.0}, "differ"),
        (
            "gpt_neo",
            {**GPT_NEO, "max_position_embeddings": 64},
            "differ",
        ),  # its window counts places in the row, and is not in its config under a known name
        ("gpt_neo", {**GPT_NEO, "max_position_embeddings": 32}, "it cannot compute"),  # the row is longer than its positions
        ("cohere", {**SIZES, "logit_scale": 0.3}, "differ"),
    ],
)
def test_fast_scoring_is_refused_for_unsupported_models(family, sizes, why):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes))
    with torch.no_grad():
        problem = fast_scoring_problem(Scorer(model, None, get_objective("sft")), max_length=30)
    assert problem and any(word in problem for word in why.split("|"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_scoring_is_refused_if_the_mask_lacks_a_window(dtype):
    """The config hides the model's window, as if it had an unknown name. Texts shorter than the window would not reveal it."""
    scorer = Scorer(build("mistral", 0, dtype), None, get_objective("sft"))
    with torch.no_grad():
        assert fast_scoring_problem(scorer, max_length=30) is None
        config = scorer.policy.config
        hidden = copy.deepcopy(config)
        hidden.sliding_window = None
        scorer.policy.config = hidden  # the model's layers and its own mask keep the window
        assert "differ" in fast_scoring_problem(scorer, max_length=30)


def test_rows_of_several_examples_are_refused_if_the_model_mixes_them(monkeypatch):
    """As if a part of the model counted places in the row: the first example of a row is right, those after it are not."""
    scorer = Scorer(build("llama", 0), None, get_objective("sft"))
    forward = scorer.policy.base_model.forward

    def by_place(position_ids=None, **others):
        if position_ids is not None:
            later = (position_ids == 0).cumsum(-1) > 1
            position_ids = position_ids + 7 * later * (position_ids % 2)
        return forward(position_ids=position_ids, **others)

    monkeypatch.setattr(scorer.policy.base_model, "forward", by_place)
    with torch.no_grad():
        assert fast_scoring_problem(scorer, max_length=30) is None
        assert "differ" in packing_problem(scorer, max_length=30)


def test_scoring_is_chosen_and_printed(tmp_path, capsys, monkeypatch):
    options = [*PREFERENCE, "n_examples=8"]
    fast = run(*options, f"local_run_dir={tmp_path}/fast")
    plain = run(*options, "scoring=plain", f"local_run_dir={tmp_path}/plain")
    assert "scoring: plain, several" not in (said := capsys.readouterr().out) and said.count("scoring: fast\n") == 1
    monkeypatch.setattr("tdpo.training.guards.fast_scoring_problem", lambda *_: "its logits are odd")
    fallen_back = run(*options, f"local_run_dir={tmp_path}/auto")
    assert capsys.readouterr().out.count("scoring: plain, several times slower, because of GPTNeoXForCausalLM: its logits are odd") == 1
    assert logs_of(fallen_back)[:1] == logs_of(plain)[:1]
    assert logs_of(fast)[-1]["loss/eval"] == pytest.approx(logs_of(plain)[-1]["loss/eval"], rel=1e-5)
    with pytest.raises(UserError, match="scoring=fast: GPTNeoXForCausalLM does not support it: its logits are odd; use scoring=plain"):
        run(*options, "scoring=fast", f"local_run_dir={tmp_path}/refused")


def test_a_dtype_that_is_slow_on_this_processor_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = [*PREFERENCE, "n_examples=8"]
    run(*options, f"local_run_dir={tmp_path}/float32")
    assert "bfloat16" not in capsys.readouterr().out
    run(*options, "model.fsdp_policy_mp=bfloat16", f"local_run_dir={tmp_path}/bfloat16")
    assert capsys.readouterr().out.count("bfloat16 is no faster than float32 on this processor") == 1


def one_row(positions: int, vocabulary: int, hidden: int = 8):
    generator = torch.Generator().manual_seed(0)
    rows = shared_prefix_batch([([1], [[2] * (positions // 2), [3] * (positions - positions // 2)])])
    states = torch.randn(positions, hidden, generator=generator, requires_grad=True)
    head = Head(torch.randn(vocabulary, hidden, generator=generator, requires_grad=True), None)
    reference = ReferenceStates(torch.randn(positions, hidden, generator=generator), Head(head.weight.detach().clone(), None))
    return states, head, reference, rows


def test_logits_200_apart_and_probabilities_of_0():
    """As for plain scoring (test_logps.py): exp(-200) is 0 in float32, and an entry with -inf in both models adds nothing."""
    rows = shared_prefix_batch([([1], [[0], [0]])])
    bias = torch.tensor([0.0, 0.0, 0.0, -math.inf])
    states = torch.tensor([[0.0, 200.0, -200.0, 0.0]] * 2, requires_grad=True)
    reference = ReferenceStates(torch.tensor([[200.0, 0.0, -200.0, 0.0]] * 2), Head(torch.eye(4), bias))
    head = Head(torch.eye(4).requires_grad_(), bias)
    loss, _, scores = loss_of_rows(states, head, reference, rows, get_objective("tdpo2", beta=0.1), 1)
    assert scores.kl.tolist() == [[200.0, 200.0]] and scores.logps.tolist() == [[-200.0, -200.0]]
    loss.backward()
    assert states.grad.isfinite().all() and states.grad.any() and head.weight.grad.isfinite().all()


def test_fast_scoring_sums_over_a_long_response_exactly():
    """Values of tokens are of float32, their sums of float64."""
    generator = torch.Generator().manual_seed(0)
    rows = shared_prefix_batch([([3, 4], [torch.randint(3, 31, (n,), generator=generator).tolist() for n in (300, 200)])])
    states = torch.randn(500, 16, generator=generator)
    weights = [torch.randn(31, 16, generator=generator)]
    weights.append(weights[0] + 1e-3 * torch.randn(31, 16, generator=generator))
    reference = ReferenceStates(states, Head(weights[1], None))
    objective = get_objective("tdpo2", beta=0.1)
    scores = score_rows(states, Head(weights[0], None), reference, rows, objective)
    p, q = ((states @ weight.T).log_softmax(-1) for weight in weights)
    own, other = (x.gather(-1, rows.labels[:, None])[:, 0].tolist() for x in (p, q))
    for r, part in enumerate((slice(0, 300), slice(300, 500))):
        assert scores.logps[0, r].item() == pytest.approx(math.fsum(own[part]), rel=1e-12)
        assert scores.log_ratio[0, r].item() == pytest.approx(math.fsum(own[part]) - math.fsum(other[part]), rel=1e-9)
    total, output, trained = loss_of_rows(states.requires_grad_(), Head(weights[0], None), reference, rows, objective, 1)
    assert torch.equal(trained.logps, scores.logps) and total.dtype == output.losses.dtype == torch.float64


def test_nan_of_a_model_reaches_the_loss():
    for poisoned in ("policy", "reference"):
        states, head, reference, rows = one_row(8, 16)
        with torch.no_grad():
            (states if poisoned == "policy" else reference.states)[3] = float("nan")
        loss, *_ = loss_of_rows(states, head, reference, rows, get_objective("tdpo2", beta=0.1), 1)
        assert loss.isnan()


def test_the_loss_can_be_differentiated_once():
    states, head, reference, rows = one_row(8, 16)
    loss, *_ = loss_of_rows(states, head, reference, rows, get_objective("tdpo2", beta=0.1), 1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


class LiveBytes(TorchDispatchMode):
    """A mode that records `peak`: the most bytes that tensors created in it held at the same time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                self.change(storage.nbytes())
                weakref.finalize(storage, self.change, -storage.nbytes())
        return output

    def change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("name", LOSSES)
def test_memory_does_not_grow_with_positions_times_vocabulary(name):
    """8 times the positions need less than 1.5 times the peak, most of which is the workspace."""
    objective = get_objective(name, **LOSSES[name])

    def peak(positions: int) -> int:
        states, head, reference, rows = one_row(positions, 4096)
        reference = reference if objective.needs_reference else None
        rows = rows if len(objective.roles) == 2 else shared_prefix_batch([([1], [[2] * positions])])
        with LiveBytes() as live:
            loss_of_rows(states, head, reference, rows, objective, 1)[0].backward()
            with torch.no_grad():
                score_rows(states, head, reference, rows, objective)
        return live.peak

    assert 0 < peak(8 * 1024) < 1.5 * peak(1024)
    computed = head_memory(4096, 8, 1024, objective.needs_reference, objective.needs_kl, 4, chunk=distributions.CHUNK["cpu"])
    assert peak(1024) == pytest.approx(computed, rel=0.1)
